"""Invalid arguments: error type and message of nn.LSTM at run time; own messages for new arguments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

from ..module_pairs import error_of


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3,), {}),
        ((0, 4), {}),
        ((-1, 4), {}),
        ((3, 0), {}),
        ((3, -2), {}),
        ((3.0, 4), {}),
        ((3, 4.0), {}),
        (("3", 4), {}),
        ((3, 4, 0), {}),
        ((3, 4, -1), {}),
        ((3, 4, 1.5), {}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"bias": None}),
        ((3, 4), {"batch_first": "yes"}),
        ((3, 4), {"batch_first": 1}),
        ((3, 4), {"dropout": -0.1}),
        ((3, 4), {"dropout": 1.1}),
        ((3, 4), {"dropout": True}),
        ((3, 4), {"dropout": "half"}),
        ((3, 4), {"dropout": None}),
        ((3, 4), {"proj_size": -1}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"proj_size": 5}),
        ((3, 4), {"device": "nowhere"}),
        ((3, 4), {"dtype": "float32"}),
        ((3, 4), {"dtype": torch.int64}),
        ((3, 4), {"nonlinearity": "tanh"}),
        ((3, 4), {"hidden_size": 4}),
        ((3, 4, 1, True, False, 0.0, False, 0, None, None, 1), {}),
    ],
    ids=str,
)
def test_constructor(args, kwargs):
    assert error_of(lambda: fastlstm.LSTM(*args, **kwargs)) == error_of(lambda: nn.LSTM(*args, **kwargs))


def test_constructor_warns_of_dropout_with_one_layer():
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        nn.LSTM(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as ours:
        fastlstm.LSTM(3, 4, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlstm.LSTM(3, 4, num_layers=2, dropout=0.5)


def states(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


def packed(*shape: int) -> Any:
    return pack_padded_sequence(torch.zeros(shape), torch.tensor([2, 1]))


X = torch.zeros(5, 2, 3)  # T = 5, B = 2, I = 3; H = 4
CALLS = {
    "no argument": ({}, ()),
    "0-D input": ({}, (torch.zeros(()),)),
    "1-D input": ({}, (torch.zeros(3),)),
    "4-D input": ({}, (torch.zeros(1, 5, 2, 3),)),
    "no tensor": ({}, ([[[0.0] * 3]],)),
    "wrong input size": ({}, (torch.zeros(5, 2, 4),)),
    "wrong input size unbatched": ({}, (torch.zeros(5, 4),)),
    "wrong input size batch_first": ({"batch_first": True}, (torch.zeros(2, 5, 4),)),
    "float64 input": ({}, (X.double(),)),
    "float64 input with hx": ({}, (X.double(), states((1, 2, 4), (1, 2, 4)))),
    "float64 input unbatched": ({}, (X[:, 0].double(),)),
    "int64 input": ({}, (X.long(),)),
    "bfloat16 input": ({}, (X.bfloat16(),)),
    "float32 input to bfloat16": ({"dtype": torch.bfloat16}, (X,)),
    "T = 0": ({}, (X[:0],)),
    "T = 0 batch_first": ({"batch_first": True}, (X.transpose(0, 1)[:, :0],)),
    "T = 0 unbatched": ({}, (X[:0, 0],)),
    "T = 0 with hx": ({}, (X[:0], states((1, 2, 4), (1, 2, 4)))),
    "T = 0 bidirectional layers": ({"bidirectional": True, "num_layers": 2}, (X[:0],)),
    "hx[0] wrong batch": ({}, (X, states((1, 3, 4), (1, 2, 4)))),
    "hx[1] wrong batch": ({}, (X, states((1, 2, 4), (1, 3, 4)))),
    "hx[0] wrong size": ({}, (X, states((1, 2, 5), (1, 2, 4)))),
    "hx[1] wrong size": ({}, (X, states((1, 2, 4), (1, 2, 5)))),
    "hx[0] wrong layers": ({}, (X, states((2, 2, 4), (1, 2, 4)))),
    "hx[1] wrong layers": ({"num_layers": 2}, (X, states((2, 2, 4), (1, 2, 4)))),
    "hx of one direction": ({"bidirectional": True}, (X, states((1, 2, 4), (1, 2, 4)))),
    "hx batch first": ({"batch_first": True}, (X.transpose(0, 1), states((2, 1, 4), (2, 1, 4)))),
    "hx[0] without projection": ({"proj_size": 2}, (X, states((1, 2, 4), (1, 2, 4)))),
    "hx[1] with projection": ({"proj_size": 2}, (X, states((1, 2, 2), (1, 2, 2)))),
    "hx 2-D, input batched": ({}, (X, states((2, 4), (2, 4)))),
    "hx[1] 2-D, input batched": ({}, (X, states((1, 2, 4), (2, 4)))),
    "hx 3-D, input unbatched": ({}, (X[:, 0], states((1, 1, 4), (1, 1, 4)))),
    "hx[0] 3-D, input unbatched": ({}, (X[:, 0], states((1, 1, 4), (1, 4)))),
    "hx wrong size unbatched": ({}, (X[:, 0], states((1, 5), (1, 4)))),
    "hx of one tensor": ({}, (X, states((1, 2, 4)))),
    "hx of three tensors": ({}, (X, states((1, 2, 4), (1, 2, 4), (1, 2, 4)))),
    "hx empty": ({}, (X, ())),
    "hx a tensor": ({}, (X, torch.zeros(1, 2, 4))),
    "hx a tensor of two": ({}, (X, torch.zeros(2, 2, 4))),
    "hx of None": ({}, (X, (None, None))),
    "hx a number": ({}, (X, 0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(name, backend):
    kwargs, args = CALLS[name]
    ours, theirs = fastlstm.LSTM(3, 4, **kwargs), nn.LSTM(3, 4, **kwargs)
    assert error_of(lambda: ours(*args)) == error_of(lambda: theirs(*args))


@pytest.mark.parametrize("model", [nn.LSTM(3, 4), fastlstm.LSTM(3, 4)], ids=["nn.LSTM", "fastlstm.LSTM"])
def test_hx_stacked_in_one_tensor(model):
    with pytest.raises(TypeError):
        model(X, torch.zeros(2, 1, 2, 4))


def test_forward_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'hidden'"):
        fastlstm.LSTM(3, 4)(X, hidden=None)


@pytest.mark.parametrize("x", [torch.zeros(2, 2, 4), torch.zeros(2, 2, 3).double()], ids=["size", "dtype"])
def test_packed_and_padded_inputs_have_equal_errors(x):
    """nn.LSTM raises a RuntimeError about an internal matrix product."""
    packed_input = pack_padded_sequence(x, torch.tensor([2, 1]))
    kind, text = error_of(lambda: fastlstm.LSTM(3, 4)(packed_input))
    assert text == error_of(lambda: nn.LSTM(3, 4)(x))[1]
    assert kind is error_of(lambda: nn.LSTM(3, 4)(packed_input))[0] is RuntimeError


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h, c: (h[:, :1], c), r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 1, 4\]"),
        (lambda h, c: (h, c[..., :3]), r"Expected hidden\[1\] size \(1, 2, 4\), got \[1, 2, 3\]"),
        (lambda h, c: (h[None], c[None]), r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 1, 2, 4\]"),
    ],
)
def test_packed_input_with_wrong_hx(change, text, backend):
    """nn.LSTM reads out of bounds."""
    with pytest.raises(RuntimeError, match=text):
        fastlstm.LSTM(3, 4)(packed(2, 2, 3), change(*states((1, 2, 4), (1, 2, 4))))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_hx_of_another_dtype(which, dtype, backend):
    """nn.LSTM's message comes from oneDNN's internals."""
    hx = list(states((1, 2, 4), (1, 2, 4)))
    hx[which] = hx[which].to(dtype)
    with pytest.raises(RuntimeError, match=f"must have the same dtype, got torch.float32 and {dtype}"):
        fastlstm.LSTM(3, 4)(X, tuple(hx))


def test_tensors_on_different_devices():
    lstm = fastlstm.LSTM(3, 4)
    hx = (torch.zeros(1, 2, 4, device="meta"), torch.zeros(1, 2, 4))
    assert error_of(lambda: lstm(X, hx)) == error_of(lambda: nn.LSTM(3, 4)(X, hx))
    assert error_of(lambda: lstm(X.to("meta"))) == error_of(lambda: nn.LSTM(3, 4)(X.to("meta")))
    assert error_of(lambda: lstm.to("meta")(X)) == error_of(lambda: nn.LSTM(3, 4, device="meta")(X))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("weight_ih_l0", torch.zeros(16, 4), r"weight_ih must be .*\[16, 3\], got \[16, 4\]"),
        ("weight_hh_l0", torch.zeros(12, 4), r"weight_hh must be .*\[16, 4\], got \[12, 4\]"),
        ("bias_ih_l0", torch.zeros(15), r"bias_ih must be .*\[16\], got \[15\]"),
        ("bias_hh_l0", torch.zeros(17), r"bias_hh must be .*\[16\], got \[17\]"),
        (
            "weight_hh_l0",
            torch.zeros(16, 4, dtype=torch.float64),
            r"same dtype, got torch\.float32 and|must be Float on",
        ),
    ],
)
def test_weights_of_invalid_shape(name, value, text, backend):
    lstm = fastlstm.LSTM(3, 4)
    setattr(lstm, name, nn.Parameter(value))
    with pytest.raises(RuntimeError, match=text):
        lstm(X)


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([1], ValueError, r"lengths must be \[B\] = \[2\], got \[1\]"),
        ([1, 2, 3], ValueError, r"lengths must be \[B\] = \[2\], got \[3\]"),
        ([[1, 2]], ValueError, r"lengths must be \[B\] = \[2\], got \[1, 2\]"),
        (3, ValueError, r"lengths must be \[B\] = \[2\], got \[\]"),
        ([], ValueError, r"lengths must be \[B\] = \[2\], got \[0\]"),
        ([1, 6], ValueError, r"lengths must lie in \[0, T=5\], got 6 in row 1"),
        ([-1, 5], ValueError, r"lengths must lie in \[0, T=5\], got -1 in row 0"),
        (torch.tensor([7, 2]), ValueError, r"lengths must lie in \[0, T=5\], got 7 in row 0"),
        ([1.0, 2.0], TypeError, "lengths must be integers, got torch.float32"),
        (torch.tensor([1.0, 2.0]).double(), TypeError, "lengths must be integers, got torch.float64"),
        ([True, False], TypeError, "lengths must be integers, got torch.bool"),
    ],
)
def test_lengths(lengths, error, text):
    with pytest.raises(error, match=text):
        fastlstm.LSTM(3, 4)(X, lengths=lengths)


@pytest.mark.parametrize(
    ("batch_first", "reset_mask", "error", "text"),
    [
        (
            False,
            torch.zeros(2, 5, dtype=torch.bool),
            ValueError,
            r"reset_mask must be \[T, B\] = \[5, 2\], got \[2, 5\]",
        ),
        (
            True,
            torch.zeros(5, 2, dtype=torch.bool),
            ValueError,
            r"reset_mask must be \[B, T\] = \[2, 5\], got \[5, 2\]",
        ),
        (False, torch.zeros(5, dtype=torch.bool), ValueError, r"reset_mask must be \[T, B\] = \[5, 2\], got \[5\]"),
        (False, torch.zeros(5, 2), TypeError, "reset_mask must be a tensor of torch.bool, got torch.float32"),
        (False, torch.zeros(5, 2, dtype=torch.uint8), TypeError, "must be a tensor of torch.bool, got torch.uint8"),
        (False, [[False] * 2] * 5, TypeError, "reset_mask must be a tensor of torch.bool, got list"),
        (
            False,
            torch.zeros(5, 2, dtype=torch.bool, device="meta"),
            ValueError,
            "reset_mask must be on the input's device cpu, got meta",
        ),
    ],
)
def test_reset_mask(batch_first, reset_mask, error, text):
    x = X.transpose(0, 1) if batch_first else X
    with pytest.raises(error, match=text):
        fastlstm.LSTM(3, 4, batch_first=batch_first)(x, reset_mask=reset_mask)


def test_lengths_and_reset_mask_unbatched():
    lstm = fastlstm.LSTM(3, 4)
    with pytest.raises(ValueError, match="lengths must"):
        lstm(X[:, 0], lengths=[1, 2])
    with pytest.raises(ValueError, match="lengths must lie in"):
        lstm(X[:, 0], lengths=6)
    with pytest.raises(ValueError, match="reset_mask must be"):
        lstm(X[:, 0], reset_mask=torch.zeros(4, dtype=torch.bool))


def test_lengths_and_reset_mask_with_a_packed_sequence():
    lstm = fastlstm.LSTM(3, 4)
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence, got list"):
        lstm(packed(2, 2, 3), lengths=[2, 1])
    with pytest.raises(ValueError, match="reset_mask must be None with a PackedSequence, got Tensor"):
        lstm(packed(2, 2, 3), reset_mask=torch.zeros(2, 2, dtype=torch.bool))


# A weight's index and its replacement, or a change of the list; and the error message.
MISFITS = {
    "size": (3, lambda w: w[:-1], r"bias_hh must be \[4H\] = \[16\], got \[15\]"),
    "dimensions": (3, torch.sum, r"bias_hh must be \[4H\] = \[16\], got \[\]"),
    "dtype": (1, torch.Tensor.float, "must have the same dtype, got torch.float64 and torch.float32"),
    "device": (1, lambda w: w.to("meta"), "tensors are not at the same device, found input tensor at cpu"),
    "order": (None, lambda ws: [ws[0], ws[3], ws[2], ws[1]], "weights must begin with weight_ih"),
    "number": (None, lambda ws: [*ws, ws[0]], "weights must be 4 tensors for each of 1 or 2 directions, got 5"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("wrong", MISFITS)
def test_weights_of_inconsistent_shapes(wrong, grad, backend):
    """Messages are equal on every backend, from the function and from a module with replaced weights."""
    place, change, text = MISFITS[wrong]
    lstm = fastlstm.LSTM(3, 4, dtype=torch.float64)
    weights = [w.detach() for w in lstm.parameters()]
    if place is None:
        weights = change(weights)
    else:
        weights[place] = change(weights[place])
    x = X.double().requires_grad_(grad)
    with pytest.raises(RuntimeError, match=text):
        fastlstm.functional.lstm(x, None, weights, True, 1, 0.0, True, False, False)
    if place is not None:
        for name, weight in zip(list(lstm._parameters), weights, strict=True):
            setattr(lstm, name, nn.Parameter(weight))
        with pytest.raises(RuntimeError, match=text):
            lstm(x)


# A change of a layer's weights [w_ih, w_hh], the arguments bias, num_layers, bidirectional, and the error.
MISCOUNTED = {
    "none": (lambda w: [], (False, 1, False), "take 2 weights each, or 3 with projection, got 0 in all"),
    "one direction twice": (lambda w: w * 2, (True, 1, False), "must have bias_ih .* as element 2"),
    "one direction twice in the second layer": (
        lambda w: [*w, *[v[:, 0] for v in w], *w * 2],
        (True, 2, False),
        "must have bias_ih .* as element 6",
    ),
    "biases as a direction": (lambda w: [*w, *w[0][:, :2].T], (False, 1, True), "must have no bias as element 2"),
    "a direction short": (lambda w: w, (False, 1, True), "take 4 weights each, or 6 with projection, got 2 in all"),
    "a weight short": (lambda w: w[:1], (False, 1, False), "take 2 weights each, or 3 with projection, got 1 in all"),
    "no layer": (lambda w: [], (False, 0, False), "num_layers must be at least 1, got 0"),
    "None": (lambda w: [w[0], None], (False, 1, False), "expected Tensor as element 1 in weights, but got NoneType"),
}


@pytest.mark.parametrize("wrong", MISCOUNTED)
def test_weights_that_contradict_the_arguments(wrong, backend):
    change, (bias, layers, bidirectional), text = MISCOUNTED[wrong]
    weights = change([torch.rand(16, 3), torch.rand(16, 4)])
    with pytest.raises(TypeError if wrong == "None" else RuntimeError, match=text):
        fastlstm.functional.lstm(X, None, weights, bias, layers, 0.0, True, bidirectional, False)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"return_cell_states": True}], ids=str)
def test_function_refuses_packed_sequences(options, backend):
    """The native op accepts them, and these lengths would match."""
    weights = [w.detach() for w in fastlstm.LSTM(3, 4).parameters()]
    for x in (torch.zeros(6, 3), torch.zeros(6, 3).t()):
        with pytest.raises(RuntimeError, match=r"x must be \[T, B, I\], got \["):
            fastlstm.functional.lstm(
                x, None, weights, True, 1, 0.0, True, False, x.shape[0] == 3, lengths=[2, 2, 2], **options
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_with_float32_weights_is_refused(dtype, backend):
    """Also on backends that compute half precision in float32, where a cast would hide the mismatch."""
    weights = [w.detach() for w in fastlstm.LSTM(3, 4, dtype=torch.float64).parameters()]
    with pytest.raises(RuntimeError, match=r"same dtype|must be .* as x is"):
        fastlstm.functional.lstm(torch.zeros(2, 1, 3, dtype=dtype), None, weights, True, 1, 0.0, True, False, False)
