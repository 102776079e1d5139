"""Arguments that nn.LSTM and nn.LSTMCell refuse: fastlstm raises the same type of error, packed or not.

Calls by which nn.LSTM reads out of bounds are in tests/module/test_errors.py, and states of another dtype, with which
it computes in part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

X = torch.linspace(-1, 1, 30).view(5, 2, 3)  # T = 5, B = 2, I = 3; H = 4
SIZES = torch.tensor([2, 2, 1, 1, 1])
DTYPES = (torch.float64, torch.int64, torch.bfloat16, torch.float16, torch.bool, torch.complex64)


def state(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return state(*shape), state(*shape)


GOOD = state(1, 2, 4)
# Calls with packed and padded input. Those that are no error run in both, with equal results.
STATES: dict[str, Any] = {
    "none": None,
    "of two": pair(1, 2, 4),
    "in a list": list(pair(1, 2, 4)),
    "2-D": pair(2, 4),
    "h 2-D": (state(2, 4), GOOD),
    "c 2-D": (GOOD, state(2, 4)),
    "1-D": pair(4),
    "0-D": pair(),
    "h of more rows": (state(1, 3, 4), GOOD),
    "c of more rows": (GOOD, state(1, 3, 4)),
    "both of more rows": pair(1, 3, 4),
    "both of fewer rows": pair(1, 1, 4),
    "h of another width": (state(1, 2, 5), GOOD),
    "c of another width": (GOOD, state(1, 2, 5)),
    "both of another width": pair(1, 2, 5),
    "both of more layers": pair(2, 2, 4),
    "both of no layer": pair(0, 2, 4),
    "of one": (GOOD,),
    "of three": (GOOD, GOOD, GOOD),
    "of nothing": (),
    "a tensor": GOOD,
    "a tensor of two states without rows": state(2, 4),
    "a tensor of two 2-D states": state(2, 2, 4),
    "a tensor of two states": state(2, 1, 2, 4),
    "nothing twice": (None, None),
    "h nothing": (None, GOOD),
    "c nothing": (GOOD, None),
    "a number": 0,
    "a string": "hx",
    "a dict": {"h": GOOD},
    "numbers": (1, 2),
    "lists": (GOOD.tolist(), GOOD.tolist()),
    "h elsewhere": (GOOD.to("meta"), GOOD),
    "both elsewhere": (GOOD.to("meta"), GOOD.to("meta")),
    **{f"h {dtype}": (GOOD.to(dtype), GOOD) for dtype in DTYPES},
    **{f"both {dtype}": (GOOD.to(dtype), GOOD.to(dtype)) for dtype in DTYPES},
}


def packed(x: torch.Tensor, is_sorted: bool = True) -> PackedSequence:
    lengths = torch.tensor([5, 2] if is_sorted else [2, 5])
    return pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)


def outcome(call: Callable[[], Any]) -> Any:
    """The type of the error, or the results."""
    try:
        output, (h, c) = call()
    except Exception as error:
        # torch raises a subclass if a backend has no kernel.
        return RuntimeError if isinstance(error, NotImplementedError) else type(error)
    return (output.data if isinstance(output, PackedSequence) else output), h, c


def assert_same_outcome(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    mine, yours = outcome(ours), outcome(theirs)
    if isinstance(mine, type) or isinstance(yours, type):
        assert mine is yours
    else:
        torch.testing.assert_close(mine, yours)


def modules(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = fastlstm.LSTM(3, 4, **kwargs), nn.LSTM(3, 4, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed, unsorted"])
@pytest.mark.parametrize("name", STATES)
def test_states(name, form, backend):
    hx, ours_theirs = STATES[name], modules()
    if form == "unbatched" and isinstance(hx, tuple) and all(isinstance(t, torch.Tensor) and t.dim() > 1 for t in hx):
        hx = tuple(t[:, 0] for t in hx)
    x = {"padded": X, "unbatched": X[:, 0]}.get(form)
    x = packed(X, form == "packed") if x is None else x
    assert_same_outcome(*(lambda m=m: m(x, hx) for m in ours_theirs))


def sequence(data: torch.Tensor, sizes: torch.Tensor = SIZES, *order: torch.Tensor) -> PackedSequence:
    return PackedSequence(data, sizes, *order)


ROWS = torch.zeros(7, 3)
INPUTS: dict[str, Any] = {
    **{f"packed {dtype}": packed(X.to(dtype)) for dtype in DTYPES},
    **{f"packed, unsorted, {dtype}": packed(X.to(dtype), False) for dtype in DTYPES},
    **{f"padded {dtype}": X.to(dtype) for dtype in DTYPES},
    **{f"unbatched {dtype}": X[:, 0].to(dtype) for dtype in DTYPES},
    **{f"packed I={n}": sequence(torch.zeros(7, n)) for n in (0, 1, 4)},
    **{f"padded I={n}": torch.zeros(5, 2, n) for n in (0, 1, 4)},
    "packed 1-D": sequence(torch.zeros(7)),
    "packed 3-D": sequence(torch.zeros(7, 1, 3)),
    "packed without steps": sequence(ROWS[:0], SIZES[:0]),
    "more steps than rows": sequence(ROWS, torch.full((5,), 2)),
    "sizes of one number": sequence(ROWS, torch.tensor(7)),
    "sizes in int32": sequence(ROWS, SIZES.int()),
    "order beyond the rows": sequence(ROWS, SIZES, torch.tensor([0, 5]), torch.tensor([0, 5])),
    "packed elsewhere": sequence(ROWS.to("meta")),
    "elsewhere": X.to("meta"),
    "T = 0": X[:0],
    "nothing": None,
    "a list": X.tolist(),
    "a tuple": (X, X),
    "an array": X.numpy(),
}


@pytest.mark.parametrize("hx", [None, pair(1, 2, 4)], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name, hx, backend):
    assert_same_outcome(*(lambda m=m: m(INPUTS[name], hx) for m in modules()))


@pytest.mark.parametrize("hx", [None, pair(1, 2, 4)], ids=["zeros", "hx"])
@pytest.mark.parametrize("sizes", [SIZES.float(), SIZES[None]], ids=["float32", "2-D"])
def test_invalid_batch_sizes(sizes, hx, backend):
    """nn.LSTM's error depends on hx: a TypeError, or a RuntimeError from its internals."""
    with pytest.raises(RuntimeError, match=r"batch_sizes must be int64 \[T\], got torch\."):
        fastlstm.LSTM(3, 4)(sequence(ROWS, sizes), hx)
    # From 2-D sizes and with hx torch 2.11 computes something.
    if not (torch.__version__.startswith("2.11.") and sizes.dim() == 2 and hx is not None):
        with pytest.raises((RuntimeError, TypeError)):
            nn.LSTM(3, 4)(sequence(ROWS, sizes), hx)


@pytest.mark.parametrize("kwargs", [{"proj_size": 2}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", ["2-D", "1-D", "of one", "nothing twice", "a tensor of two states", "a number"])
def test_states_of_other_layers_with_packed_input(name, kwargs, backend):
    ours, theirs = modules(**kwargs)
    assert_same_outcome(lambda: ours(packed(X), STATES[name]), lambda: theirs(packed(X), STATES[name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["2-D", "of one", "nothing twice", "a tensor of two states"])
def test_state_is_checked_before_the_input(name, dtype):
    x = packed(X.to(dtype))
    assert_same_outcome(*(lambda m=m: m(x, STATES[name]) for m in modules()))


@pytest.mark.parametrize(
    ("name", "is_sorted"),
    [("2-D", True), ("1-D", True), ("of one", True), ("nothing twice", True), ("a dict", False), ("numbers", False)],
)
def test_error_messages_of_packed_input(name, is_sorted):
    """Messages equal nn.LSTM's where those name the argument."""
    raised = []
    for module in modules():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            module(packed(X, is_sorted), STATES[name])
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


CELL_STATES = {name: hx for name, hx in STATES.items() if not name.startswith(("h ", "both of", "c of"))} | {
    "rows": pair(2, 4),
    "no rows": pair(4),
    "more rows": pair(3, 4),
    "another width": pair(2, 5),
    "another width of h": (state(2, 5), state(2, 4)),
    "another width of c": (state(2, 4), state(2, 5)),
    **{f"h {dtype}": (state(2, 4).to(dtype), state(2, 4)) for dtype in DTYPES},
}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", CELL_STATES)
def test_cells(name, batched, backend):
    ours, theirs = fastlstm.LSTMCell(3, 4), nn.LSTMCell(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = X[0] if batched else X[0, 0]
    assert_same_outcome(*(lambda m=m: ((r := m(x, CELL_STATES[name]))[0], r) for m in (ours, theirs)))
