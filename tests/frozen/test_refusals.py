"""What freeze refuses, without a change of the model, and where frozen modules are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlstm
from fastlstm.backends import native

from ..module_pairs import data, flat
from .forms import NO_EXTENSION

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

X = data(5, 2, 3).float()


def old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


def parametrize_another(module: nn.Module) -> None:
    module.scale = nn.Parameter(torch.ones(3))
    parametrize.register_parametrization(module, "scale", nn.Identity())
    parametrizations.weight_norm(module, "weight_hh_l1")


REFUSED: dict[str, tuple[Any, torch.dtype | None, type[Exception], str]] = {
    "float16": (lambda m: m.half(), None, ValueError, r"0\.weight_ih must be torch\.float32, .* got torch\.float16"),
    "float64 in int8": (
        lambda m: m.double(), torch.int8, ValueError,
        r"0\.weight_ih must be torch\.float32 for int8 weights, got torch\.float64",
    ),
    "bfloat16 in bfloat16": (
        lambda m: m.bfloat16(), torch.bfloat16, ValueError,
        r"0\.weight_ih must be torch\.float32 for bfloat16 weights, got torch\.bfloat16",
    ),
    "float16 weights": (
        lambda m: m, torch.float16, ValueError,
        r"weights must be None, torch\.bfloat16 or torch\.int8, got torch\.float16",
    ),
    "weights a string": (lambda m: m, "int8", ValueError, "got 'int8'"),
    "meta": (lambda m: m.to("meta"), None, RuntimeError, r"0\.weight_ih must be on cpu, got meta"),
    "one layer of float16": (lambda m: m[1].half(), None, ValueError, r"1\.weight_ih_l0 must be .* got torch\.float16"),
    "one weight of float64": (
        lambda m: setattr(m[1], "bias_hh_l1", nn.Parameter(m[1].bias_hh_l1.double())), torch.int8, ValueError,
        r"1\.bias_hh_l1 must be",
    ),
    "old weight_norm": (
        lambda m: old_weight_norm(m[1], "weight_hh_l0"), None, RuntimeError,
        r"1\.weight_hh_l0 must be a parameter, .*remove_weight_norm",
    ),
    "prune": (
        lambda m: prune.l1_unstructured(m[1], "weight_ih_l1", amount=0.5), torch.int8, RuntimeError,
        r"1\.weight_ih_l1 must be a parameter, .*prune\.remove",
    ),
    "prune of a cell": (
        lambda m: prune.l1_unstructured(m[0], "bias_ih", amount=0.5), torch.bfloat16, RuntimeError,
        r"0\.bias_ih must be a parameter",
    ),
    "a parametrization of another name": (
        lambda m: parametrize_another(m[1]), torch.int8, RuntimeError,
        r"1\.scale is parametrized and not a weight, .*remove_parametrizations first",
    ),
    "too many columns for int8": (
        lambda m: m.append(nn.LSTM(65537, 1)), torch.int8, RuntimeError, "at most 65536 columns, got 65537"
    ),
    "weights of another size": (
        lambda m: setattr(m[1], "weight_hh_l1", nn.Parameter(torch.zeros(16, 5))), None, RuntimeError, "must be"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_changed(name):
    """One layer that cannot be frozen leaves the layers before it as they were."""
    alter, weights, error, message = REFUSED[name]
    model = nn.ModuleList([nn.LSTMCell(3, 4), nn.LSTM(3, 4, 2)])
    alter(model)
    types, values = [type(m) for m in model], [id(w) for w in model.parameters()]
    attributes = [vars(m).keys() for m in model]
    with pytest.raises(error, match=message):
        fastlstm.freeze(model, weights)
    assert [type(m) for m in model] == types
    assert [id(w) for w in model.parameters()] == values
    assert [vars(m).keys() for m in model] == attributes
    assert not list(model.buffers()) or "prune" in name


def test_weights_made_permanent_are_frozen():
    module = nn.LSTM(3, 4)
    prune.l1_unstructured(module, "weight_ih_l0", amount=0.5)
    old_weight_norm(module, "weight_hh_l0")
    expected = module(X)
    prune.remove(module, "weight_ih_l0")
    nn.utils.remove_weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(flat(fastlstm.freeze(module)(X)), flat(expected))


def test_convert_to_torch_is_refused():
    model = fastlstm.freeze(nn.Sequential(nn.LSTM(3, 4)))
    with pytest.raises(ValueError, match=r"0 is frozen: call fastlstm\.thaw\(model\) before convert"):
        fastlstm.convert(model, to="torch")
    with pytest.raises(ValueError, match="the module itself is frozen"):
        fastlstm.convert(fastlstm.freeze(nn.LSTMCell(3, 4)), to="torch")
    assert type(fastlstm.convert(fastlstm.thaw(model), to="torch")[0]) is nn.LSTM


def test_without_the_extension(monkeypatch):
    model = nn.Sequential(nn.LSTM(3, 4))
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "load_error", "it was not built")
    with pytest.raises(RuntimeError, match=r"freeze needs the extension fastlstm\._C, .*: it was not built"):
        fastlstm.freeze(model)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_other_backends_are_refused(name):
    lstm, cell = fastlstm.freeze(fastlstm.LSTM(3, 4)), fastlstm.freeze(fastlstm.LSTMCell(3, 4))
    calls = {"lstm": lambda: lstm(X), "lengths": lambda: lstm(X, lengths=[5, 2]), "cell": lambda: cell(X[0])}
    for what, call in calls.items():
        with fastlstm.use_backend(name), pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run .*thaw"):
            pytest.fail(f"{what}: {call()}")
        with fastlstm.use_backend("native"):
            call()


def test_weights_are_not_replaced():
    """A weight of the same name would be ignored, so that it is refused; other names are free."""
    model = fastlstm.freeze(nn.ModuleDict({"lstm": nn.LSTM(3, 4, 2, bidirectional=True), "cell": nn.LSTMCell(3, 4)}))
    lstm, cell = model["lstm"], model["cell"]
    expected = lstm(X)[0]
    weight = nn.Parameter(torch.zeros(16, 3))
    calls = {
        "attribute": lambda: setattr(lstm, "weight_ih_l0_reverse", weight),
        "tensor": lambda: setattr(lstm, "weight_ih_l1", weight.detach()),
        "parameter": lambda: lstm.register_parameter("weight_ih_l0", weight),
        "buffer": lambda: lstm.register_buffer("weight_ih_l0", weight.detach()),
        "cell": lambda: setattr(cell, "weight_ih", weight),
        "parameter of the cell": lambda: cell.register_parameter("bias_hh", nn.Parameter(torch.zeros(16))),
        "functional_call": lambda: torch.func.functional_call(lstm, {"weight_ih_l0": weight}, (X,)),
        "functional_call of the cell": lambda: torch.func.functional_call(cell, {"weight_hh": weight}, (X[0],)),
        "functional_call of the state": lambda: torch.func.functional_call(lstm, lstm.state_dict(), (X,)),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=r"of a frozen layer cannot be replaced: .* fastlstm\.thaw"):
            pytest.fail(f"{name}: {call()}")
    assert not list(model.parameters())
    assert torch.equal(lstm(X)[0], expected)
    lstm.weight = weight
    assert next(iter(lstm.parameters())) is weight
    del lstm.weight
    fastlstm.thaw(model)
    lstm.weight_ih_l0 = weight
    assert not torch.equal(lstm(X)[0], expected)


@pytest.mark.parametrize("cls", [fastlstm.FrozenLSTM, fastlstm.FrozenLSTMCell])
def test_frozen_classes_are_not_constructed(cls):
    for args in ((), (8, 16)):
        with pytest.raises(TypeError, match=rf"{cls.__name__} is made by fastlstm\.freeze"):
            cls(*args)
