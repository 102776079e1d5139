"""The fast path: which LSTM and LSTMCell calls the extension runs (csrc/fast_path.cpp), and which it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import fastlstm
from fastlstm import dispatch
from fastlstm.backends import native

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.load_error)


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def interposed(x):
    """Inputs that require Python: a class with __torch_function__, x under a mode, x with a tangent."""
    yield x.as_subclass(Subclass)
    with Mode():
        yield x
    with forward_ad.dual_level():
        yield forward_ad.make_dual(x, torch.ones_like(x))


def lstm_takes_it(lstm: fastlstm.LSTM, *arguments: Any) -> bool:
    """Returns true if the extension runs the call; otherwise dispatch gives the weights for the general path."""
    result, weights = dispatch.fast_path(lstm, "lstm", "frozen_lstm", *arguments, None)
    assert result is not None or weights is not None
    return result is not None


def cell_takes_it(cell: fastlstm.LSTMCell, *arguments: Any) -> bool:
    result, weights = dispatch.fast_path(cell, "lstm_cell", None, *arguments)
    assert result is not None or weights is not None
    return result is not None


def test_fast_path_runs_only_what_native_would(monkeypatch):
    """The fast path skips the choice of a backend, so it runs only if every layer's choice would be native."""
    lstm, x = fastlstm.LSTM(3, 4, 2), torch.rand(5, 2, 3)
    taken = {}
    for name in dispatch.NAMES:
        with fastlstm.use_backend(name):
            taken[name] = lstm_takes_it(lstm, x, None)
    assert taken == {name: name in ("auto", "native") for name in dispatch.NAMES}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not lstm_takes_it(lstm, x, None)
    h0 = torch.zeros(2, 2, 4)
    assert lstm_takes_it(lstm, x, (h0, h0))
    refused_states = {
        "too few layers": (h0[:1], h0),
        "c0 in float64": (h0, h0.double()),
        "h0 alone": (h0,),
        "c0 None": (h0, None),
        "list": [h0, h0],
        "tensor": h0,
    }
    for name, hx in refused_states.items():
        assert not lstm_takes_it(lstm, x, hx), name
    refused_inputs = {
        "2-D": x[0],
        "float64": x.double(),
        "size": x[..., :2],
        "T = 0": x[:0],
        "meta": x.to("meta"),
        "int64": x.long(),
        "list": [1.0],
    }
    for name, other in refused_inputs.items():
        assert not lstm_takes_it(lstm, other, None), name
    torch.func.vmap(lambda x: taken.update(vmap=lstm_takes_it(lstm, x, None)) or x)(x[None])
    assert taken["vmap"] is False
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not lstm_takes_it(lstm, mode.from_tensor(x), None)
    for own in interposed(x):
        assert not lstm_takes_it(lstm, own, None)
    assert lstm_takes_it(lstm, x, None)
    monkeypatch.setattr(native, "extension", None)
    assert not lstm_takes_it(lstm, x, None)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("input_size", 2), ("hidden_size", 5), ("proj_size", 2), ("num_layers", 0), ("num_layers", 1),
        ("num_layers", 3), ("num_layers", "2"), ("num_layers", 2**70), ("bidirectional", True), ("dropout", -0.1),
        ("dropout", 1.1), ("dropout", float("nan")), ("dropout", "0"), ("input_size", None), ("hidden_size", 4.0),
        ("training", torch.zeros(2)),
    ],
    ids=str,
)  # fmt: skip
def test_fast_path_refuses_invalid_attributes(attribute, value):
    """Attributes are read at every call, and the general path raises the error."""
    lstm, x = fastlstm.LSTM(3, 4, 2), torch.rand(5, 2, 3)
    assert lstm_takes_it(lstm, x, None)
    lstm.__dict__[attribute] = value
    assert not lstm_takes_it(lstm, x, None)
    del lstm.__dict__[attribute]
    assert not lstm_takes_it(lstm, x, None)


def test_fast_path_accepts_other_number_types():
    x, lstm = torch.rand(5, 2, 3), fastlstm.LSTM(3, 4, bidirectional=True)
    lstm.input_size, lstm.hidden_size, lstm.num_layers = np.int64(3), np.int32(4), np.int64(1)
    lstm.bidirectional, lstm.dropout = np.bool_(True), np.float32(0)
    assert lstm_takes_it(lstm, x, None)
    assert lstm(x)[0].shape == (5, 2, 8)


@pytest.mark.parametrize("names", [[], ["weight_ih_l0"], [["unhashable"]]], ids=str)
def test_fast_path_refuses_missing_weights(names):
    lstm, x = fastlstm.LSTM(3, 4), torch.rand(5, 2, 3)
    whole = lstm._flat_weights_names
    lstm._flat_weights_names = names
    lstm._flat_weights = lstm._flat_weights[: len(names)]
    lstm._flat_weight_refs = lstm._flat_weight_refs[: len(names)]
    extension = native.extension
    assert extension.lstm(lstm, None, x, None, None) is (NotImplemented if ["unhashable"] in names else None)
    lstm._flat_weights_names = whole
    for missing in ([], lstm._flat_weights[:1], 4 * [torch.zeros(3)], 4 * [None], "weights"):
        assert extension.lstm(lstm, missing, x, None, None) is None


def test_fast_path_computes_parametrized_weights_once():
    """It uses the result of LSTM._current_weights, which is computed once."""
    extension, x, computed = native.extension, torch.rand(5, 2, 3), []

    class Twice(torch.nn.Module):
        def forward(self, weight):
            computed.append(weight)
            return 2 * weight

    lstm, cell = fastlstm.LSTM(3, 4), fastlstm.LSTMCell(3, 4)
    assert isinstance(extension.lstm(lstm, None, x, None, None), tuple)
    torch.nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", Twice())
    torch.nn.utils.parametrize.register_parametrization(cell, "weight_hh", Twice())
    computed.clear()
    assert extension.lstm(lstm, None, x, None, None) is NotImplemented
    assert extension.lstm_cell(cell, None, x[0], None) is NotImplemented
    assert not computed
    assert lstm_takes_it(lstm, x, None)
    assert len(computed) == 1
    assert cell_takes_it(cell, x[0], None)
    assert len(computed) == 2
    assert not lstm_takes_it(lstm, x.double(), None)
    assert len(computed) == 3
    subclassed = [w.detach().as_subclass(Subclass) for w in lstm._current_weights()]
    assert extension.lstm(lstm, subclassed, x, None, None) is None


def test_fast_path_of_a_cell(monkeypatch):
    cell, x, h = fastlstm.LSTMCell(3, 4), torch.rand(2, 3), torch.zeros(2, 4)
    taken = {}
    for name in dispatch.NAMES:
        with fastlstm.use_backend(name):
            taken[name] = cell_takes_it(cell, x, None)
    assert taken == {name: name in ("auto", "native") for name in dispatch.NAMES}
    assert cell_takes_it(cell, x[0], (h[0], h[0]))
    assert cell_takes_it(fastlstm.LSTMCell(3, 4, bias=False), x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cell_takes_it(cell, x, None)
    refused_states = {
        "too few rows": (h[:1], h),
        "c in float64": (h, h.double()),
        "h alone": (h,),
        "c None": (h, None),
        "list": [h, h],
        "tensor": h,
        "1-D": (h[0], h[0]),
        "meta": (h.to("meta"), h),
    }
    for name, hx in refused_states.items():
        assert not cell_takes_it(cell, x, hx), name
    for own in interposed(x):
        assert not cell_takes_it(cell, own, None)
    refused_inputs = {
        "3-D": x[None],
        "float64": x.double(),
        "bfloat16": x.bfloat16(),
        "size": x[:, :2],
        "B = 0": x[:0],
        "meta": x.to("meta"),
        "int64": x.long(),
        "sparse": x.to_sparse(),
        "number": 1.0,
    }
    for name, other in refused_inputs.items():
        assert not cell_takes_it(cell, other, None), name
    torch.func.vmap(lambda x: taken.update(vmap=cell_takes_it(cell, x, None)) or x)(x[None])
    assert taken["vmap"] is False
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not cell_takes_it(cell, mode.from_tensor(x), None)
        assert not cell_takes_it(cell, x, None)  # a mode sees every op
    cell.bias_hh = None
    assert not cell_takes_it(cell, x, None)
    cell.bias_ih = None
    assert cell_takes_it(cell, x, None)
    monkeypatch.setattr(native, "extension", None)
    assert not cell_takes_it(cell, x, None)


def test_fast_path_reads_attributes_as_python_does():
    """Properties of a subclass count, as in nn.LSTM and on the general path."""

    class Scheduled(fastlstm.LSTM):
        scale = 1.0
        batch_first = property(lambda self: True, lambda self, value: None)

        @property
        def dropout(self):
            return self.__dict__["dropout"] * self.scale

        @dropout.setter
        def dropout(self, value):
            self.__dict__["dropout"] = value

    lstm, x = Scheduled(3, 4, 2, dropout=0.9), torch.rand(5, 2, 3)
    assert lstm_takes_it(lstm, x, None)
    assert lstm(x)[1][0].shape == (2, 5, 4)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    lstm.scale = 0.0
    assert torch.equal(lstm(x)[0], lstm(x)[0])


def test_fast_path_requires_a_plain_dict():
    """Looking up a name or dict of a subclass runs Python code."""

    class Name(str):
        __slots__ = ()

    class Dict(dict):
        pass

    lstm, cell, x = fastlstm.LSTM(3, 4), fastlstm.LSTMCell(3, 4), torch.rand(5, 2, 3)
    lstm._flat_weights_names = [Name(name) for name in lstm._flat_weights_names]
    cell._parameters = Dict(cell._parameters)
    assert native.extension.lstm(lstm, None, x, None, None) is NotImplemented
    assert native.extension.lstm_cell(cell, None, x[0], None) is NotImplemented
    assert lstm_takes_it(lstm, x, None)
    assert cell_takes_it(cell, x[0], None)


@pytest.mark.parametrize(("error", "passed_on"), [(KeyboardInterrupt, True), (ArithmeticError, False)])
def test_attribute_errors(error, passed_on):
    """KeyboardInterrupt propagates; errors that the general path would raise again are left to it."""

    class Flag:
        def __bool__(self):
            raise error

    lstm, x = fastlstm.LSTM(3, 4), torch.rand(5, 2, 3)
    lstm.bidirectional = Flag()
    if not passed_on:
        assert native.extension.lstm(lstm, None, x, None, None) is None
    with pytest.raises(error):
        lstm(x)
