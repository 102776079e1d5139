"""Recurrent dropout, zoneout and layer normalization: a training step beside the plain layer's and a loop of steps.

The loop is what a user writes without these options: one input projection for all steps, masks drawn for all steps at
once, then one cell per step, as plain PyTorch and with the step compiled. Ratios are to the faster of the two, on a GPU
also to haste, if it is installed. Before anything is timed, all gradients must be right by the rule of
fastlstm/accuracy.py, with equal masks.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

import fastlstm
from benchmarks.features import Step, time_steps
from benchmarks.load import wait_for_idle
from benchmarks.measure import Plan
from benchmarks.results import Row
from fastlstm import accuracy, reference
from fastlstm.masks import Masks
from fastlstm.module_state import Variant
from fastlstm.ops.schema import LayerInputs

PLAN = Plan(budget=4.0, min_rounds=7, patience=20.0)
T, B, HS = 100, 32, (64, 128, 256)
# The options' usual sizes, and the longest time of a training step that is aimed at, relative to the plain layer's.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "recurrent_dropout": ({"recurrent_dropout": 0.3}, 1.10),
    "zoneout": ({"zoneout": 0.1}, 1.20),
    "layer_norm": ({"layer_norm": True}, 1.50),
}
TARGET = 8.0  # times the speed of the loop
BASELINES = ("loop", "compiled loop", "haste")

Drawn = tuple[Tensor | None, Tensor | None, Tensor | None]  # recurrent mask [B, H], shares of h and c [T, B, H]


@dataclass(frozen=True)
class VariantCase:
    option: str
    H: int

    @property
    def name(self) -> str:
        return f"{self.option} T={T} B={B} I=H={self.H}"

    @property
    def arguments(self) -> dict[str, Any]:
        return OPTIONS[self.option][0]


class Loop(nn.Module):
    """One layer, step by step, with the weights of `lstm`."""

    def __init__(self, lstm: fastlstm.LSTM, compiled: bool) -> None:
        super().__init__()
        for name, weight in lstm.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(weight.detach().clone()))
        variant = lstm._variant or Variant()
        self.p, self.zoneout, self.norm = variant
        self.step = torch.compile(self._step, dynamic=False) if compiled else self._step

    def draw(self, x: Tensor) -> Drawn:
        H = self.weight_hh.shape[1]
        mask = nn.functional.dropout(x.new_ones(x.shape[1], H), self.p) if self.p else None
        share_h, share_c = (torch.rand(*x.shape[:2], H, device=x.device) < z if z else None for z in self.zoneout)
        return mask, share_h, share_c

    def normalized(self, v: Tensor, of: str) -> Tensor:
        gain, bias = getattr(self, f"weight_ln_{of}"), getattr(self, f"bias_ln_{of}")
        return layer_norm(v, gain.shape, gain, bias)

    def _step(
        self, xg: Tensor, h: Tensor, c: Tensor, mask: Tensor | None, share_h: Tensor | None, share_c: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        of_h = linear(h if mask is None else h * mask, self.weight_hh)
        i, f, g, o = (xg + (self.normalized(of_h, "hh") if self.norm else of_h)).chunk(4, 1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * (self.normalized(new_c, "c") if self.norm else new_c).tanh()
        h = new_h if share_h is None else torch.where(share_h, h, new_h)
        return h, new_c if share_c is None else torch.where(share_c, c, new_c)

    def forward(self, x: Tensor, drawn: Drawn | None = None) -> Tensor:
        mask, share_h, share_c = drawn or self.draw(x)
        xg = linear(x, self.weight_ih)
        xg = (self.normalized(xg, "ih") if self.norm else xg) + (self.bias_ih + self.bias_hh)
        h = c = x.new_zeros(x.shape[1], self.weight_hh.shape[1])
        outputs = []
        for t, step in enumerate(xg.unbind()):
            shares = (None if share is None else share[t] for share in (share_h, share_c))
            h, c = self.step(step, h, c, mask, *shares)
            outputs.append(h)
        return torch.stack(outputs)


def haste(case: VariantCase, x: Tensor) -> Callable[[], Tensor] | None:
    """The output of haste's layer, weights of its own; None where it has none or cannot run."""
    if x.device.type != "cuda" or not importlib.util.find_spec("haste_pytorch"):
        return None
    import haste_pytorch

    H = case.H
    if case.option == "layer_norm":
        module = haste_pytorch.LayerNormLSTM(H, H, batch_first=False)
    elif case.option == "zoneout":
        module = haste_pytorch.LSTM(H, H, batch_first=False, zoneout=0.1)
    else:  # DropConnect on the recurrent weights, the nearest that it has
        module = haste_pytorch.LSTM(H, H, batch_first=False, dropout=0.3)
    module = module.to(x.device).train()
    return lambda: module(x)[0]


def masked_inputs(inputs: LayerInputs, drawn: Drawn) -> LayerInputs:
    """The inputs of one layer with these masks."""
    mask, share_h, share_c = drawn
    steps = None if mask is None else mask[None, None].expand(1, inputs.x.shape[0], *mask.shape).to(inputs.x.dtype)
    share_h, share_c = (None if share is None else share[None] for share in (share_h, share_c))
    return inputs._replace(recurrent_mask=steps, zoneout_h=share_h, zoneout_c=share_c)


@contextmanager
def given_masks(drawn: Drawn) -> Iterator[None]:
    """fastlstm's layers take these masks instead of random ones."""

    def place(self: Masks, inputs: LayerInputs) -> LayerInputs:
        return masked_inputs(inputs, drawn)

    drawn_by_random = Masks.draw
    Masks.draw = place  # type: ignore[method-assign]
    try:
        yield
    finally:
        Masks.draw = drawn_by_random  # type: ignore[method-assign]


def build(case: VariantCase, device: str) -> tuple[dict[str, Step], dict[str, Step], Step]:
    """Training steps that draw their masks; by the same names those with given masks; and the float64 reference's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    lstm, plain = (fastlstm.LSTM(case.H, case.H, **kwargs).to(device) for kwargs in (case.arguments, {}))
    loops = {name: Loop(lstm, compiled).to(device) for name, compiled in (("loop", False), ("compiled loop", True))}
    x = torch.randn(T, B, case.H, device=device)
    drawn = loops["loop"].draw(x)

    def gradients(output: Tensor, module: nn.Module) -> list[Tensor]:
        found = torch.autograd.grad(output.pow(2).mean(), list(module.parameters()))
        if device == "cuda":
            torch.cuda.synchronize()
        return list(found)

    def masked() -> list[Tensor]:
        with given_masks(drawn):
            return gradients(lstm(x)[0], lstm)

    steps: dict[str, Step] = {
        name: lambda loop=loop: gradients(loop(x), loop)  # type: ignore[misc]
        for name, loop in loops.items()
    }
    gate: dict[str, Step] = {
        name: lambda loop=loop: gradients(loop(x, drawn), loop)  # type: ignore[misc]
        for name, loop in loops.items()
    }
    rival = haste(case, x)
    if rival is not None:

        def rival_step() -> list[Tensor]:
            rival().pow(2).mean().backward()
            torch.cuda.synchronize()
            return []

        steps["haste"] = rival_step
    steps["plain"] = lambda: gradients(plain(x)[0], plain)
    steps["fastlstm"] = lambda: gradients(lstm(x)[0], lstm)
    weights = [w.detach().double().requires_grad_() for w in lstm.parameters()]

    def truth() -> list[Tensor]:
        inputs = masked_inputs(LayerInputs(x.double(), None, None, weights), drawn)
        return list(torch.autograd.grad(reference.layer(*inputs)[0].pow(2).mean(), weights))

    return steps, {**gate, "fastlstm": masked}, truth


def cases() -> list[VariantCase]:
    return [VariantCase(option, H) for option in OPTIONS for H in HS]


def chosen(matching: str = "", done: Set[str] = frozenset()) -> list[VariantCase]:
    return [case for case in cases() if matching in case.name and case.name not in done]


def variant_rows(
    suite: str,
    matching: str,
    report: Callable[[str, list[Row]], None],
    budget: float | None,
    wait: float,
    done: Set[str],
    until: float,
) -> Iterator[Row]:
    """Rows of each case: the loops, "plain" (the layer without the option) and fastlstm; "gpu_variants" on a GPU."""
    plan = PLAN if budget is None else Plan(budget=budget, min_rounds=5, patience=4 * budget)
    device = "cuda" if suite == "gpu_variants" else "cpu"
    for case in chosen(matching, done):
        if time.monotonic() > until:
            return
        wait_for_idle(wait)
        rows = _measure(suite, case, plan, device)
        report(case.name, rows)
        yield from rows


def _measure(suite: str, case: VariantCase, plan: Plan, device: str) -> list[Row]:
    steps, gate, truth = build(case, device)
    rows = {name: Row(suite, case.name, "train", name, kind="variant", dtype="float32") for name in steps}
    names = [f"gradient {k}" for k in range(len(truth()))]
    expected, bounds = accuracy.error_bounds(
        lambda: dict(zip(names, truth(), strict=True)),
        accuracy.Precision.of(torch.float32),
        dict.fromkeys(names, T * B),
    )
    for name, row in rows.items():
        row.T, row.B, row.I, row.H, row.L, row.D = T, B, case.H, case.H, 1, 1
        if name not in gate:  # another function: the plain layer, or weights of its own
            continue
        worst = accuracy.compare(dict(zip(names, gate[name](), strict=True)), expected, bounds)[0]
        row.error, row.error_allowed = worst.error, worst.allowed
        if not worst.ok:
            row.status = f"WRONG: {worst}"
    time_steps(steps, rows, "loop", plan)
    times = [rows[name].p50_ms for name in BASELINES if name in rows]
    fastest = min(time for time in times if time is not None)
    for row in rows.values():
        row.ratio = fastest / row.p50_ms if row.p50_ms else None
        row.ratio_rounds = None  # of rounds with the eager loop
    rows["fastlstm"].target = TARGET
    return list(rows.values())
