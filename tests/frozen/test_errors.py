"""Invalid arguments of frozen modules: nn.LSTM's error types and messages."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm.backends import native

from ..module.test_error_types import CELL_STATES, INPUTS, STATES, X, packed
from ..module.test_errors import CALLS
from ..module_pairs import error_of
from .forms import NO_EXTENSION, WEIGHTS

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

EACH_FORM = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
# Calls that are no error: the results of the forms differ.
VALID = {"none", "of two", "in a list"}


def comparable(error: tuple[type, str]) -> tuple[type, str]:
    """Equal for a wrong dtype of the input, of which frozen layers have a text of their own."""
    cls, text = error
    text = text.replace("FrozenLSTM", "LSTM")
    return (cls, "Input dtype") if re.search("(RNN i|I)nput dtype .* does not match", text) else (cls, text)


@EACH_FORM
@pytest.mark.parametrize("name", CALLS)
def test_messages(name, weights):
    kwargs, args = CALLS[name]
    if kwargs.get("dtype") == torch.bfloat16 and weights is not None:
        weights = None
    frozen, theirs = fastlstm.freeze(fastlstm.LSTM(3, 4, **kwargs), weights), nn.LSTM(3, 4, **kwargs)
    assert comparable(error_of(lambda: frozen(*args))) == comparable(error_of(lambda: theirs(*args)))


def pair(weights: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
    """(frozen, unfrozen) of equal weights."""
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 4)
    ours = fastlstm.LSTM(3, 4)
    ours.load_state_dict(theirs.state_dict())
    return fastlstm.freeze(ours, weights), theirs


def kind(call: Any) -> type | None:
    """The type of the error, None if there is none."""
    try:
        call()
    except Exception as error:
        return RuntimeError if isinstance(error, NotImplementedError) else type(error)
    return None


@EACH_FORM
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed, unsorted"])
def test_states(form, weights):
    """Every wrong hx raises the type of error that nn.LSTM's does."""
    ours, theirs = pair(weights)
    for name, hx in STATES.items():
        if name in VALID:
            continue
        if form == "unbatched" and isinstance(hx, tuple) and all(isinstance(t, Tensor) and t.dim() > 1 for t in hx):
            hx = tuple(t[:, 0] for t in hx)
        x = {"padded": X, "unbatched": X[:, 0]}.get(form)
        x = packed(X, form == "packed") if x is None else x
        assert kind(lambda x=x, hx=hx: ours(x, hx)) == kind(lambda x=x, hx=hx: theirs(x, hx)), name


@EACH_FORM
@pytest.mark.parametrize("hx", [None, (torch.ones(1, 2, 4), torch.ones(1, 2, 4))], ids=["zeros", "hx"])
def test_inputs(hx, weights):
    ours, theirs = pair(weights)
    for name, x in INPUTS.items():
        assert kind(lambda x=x: ours(x, hx)) == kind(lambda x=x: theirs(x, hx)), name


@EACH_FORM
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_cells(batched, weights):
    torch.manual_seed(0)
    ours, theirs = fastlstm.freeze(fastlstm.LSTMCell(3, 4), weights), nn.LSTMCell(3, 4)
    x = X[0] if batched else X[0, 0]
    for name, hx in CELL_STATES.items():
        assert kind(lambda hx=hx: ours(x, hx)) == kind(lambda hx=hx: theirs(x, hx)), name
    wrong = {
        "I": torch.zeros(*x.shape[:-1], 4),
        "3-D": torch.zeros(2, 2, 3),
        "0-D": torch.zeros(()),
        "float64": x.double(),
        "int64": x.long(),
        "no tensor": [1.0, 2.0, 3.0],
        "nothing": None,
    }
    for name, value in wrong.items():
        assert kind(lambda value=value: ours(value)) == kind(lambda value=value: theirs(value)), name
        assert kind(lambda value=value: ours(value)) is not None, name


@EACH_FORM
def test_options_beyond_nn_lstm(weights):
    """Messages equal those of the unfrozen module."""
    ours, theirs = fastlstm.freeze(fastlstm.LSTM(3, 4), weights), fastlstm.LSTM(3, 4)
    mask = torch.zeros(5, 2, dtype=torch.bool)
    in_order = pack_padded_sequence(X, torch.tensor([5, 2]))
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "lengths too long": (X, {"lengths": [6, 1]}),
        "lengths negative": (X, {"lengths": torch.tensor([5, -1])}),
        "lengths of three": (X, {"lengths": [5, 5, 5]}),
        "lengths a number": (X, {"lengths": 5}),
        "lengths 2-D": (X, {"lengths": torch.ones(1, 2, dtype=torch.int64)}),
        "lengths float": (X, {"lengths": torch.tensor([5.0, 1.0])}),
        "mask of int64": (X, {"reset_mask": mask.long()}),
        "mask of another shape": (X, {"reset_mask": mask.t()}),
        "mask a list": (X, {"reset_mask": mask.tolist()}),
        "mask elsewhere": (X, {"reset_mask": mask.to("meta")}),
        "lengths of a PackedSequence": (in_order, {"lengths": [5, 2]}),
        "mask of a PackedSequence": (in_order, {"reset_mask": mask}),
        "unknown argument": (X, {"hidden": None}),
        "T = 0": (X[:0], {"lengths": [0, 0]}),
        "wrong I": (torch.zeros(5, 2, 4), {"lengths": [5, 2]}),
        "wrong dtype": (X.double(), {"lengths": [5, 2]}),
        "wrong dtype of cells": (X.double(), {"return_cell_states": True}),
    }
    for name, (x, options) in calls.items():
        errors = [error_of(lambda m=m, x=x, options=options: m(x, **options)) for m in (ours, theirs)]
        assert comparable(errors[0]) == comparable(errors[1]), name


def test_dtype_after_a_conversion():
    """The text says that a conversion of the model does not reach frozen layers."""
    lstm, cell = fastlstm.freeze(fastlstm.LSTM(3, 4)).double(), fastlstm.freeze(fastlstm.LSTMCell(3, 4)).double()
    text = (
        r"Input dtype \(torch\.float64\) does not match the dtype of the frozen layer \(torch\.float32\), which is "
        r"fixed: convert the input, or thaw, convert and freeze the model"
    )
    x, h = X.double(), torch.zeros(1, 2, 4).double()
    calls: dict[str, tuple[Any, type[Exception]]] = {
        "lstm": (lambda: lstm(x), ValueError),
        "with states": (lambda: lstm(x, (h, h)), ValueError),
        "lengths": (lambda: lstm(x, lengths=[5, 2]), ValueError),
        "packed": (lambda: lstm(packed(x, True)), RuntimeError),
        "cell": (lambda: cell(x[0]), RuntimeError),
        "cell with states": (lambda: cell(x[0], (h[0], h[0])), RuntimeError),
        "unbatched cell": (lambda: cell(x[0, 0]), RuntimeError),
    }
    for name, (call, error) in calls.items():
        with pytest.raises(error, match=text):
            pytest.fail(f"{name}: {call()}")


def test_input_elsewhere():
    lstm, cell = fastlstm.freeze(fastlstm.LSTM(3, 4)), fastlstm.freeze(fastlstm.LSTMCell(3, 4))
    for call in (lambda: lstm(X.to("meta")), lambda: cell(X[0].to("meta"))):
        with pytest.raises(RuntimeError, match=r"runs on cpu, got input on meta: call fastlstm\.thaw\(model\)"):
            call()


def op(x: Tensor, packed_weights: Tensor, sizes: tuple[int, int, int] = (4, 4, 1), **options: Tensor) -> Any:
    names = ("h0", "c0", "lengths", "reset_mask")
    h0, c0, lengths, reset_mask = (options.get(name) for name in names)
    return torch.ops.fastlstm.frozen_layer(x, h0, c0, packed_weights, sizes, lengths, reset_mask, False)


def test_op():
    """Bytes that are none of a frozen layer, and arguments that do not fit them, raise and do not crash."""
    lstm = fastlstm.freeze(fastlstm.LSTM(3, 4), torch.int8)
    weights = lstm.packed_l0
    expected = lstm(X)[0]
    assert torch.equal(op(X, weights)[0], expected)
    broken = {f"byte {k}": weights.clone() for k in (0, 7, 16, 24, 32, 40, 48, 56, 64, 72, 80)}
    for name, bytes_of_layer in broken.items():
        bytes_of_layer[int(name.split()[1])] ^= 0x55
    broken |= {
        "empty": weights[:0],
        "a header": weights[:128],
        "shorter": weights[:-1],
        "longer": torch.cat([weights, weights[:64]]),
        "2-D": weights.view(1, -1),
        "strided": torch.stack([weights, weights], 1)[:, 0],
        "int8": weights.view(torch.int8),
        "zeros": torch.zeros_like(weights),
    }
    for name, bytes_of_layer in broken.items():
        with pytest.raises(RuntimeError, match="packed must be the bytes of a frozen layer"):
            pytest.fail(f"{name}: {op(X, bytes_of_layer)}")
        with pytest.raises(RuntimeError, match="packed must be the bytes of a frozen layer"):
            pytest.fail(f"{name}: {native.extension.unpack_layer(bytes_of_layer)}")
    wrong = {
        "sizes": lambda: op(X, weights, (4, 4, 2)),
        "I": lambda: op(torch.zeros(5, 2, 4), weights),
        "dtype": lambda: op(X.double(), weights),
        "dims": lambda: op(X[0], weights),
        "h0": lambda: op(X, weights, h0=torch.zeros(1, 3, 4)),
        "c0": lambda: op(X, weights, c0=torch.zeros(1, 2, 4).double()),
        "lengths": lambda: op(X, weights, lengths=torch.tensor([6, 0])),
        "dtype of lengths": lambda: op(X, weights, lengths=torch.tensor([5, 0]).int()),
        "reset_mask": lambda: op(X, weights, reset_mask=torch.zeros(2, 5, dtype=torch.bool)),
        "T = 0": lambda: op(X[:0], weights),
    }
    for name, call in wrong.items():
        with pytest.raises((RuntimeError, ValueError), match=r"must|larger than 0"):
            pytest.fail(f"{name}: {call()}")


def header(**changes: int) -> bytes:
    """The header of float32 weights of one direction, H = I = 2 (csrc/cpu/packed.h), with some fields changed."""
    names = ("magic", "dtype", "frozen", "layout", "width", "group", "I", "H", "P", "D", "bias")
    packed = native.extension.pack_layer(torch.float32, "stored", [torch.zeros(8, 2), torch.zeros(8, 2)], [])
    fields = dict(zip(names, struct.unpack("<11q", packed[:88].numpy().tobytes()), strict=True))
    return struct.pack("<16q", *(fields | changes).values(), *([0] * 5))


@pytest.mark.parametrize(
    ("what", "changes", "body"),
    [
        ("tiles without input features", {"dtype": 15, "layout": 2, "width": 16, "I": 0}, 1 << 12),
        ("tiles of float32", {"layout": 2, "width": 16}, 1 << 13),
        ("int8 blocks of stored weights", {"layout": 3}, 1 << 13),
        # The number of bytes of these overflows to a small one.
        ("sizes beyond all memory", {"I": 1 << 31, "H": 1 << 31, "P": 1 << 31}, 1 << 13),
        ("no direction", {"D": 0}, 0),
        ("a width of 0", {"width": 0}, 1 << 13),
    ],
)
def test_headers_that_fit_no_layer(what, changes, body):
    """No length of the bytes makes them a layer."""
    for length in range(body, body + 4096, 64):
        packed = torch.frombuffer(bytearray(header(**changes) + bytes(length)), dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="packed must be the bytes of a frozen layer"):
            native.extension.unpack_layer(packed)
