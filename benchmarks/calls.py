"""What a tiny call costs: layers whose arithmetic takes a few microseconds.

Four modules take turns in one loop: nn.LSTM, fastlstm.LSTM, nn.Linear, and a view of a parameter. The view's time is
that of the loop itself: autograd engine, gradient accumulation, Python. A module's own cost is its time above the
view's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.features import TOLERANCE, Step, error, time_steps
from benchmarks.measure import Plan
from benchmarks.results import Row

PLAN = Plan(budget=6.0, min_rounds=31)
IMPLEMENTATIONS = ("view", "linear", "nn", "fastlstm")


@dataclass(frozen=True)
class Call:
    """One call in a loop: an LSTM over T steps, without or with states (streaming), or one step of an LSTMCell."""

    kind: str  # sequence, stream or cell
    T: int
    H: int = 64  # and input_size; B = 1

    @property
    def name(self) -> str:
        words = {"sequence": f"T={self.T}", "stream": f"T={self.T} with states", "cell": "LSTMCell"}
        return f"{words[self.kind]} B=1 I={self.H} H={self.H}"


CALLS = (Call("sequence", 1), Call("sequence", 5), Call("stream", 1), Call("cell", 1))
MODES = ("train", "forward")


class View(nn.Module):
    """A parameter in the shape of the output."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(self.shape)


def chosen(matching: str = "") -> list[Call]:
    return [call for call in CALLS if matching in call.name]


def call_rows(matching: str, report: Callable[[str, list[Row]], None], budget: float | None = None) -> list[Row]:
    """One row per mode and implementation; `ratio` is nn.LSTM's time divided by the implementation's."""
    plan = PLAN if budget is None else Plan(budget=budget, min_rounds=3, patience=budget)
    rows = []
    for call in chosen(matching):
        new_rows = [row for mode in MODES for row in _measure(call, mode, plan)]
        report(call.name, new_rows)
        rows += new_rows
    return rows


def steps(call: Call, mode: str) -> dict[str, Step]:
    """The loop's body for every implementation; nn.LSTM and fastlstm.LSTM have equal weights."""
    torch.manual_seed(0)
    H, cell = call.H, call.kind == "cell"
    x = torch.randn(1, H) if cell else torch.randn(call.T, 1, H)
    states = None
    if call.kind != "sequence":
        states = tuple(torch.randn(1, H) if cell else torch.randn(1, 1, H) for _ in range(2))
    theirs = nn.LSTMCell(H, H) if cell else nn.LSTM(H, H)
    modules = {
        "view": View(*x.shape),
        "linear": nn.Linear(H, H),
        "nn": theirs,
        "fastlstm": fastlstm.convert(copy.deepcopy(theirs)),
    }
    return {name: _step(module, x, states, mode) for name, module in modules.items()}


def _step(module: nn.Module, x: Tensor, states: tuple[Tensor, ...] | None, mode: str) -> Step:
    recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    arguments = (x, states) if recurrent else (x,)
    grad, parameters = torch.ones_like(x), list(module.parameters())
    module.train(mode == "train")

    def output() -> Tensor:
        result = module(*arguments)
        return result[0] if recurrent else result

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [output()]

    def train() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        output().backward(grad)
        return [parameter.grad for parameter in parameters]

    return train if mode == "train" else forward


def _measure(call: Call, mode: str, plan: Plan) -> list[Row]:
    body = steps(call, mode)
    rows = {impl: _row(call, mode, impl) for impl in body}
    ours = rows["fastlstm"]
    ours.error, ours.error_allowed = error(body["fastlstm"](), body["nn"]()), TOLERANCE
    if not ours.error <= TOLERANCE:
        ours.status = f"WRONG: differs from nn.LSTM by {ours.error:.2e} of the largest element"
    time_steps(body, rows, "nn", plan)
    return list(rows.values())


def _row(call: Call, mode: str, impl: str) -> Row:
    row = Row("calls", call.name, mode, impl, kind=call.kind, dtype="float32")
    row.T, row.B, row.I, row.H, row.L, row.D = call.T, 1, call.H, call.H, 1, 1
    return row
