"""Which backend runs a call: use_backend, FASTLSTM_BACKEND, explain and supports()."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import backends, dispatch
from fastlstm.ops.schema import LayerInputs

X = torch.zeros(5, 2, 3)


class Forgetful(dict):
    """Disable dispatch's cache, so that each call chooses again."""

    def __setitem__(self, key, value):
        pass


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", Forgetful())


@pytest.fixture
def choices(monkeypatch, no_memory):
    """(backend, call) of every choice; the fast paths, which skip the choice, are off."""
    monkeypatch.setattr(dispatch, "_extension_may_run", lambda: False)
    calls = []
    real = dispatch.select

    def select(call):
        calls.append((real(call), call))
        return calls[-1][0]

    monkeypatch.setattr(dispatch, "select", select)
    return calls


def test_named_backend_runs_the_call(backend, choices):
    fastlstm.LSTM(3, 4, 2)(X)
    assert [name for name, _ in choices] == [backend, backend]


def test_context_ends_with_the_block(choices):
    lstm = fastlstm.LSTM(3, 4)
    lstm(X)
    with fastlstm.use_backend("reference"):
        lstm(X)
        with fastlstm.use_backend("eager"):
            lstm(X)
        lstm(X)
    lstm(X)
    auto = choices[0][0]
    assert [name for name, _ in choices] == [auto, "reference", "eager", "reference", auto]


def test_context_ends_with_an_error(choices):
    with pytest.raises(KeyError), fastlstm.use_backend("reference"):
        raise KeyError
    fastlstm.LSTM(3, 4)(X)
    assert choices[0][0] != "reference"


def test_use_backend_as_a_function_persists(choices):
    try:
        fastlstm.use_backend("reference")
        fastlstm.LSTM(3, 4)(X)
        assert choices[0][0] == "reference"
    finally:
        fastlstm.use_backend("auto")
    fastlstm.LSTM(3, 4)(X)
    assert choices[1][0] != "reference"


def test_cached_dispatch_depends_on_backend_and_call():
    """With dispatch's cache: distinguished by the type of autograd node."""

    def node(name, *args, **kwargs):
        with fastlstm.use_backend(name):
            lstm = fastlstm.LSTM(3, 4, **kwargs)
            return type(lstm(X.to(lstm.weight_ih_l0.dtype), lengths=args or None)[0].grad_fn)

    for _ in range(2):
        assert node("eager") != node("reference")
        assert node("eager") == node("eager", 5, 2) == node("eager", bias=False, bidirectional=True)
        assert node("reference") == node("reference", dtype=torch.float64)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"backend must be one of auto, native, .*eager, reference, got 'cudnn'"):
        fastlstm.use_backend("cudnn")
    assert dispatch.select(call()) in dispatch.NAMES


def call(device="cpu", dtype=torch.float32, lengths=False, reset_mask=False, **kwargs):
    weights = list(fastlstm.LSTM(3, 4, device="meta", dtype=dtype, **kwargs).parameters())
    x = torch.zeros(1, 1, 3, device=device, dtype=dtype)
    return dispatch.describe(x, weights, x if lengths else None, x if reset_mask else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 2, "bias": False}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["native", "eager"])
def test_complete_backends_refuse_nothing_on_cpu(name, dtype, kwargs, ragged):
    """Otherwise a backend that refuses everything would skip all its tests."""
    if name == "native" and backends.native.extension is None:
        pytest.skip(backends.native.supports(call()))
    assert dispatch.BACKENDS[name].supports(call(dtype=dtype, lengths=ragged, reset_mask=ragged, **kwargs)) is None


def test_eager_runs_on_any_device():
    assert dispatch.BACKENDS["eager"].supports(call("meta")) is None
    assert fastlstm.LSTM(3, 4, device="meta")(X.to("meta"))[0].shape == (5, 2, 4)


def test_native_refuses_with_a_reason():
    native = dispatch.BACKENDS["native"]
    assert "meta" in native.supports(call("meta")) or "not available" in native.supports(call("meta"))


def test_native_without_its_extension(monkeypatch, no_memory):
    native = dispatch.BACKENDS["native"]
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "load_error", "No module named 'fastlstm._C'")
    assert "No module named 'fastlstm._C'" in native.supports(call())
    assert "pip install" in native.supports(call())
    assert fastlstm.explain(fastlstm.LSTM(3, 4), X).backend != "native"
    assert fastlstm.LSTM(3, 4)(X)[0].shape == (5, 2, 4)
    with (
        fastlstm.use_backend("native"),
        pytest.raises(RuntimeError, match="backend 'native' cannot run this call: the extension"),
    ):
        fastlstm.LSTM(3, 4)(X)


def test_auto_selects_the_first_backend_that_supports_the_call(monkeypatch, choices):
    eager = dispatch.BACKENDS["eager"]
    refusing = types.SimpleNamespace(supports=lambda call: "not today")
    monkeypatch.setattr(dispatch, "BACKENDS", {"native": refusing, "eager": eager})
    fastlstm.LSTM(3, 4)(X)
    assert choices[0][0] == "eager"
    picky = types.SimpleNamespace(supports=lambda call: "no projections" if call.shape.proj else None)
    monkeypatch.setattr(dispatch, "BACKENDS", {"native": picky, "eager": eager})
    assert dispatch.select(call()) == "native"
    assert dispatch.select(call(proj_size=2)) == "eager"


def test_choice_is_independent_of_t_and_b(choices):
    lstm = fastlstm.LSTM(3, 4)
    for T, B in ((1, 1), (5, 2), (300, 1), (2, 40), (3, 0)):
        lstm(torch.zeros(T, B, 3))
    assert len({call for _, call in choices}) == 1


def test_describe_includes_shape_dtype_and_device():
    described = call(dtype=torch.float64, lengths=True, bidirectional=True, proj_size=2, bias=False)
    assert (described.device.type, described.dtype, described.I) == ("cpu", torch.float64, 3)
    assert (described.shape.H, described.shape.P, described.shape.D, described.shape.bias) == (4, 2, 2, False)
    assert described.lengths
    assert not described.reset_mask


def test_explain():
    lstm = fastlstm.LSTM(3, 4, 2, bidirectional=True)
    explanation = fastlstm.explain(lstm, X)
    assert list(explanation.reasons) == [*dispatch.BACKENDS, "reference"]
    assert [name for name, reason in explanation.reasons.items() if reason == "runs"] == [explanation.backend]
    assert explanation.reasons["reference"] == f"can run it, but {explanation.backend!r} is preferred"
    assert len(str(explanation).splitlines()) == len(explanation.reasons) + bool(explanation.backward)
    for name, reason in explanation.reasons.items():
        assert f"{name} " in str(explanation)
        assert reason in str(explanation)


def test_explain_of_every_form_of_input(choices):
    lstm, cell = fastlstm.LSTM(3, 4, 2, proj_size=2), fastlstm.LSTMCell(3, 4)
    packed = pack_padded_sequence(X, torch.tensor([5, 3]))
    forms = {
        "batch": (lstm, (X,), {}),
        "unbatched": (lstm, (X[:, 0],), {}),
        "packed": (lstm, (packed,), {}),
        "lengths": (lstm, (X,), {"lengths": [5, 3]}),
        "resets": (lstm, (X,), {"reset_mask": torch.zeros(5, 2, dtype=torch.bool)}),
        "states": (lstm, (X, (torch.zeros(2, 2, 2), torch.zeros(2, 2, 4))), {"return_cell_states": True}),
        "cell": (cell, (X[0],), {}),
        "cell, unbatched": (cell, (X[0, 0], (torch.zeros(4), torch.zeros(4))), {}),
    }
    for name, (module, args, kwargs) in forms.items():
        fastlstm.explain(module, *args, **kwargs)
        explained = choices[-1]
        choices.clear()
        module(*args, **kwargs)
        assert choices[0] == explained, name  # equal to the call of the first layer
        choices.clear()


def test_explain_of_a_named_backend():
    lstm = fastlstm.LSTM(3, 4)
    with fastlstm.use_backend("reference"):
        explanation = fastlstm.explain(lstm, X)
    assert explanation.backend == "reference"
    assert explanation.reasons["eager"] == "can run it, but backend 'reference' was asked for"


def test_explain_if_the_named_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch.BACKENDS["eager"], "supports", lambda call: "out of order")
    with fastlstm.use_backend("eager"):
        explanation = fastlstm.explain(fastlstm.LSTM(3, 4), X)
    assert explanation.backend == ""
    assert explanation.reasons["eager"] == "out of order"
    assert "runs" not in explanation.reasons.values()


def test_explain_refuses_other_modules():
    with pytest.raises(TypeError, match=r"module must be a fastlstm.LSTM or fastlstm.LSTMCell, got LSTM"):
        fastlstm.explain(nn.LSTM(3, 4), X)


def test_environment_variable():
    program = "import torch, fastlstm; print(fastlstm.explain(fastlstm.LSTM(3, 4), torch.zeros(2, 1, 3)).backend)"
    environment = {**os.environ, "FASTLSTM_BACKEND": "reference"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "reference", ran.stderr


def test_environment_variable_with_an_unknown_name(monkeypatch, no_memory):
    monkeypatch.setattr(dispatch, "_requested", "fastest")  # as set from the environment variable on import
    with pytest.raises(ValueError, match=r"FASTLSTM_BACKEND must be one of auto, .* got 'fastest'"):
        fastlstm.LSTM(3, 4)(X)


def test_cached_dispatch_separates_biases_from_directions(monkeypatch):
    """Both have four weights of equal sizes, and a backend may support only one of them."""
    picky = types.SimpleNamespace(supports=lambda call: "one direction only" if call.shape.D == 2 else None)
    monkeypatch.setattr(dispatch, "BACKENDS", {"native": picky, "eager": dispatch.BACKENDS["eager"]})
    monkeypatch.setattr(dispatch, "_chosen", {})
    for kwargs, name in (({}, "native"), ({"bias": False, "bidirectional": True}, "eager")):
        weights = list(fastlstm.LSTM(3, 4, **kwargs).parameters())
        assert dispatch._choose(LayerInputs(X, None, None, weights)) == name


def test_use_backend_returns_a_reusable_context():
    eager = fastlstm.use_backend("eager")
    for _ in range(2):
        with eager:
            assert dispatch._requested == "eager"
        assert dispatch._requested != "eager"


def test_subclasses_of_tensors_keep_their_type():
    class Named(torch.Tensor):
        pass

    lstm = fastlstm.LSTM(3, 4)
    for name in ("auto", "eager"):
        with fastlstm.use_backend(name):
            assert type(lstm(torch.randn(2, 1, 3).as_subclass(Named))[0]) is Named, name
