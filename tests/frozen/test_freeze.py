"""freeze and thaw on whole models: what they change, and what stays."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastlstm

from ..module_pairs import data, flat, naming
from .forms import FORMS, NO_EXTENSION, WEIGHTS

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

X = data(5, 2, 3).float()


class Tagger(nn.Module):
    """LSTMs at several depths, of torch's and fastlstm's classes, one of them shared."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=dtype)
        self.blocks = nn.ModuleList(
            [nn.Linear(8, 4, dtype=dtype), nn.ModuleDict({"cell": nn.LSTMCell(4, 4, dtype=dtype)})]
        )
        self.decoder = fastlstm.LSTM(4, 4, proj_size=2, bias=False, dtype=dtype)
        self.again = self.decoder
        self.last = fastlstm.LSTMCell(2, 4, bias=False, dtype=dtype)
        self.gru = nn.GRU(2, 2, dtype=dtype)

    def forward(self, x):
        x, _ = self.encoder(x)
        x = self.blocks[0](x)
        x = torch.stack([self.blocks[1]["cell"](step)[0] for step in x])
        x, _ = self.decoder(x)
        x, _ = self.again(torch.cat([x, x], -1))
        return self.last(x[-1])[0] + self.gru(x)[0].sum()


def lstms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.LSTM, nn.LSTMCell, fastlstm.LSTM, fastlstm.LSTMCell))]


@pytest.mark.parametrize("form", FORMS)
def test_whole_model_in_place(form):
    dtype, weights = FORMS[form]
    model, x = Tagger(dtype), X.to(dtype)
    expected = model(x)
    objects = [(name, id(m)) for name, m in model.named_modules()]
    keys = list(model.state_dict())
    assert fastlstm.freeze(model, weights) is model
    assert [(name, id(m)) for name, m in model.named_modules()] == objects
    assert [type(m).__name__ for m in lstms(model)] == ["FrozenLSTM", "FrozenLSTMCell", "FrozenLSTM", "FrozenLSTMCell"]
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"blocks", "gru"}
    assert [name for name in model.state_dict() if not name.endswith("_scale")] == keys
    tolerance = {"bfloat16": 0.05, "bfloat16 weights": 0.02, "int8": 0.02}.get(form, 1e-6)
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert not lstms(model)[0](x)[0].requires_grad
    assert repr(model.encoder) == f"FrozenLSTM(3, 4, num_layers=2, bidirectional=True, form={model.encoder.form})"
    assert repr(model.last) == f"FrozenLSTMCell(2, 4, bias=False, form={model.encoder.form})"
    assert model.encoder.form == {None: "stored", torch.bfloat16: "bfloat16", torch.int8: "int8"}[weights]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell, fastlstm.LSTM, fastlstm.LSTMCell], ids=str)
def test_the_module_itself(cls, weights):
    module = cls(3, 4)
    x = X if "Cell" not in cls.__name__ else X[0]
    expected = module(x)
    assert fastlstm.freeze(module, weights) is module
    assert isinstance(module, (fastlstm.FrozenLSTM, fastlstm.FrozenLSTMCell))
    torch.testing.assert_close(flat(module(x)), flat(expected), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_a_second_time(weights):
    """In the same form it changes nothing; in another it raises, before layers that are not frozen are."""
    model = fastlstm.freeze(Tagger(), weights)
    model.gru = nn.LSTM(2, 2)
    expected, buffers = model.encoder(X)[0], list(model.buffers())
    for other in WEIGHTS.values():
        if other != weights:
            form = r"encoder is frozen in the form '\w+', got weights=.*: call fastlstm\.thaw\(model\) first"
            with pytest.raises(ValueError, match=form):
                fastlstm.freeze(model, other)
            with pytest.raises(ValueError, match="the module itself is frozen"):
                fastlstm.freeze(model.encoder, other)
    assert type(model.gru) is nn.LSTM
    model.gru = nn.GRU(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlstm.freeze(model, weights)
    assert [id(b) for b in model.buffers()] == [id(b) for b in buffers]
    assert torch.equal(model.encoder(X)[0], expected)
    expected = model(X)
    assert fastlstm.convert(model) is model
    assert torch.equal(model(X), expected)


def test_the_weights_are_copies():
    model = Tagger()
    weights = [w for m in lstms(model) for w in m.parameters()]
    before = [w.detach().clone() for w in weights]
    expected = fastlstm.freeze(model)(X)
    for w, value in zip(weights, before, strict=True):
        assert torch.equal(w, value)
        w.data.zero_()
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("form", FORMS)
def test_thaw(form):
    """Parameters of the module's dtype, which hold the values of the frozen weights, and train."""
    dtype, weights = FORMS[form]
    model, x = fastlstm.freeze(Tagger(dtype), weights), X.to(dtype)
    expected, state = model(x), model.state_dict()
    assert fastlstm.thaw(model) is model
    assert [type(m) for m in lstms(model)] == [fastlstm.LSTM, fastlstm.LSTMCell] * 2
    assert not list(model.buffers())
    assert list(model.state_dict()) == list(Tagger(dtype).state_dict())
    for name, w in model.named_parameters():
        assert (w.dtype, w.requires_grad) == (dtype, True), name
        if f"{name}_scale" in state:
            assert torch.equal(w, state[name] * state[f"{name}_scale"][:, None]), name
        else:
            assert torch.equal(w, state[name].to(dtype)), name
        if weights is None:
            assert torch.equal(w, dict(Tagger(dtype).named_parameters())[name]), name
    if form != "int8":  # whose activations are quantized as well
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    if weights is None:
        assert torch.equal(model(x), fastlstm.convert(Tagger(dtype))(x))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for _ in range(3):
        loss = model(x).float().pow(2).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(w.grad is not None for w in model.parameters())
        optimizer.step()
    assert losses[2] < losses[0]
    assert vars(model.encoder).keys() == vars(fastlstm.LSTM(3, 4, 2, bidirectional=True)).keys()
    assert vars(model.last).keys() == vars(fastlstm.LSTMCell(2, 4, bias=False)).keys()
    assert copy.deepcopy(model)(x).shape == (2, 4)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_freezing_again_after_thaw_gives_the_same_bits(weights):
    model = fastlstm.freeze(Tagger(), weights)
    expected, state = model(X), model.state_dict()
    again = fastlstm.freeze(fastlstm.thaw(model), weights)
    for name, value in again.state_dict().items():
        if weights != torch.int8 or value.dtype == torch.int8:
            assert torch.equal(value, state[name]), name
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if weights == torch.int8 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again(X), expected, **tolerance)


def test_thaw_of_a_model_without_frozen_layers():
    model = fastlstm.convert(Tagger())
    weights = [id(w) for w in model.parameters()]
    assert fastlstm.thaw(model) is model
    assert [id(w) for w in model.parameters()] == weights


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("library", [nn, fastlstm], ids=["torch", "fastlstm"])
def test_parametrized(library, cell, weights):
    """Present weights are frozen; the parametrization is gone."""
    module, x = (library.LSTMCell(3, 4), X[0]) if cell else (library.LSTM(3, 4, 2), X)
    name = "weight_hh" if cell else "weight_hh_l1"
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        module.parametrizations[name].original0.mul_(2)
    plain = (nn.LSTMCell(3, 4) if cell else nn.LSTM(3, 4, 2)).requires_grad_(False)
    for own in plain.state_dict():
        setattr(plain, own, nn.Parameter(getattr(module, own).detach().clone()))
    fastlstm.freeze(module, weights)
    assert not parametrize.is_parametrized(module)
    assert type(module) in (fastlstm.FrozenLSTM, fastlstm.FrozenLSTMCell)
    torch.testing.assert_close(flat(module(x)), flat(fastlstm.freeze(plain, weights)(x)), rtol=0, atol=0)
    assert copy.deepcopy(module)(x)[0].shape == module(x)[0].shape
    assert len(list(fastlstm.thaw(module).parameters())) == (4 if cell else 8)


class Mine(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


def test_subclasses_are_left():
    class MyCell(fastlstm.LSTMCell):
        pass

    model = nn.ModuleDict({"a": Mine(3, 4), "b": nn.LSTM(3, 4), "c": nn.Sequential(MyCell(3, 4))})
    with pytest.warns(UserWarning, match=r"freeze leaves subclasses .*: a \(.*Mine\), c\.0 \(.*MyCell\)$"):
        fastlstm.freeze(model, torch.int8)
    assert [type(m).__name__ for m in lstms(model)] == ["Mine", "FrozenLSTM", "MyCell"]
    with pytest.warns(UserWarning, match=r"the module itself \(.*Mine\)"):
        fastlstm.freeze(Mine(3, 4))


def test_patch_torch():
    with fastlstm.patch_torch():
        model = Tagger()
        expected = model(X)
        fastlstm.freeze(model)
        assert isinstance(model.encoder, nn.LSTM)
        assert isinstance(model.last, nn.LSTMCell)
        torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(model(X), expected)
    assert isinstance(model.encoder, fastlstm.LSTM)


def test_hooks_and_attributes_stay():
    lstm, calls = nn.LSTM(3, 4, 2, dropout=0.5).eval(), []
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    lstm.register_forward_hook(lambda *_: calls.append("after"))
    lstm.register_buffer("steps", torch.tensor(3))
    lstm.note = "mine"
    fastlstm.freeze(lstm, torch.int8)
    lstm(X)
    assert calls == ["before", "after"]
    assert (lstm.note, lstm.training, lstm.dropout, lstm.steps) == ("mine", False, 0.5, 3)
    fastlstm.thaw(lstm)
    lstm(X)
    assert calls == ["before", "after"] * 2
    assert (lstm.note, lstm.training, lstm.dropout, lstm.steps) == ("mine", False, 0.5, 3)


def test_options_of_forward_after_convert():
    """What nn.LSTM has not: lengths, resets and cell states."""
    lstm = fastlstm.freeze(nn.LSTM(3, 4, batch_first=True))
    x, mask = X.transpose(0, 1), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 2] = True
    output, _, cells = lstm(x, lengths=[5, 3], reset_mask=mask, return_cell_states=True)
    torch.testing.assert_close(output[:1, 2:], lstm(x[:1, 2:])[0], msg=naming("reset"))
    torch.testing.assert_close(output[1:, :3], lstm(x[1:, :3])[0], msg=naming("lengths"))
    assert not output[1, 3:].any()
    assert cells.shape == (2, 5, 4)


class Switch(fastlstm.LSTM):
    def frozen(self) -> bool:
        return True


@pytest.mark.parametrize("frozen_first", [False, True], ids=["unfrozen", "frozen"])
def test_the_name_frozen_is_the_users(frozen_first):
    """An attribute, a buffer or a method of that name changes no call."""
    lstm, cell, with_buffer = fastlstm.LSTM(3, 4), fastlstm.LSTMCell(3, 4), fastlstm.LSTM(3, 4)
    model = nn.ModuleList([lstm, cell, with_buffer])
    if frozen_first:
        fastlstm.freeze(model)
    expected = [m(x) for m, x in zip(model, (X, X[0], X), strict=True)]
    lstm.frozen = cell.frozen = not frozen_first
    with_buffer.register_buffer("frozen", torch.tensor(not frozen_first))
    for m, x, values in zip(model, (X, X[0], X), expected, strict=True):
        torch.testing.assert_close(flat(m(x)), flat(values), rtol=0, atol=0)
    fastlstm.convert(model)
    if not frozen_first:
        assert all(type(m).__module__.startswith("torch.nn") for m in fastlstm.convert(model, to="torch"))
        switch = Switch(3, 4)
        assert switch(X)[0].shape == (5, 2, 4)
        assert switch.frozen()


@pytest.mark.parametrize("cls", [fastlstm.LSTM, fastlstm.LSTMCell], ids=["LSTM", "LSTMCell"])
def test_attributes_form_and_dtype_of_the_user_come_back(cls):
    """Meanwhile both are those of the frozen layer, and read-only."""
    module, x = cls(3, 4), X if cls is fastlstm.LSTM else X[0]
    module.form, module.dtype, module.portable = "mine", "also mine", 3
    fastlstm.freeze(module, torch.int8)
    for frozen in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (frozen.form, frozen.dtype, frozen.portable) == ("int8", torch.float32, 3)
        for name in ("form", "dtype"):
            with pytest.raises(AttributeError):
                setattr(frozen, name, "stored")
        frozen(x)
        fastlstm.thaw(frozen)
        assert (frozen.form, frozen.dtype, frozen.portable) == ("mine", "also mine", 3)
    other = fastlstm.thaw(fastlstm.freeze(cls(3, 4)))
    assert not hasattr(other, "form")
    assert not hasattr(other, "dtype")


def test_thaw_keeps_requires_grad():
    """Also of copies, and of a parametrized weight as its originals have it."""
    model = Tagger()
    model.encoder.requires_grad_(False)
    model.encoder.bias_ih_l1.requires_grad_()
    model.last.weight_hh.requires_grad_(False)
    for name, trained in (("weight_ih_l0", True), ("weight_hh_l0", False)):
        parametrizations.weight_norm(model.decoder, name)
        model.decoder.parametrizations[name].requires_grad_(trained)
    with torch.no_grad():
        fastlstm.freeze(model)
    encoder = fastlstm.thaw(pickle.loads(pickle.dumps(model.encoder)))
    assert [name for name, w in encoder.named_parameters() if w.requires_grad] == ["bias_ih_l1"]
    for frozen in (copy.deepcopy(model), model):
        thawed = fastlstm.thaw(frozen)
        assert [name for name, w in thawed.encoder.named_parameters() if w.requires_grad] == ["bias_ih_l1"]
        assert [name for name, w in thawed.last.named_parameters() if w.requires_grad] == ["weight_ih"]
        required = {name: w.requires_grad for name, w in thawed.decoder.named_parameters()}
        assert required == {"weight_ih_l0": True, "weight_hh_l0": False, "weight_hr_l0": True}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("frozen_inside", [False, True])
def test_thaw_in_inference_mode(frozen_inside, weights):
    """The parameters train afterwards."""
    model = Tagger()
    with torch.inference_mode(frozen_inside):
        fastlstm.freeze(model, weights)
    with torch.inference_mode():
        fastlstm.thaw(model)
    assert not any(w.is_inference() for w in model.parameters())
    model(X).sum().backward()
    assert all(w.grad is not None for w in model.parameters())
