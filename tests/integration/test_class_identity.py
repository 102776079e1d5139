"""Code that checks for torch.nn.LSTM or derives from it: the README's advice in practice."""

from __future__ import annotations

import abc
import types
import warnings

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import LSTM as QuantizedLSTM
from torch.ao.quantization import quantize_dynamic

import fastlstm

from ..module_pairs import assert_same, data

X = data(5, 2, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def initialise(module: nn.Module) -> None:
    """An initialiser for `model.apply`, as in many training scripts."""
    if isinstance(module, nn.LSTM):
        torch.manual_seed(1)
        for name, weight in module.named_parameters():
            nn.init.orthogonal_(weight) if "weight" in name else nn.init.ones_(weight)


def test_initialise_then_convert():
    ours, theirs = fastlstm.convert(Model().apply(initialise)), Model().apply(initialise)
    assert ours.lstm.bias_ih_l0.eq(1).all()
    assert_same(ours, theirs, X)


def test_initialisers_apply_to_models_built_under_the_patch():
    with fastlstm.patch_torch():
        ours = Model().apply(initialise)
    assert type(ours.lstm) is fastlstm.LSTM
    assert_same(ours, Model().apply(initialise), X)


@pytest.mark.filterwarnings("ignore")
def test_convert_to_torch_then_quantize():
    model = fastlstm.convert(Model().float())
    quantized = quantize_dynamic(fastlstm.convert(model, to="torch"), {nn.LSTM, nn.Linear})
    assert type(quantized.lstm) is QuantizedLSTM
    torch.testing.assert_close(quantized(X.float()), Model().float()(X.float()), rtol=0.1, atol=0.02)


def test_convert_to_torch_for_a_tool_that_keys_on_the_type():
    counters = {nn.LSTM: lambda m: sum(w.numel() for w in m.parameters()), nn.Linear: lambda m: m.weight.numel()}

    def count(model):
        return sum(counters[type(m)](m) for m in model.modules() if type(m) in counters)

    model = fastlstm.convert(Model())
    assert count(model) == 8 < count(fastlstm.convert(model, to="torch")) == count(Model())


class MaskedRunner(nn.Module):
    """As in libraries with a custom LSTM: torch's gets a call per segment, theirs gets the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)

    def forward(self, x, starts):
        if not isinstance(self.lstm, nn.LSTM):
            return self.lstm(x, mask=starts)[0]
        pieces, bounds = [], [*starts.any(0).nonzero()[:, 0].tolist(), x.shape[1]]
        for start, stop in zip([0, *bounds], bounds, strict=False):
            if stop > start:
                pieces.append(self.lstm(x[:, start:stop])[0])
        return torch.cat(pieces, 1)


def test_library_checking_types_at_the_call_runs_under_the_patch():
    starts, x = torch.zeros(2, 5, dtype=torch.bool), X.transpose(0, 1)
    starts[:, 2] = True
    expected = MaskedRunner()(x, starts)
    ours = fastlstm.convert(MaskedRunner())
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        ours(x, starts)
    with fastlstm.patch_torch():
        torch.testing.assert_close(ours(x, starts), expected)


def test_compile_outside_of_the_patch():
    """torch.compile does not compile modules that are instances of nn.LSTM at the first call."""
    torch._dynamo.reset()
    with fastlstm.patch_torch():
        ours = Model()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
            torch.compile(ours, backend="aot_eager", fullgraph=True)(X)
        with torch._dynamo.config.patch(allow_rnn=True):
            output = torch.compile(ours, backend="aot_eager", fullgraph=True)(X)
    torch.testing.assert_close(output, Model()(X))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(X), Model()(X))


class Recurrent(abc.ABC, nn.RNNBase):
    """A library's base class, which calls the next forward by super()."""

    @abc.abstractmethod
    def start(self, x): ...

    def forward(self, x, hx=None):
        return super().forward(2 * x, self.start(x) if hx is None else hx)


LIBRARY = """
from torch import nn
from torch.nn import LSTM as Early
from {test} import Recurrent

class LSTM(Recurrent, nn.LSTM):
    def start(self, x):
        ones = x.new_ones(1, x.shape[1], self.hidden_size)
        return ones, ones

class Cell(nn.LSTMCell):
    pass

def model():
    return nn.ModuleDict(dict(
        tower=nn.Sequential(LSTM(3, 4), nn.Linear(4, 4)), cell=Cell(3, 4), plain=nn.LSTM(3, 4),
    )).double()
"""


def library(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(LIBRARY.format(test=__name__), module.__dict__)
    return module


def test_subclasses_are_not_converted_and_are_named():
    lib = library("lib")
    model = lib.model()
    with pytest.warns(UserWarning, match="leaves subclasses") as found:
        assert fastlstm.convert(model) is model
    assert len(found) == 1
    assert found[0].filename == __file__
    message = str(found[0].message)
    assert message.startswith("convert leaves subclasses of torch.nn.LSTM and torch.nn.LSTMCell as they are: ")
    assert "tower.0 (lib.LSTM), cell (lib.Cell)." in message
    assert "plain" not in message
    assert [type(m) for m in (model["tower"][0], model["cell"], model["plain"])] == [lib.LSTM, lib.Cell, fastlstm.LSTM]
    with pytest.warns(UserWarning, match=r"the module itself \(lib\.LSTM\)"):
        fastlstm.convert(lib.LSTM(3, 4))


def test_complete_conversion_does_not_warn():
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    model = nn.ModuleList([Model(), fastlstm.LSTM(3, 4), nn.GRU(3, 4), nn.LSTMCell(3, 4), lstm])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for to in ("fastlstm", "fastlstm", "torch", "torch"):
            fastlstm.convert(model, to)


def test_subclasses_defined_under_the_patch_run_on_fastlstm(backend):
    theirs = library("lib").LSTM(3, 4, dtype=torch.float64)
    with fastlstm.patch_torch():
        ours = library("patched").LSTM(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, fastlstm.LSTM)
    assert_same(ours, theirs, X)
    with pytest.warns(UserWarning, match=r"subclasses of fastlstm.LSTM .*the module itself \(patched\.LSTM\)"):
        fastlstm.convert(ours, to="torch")


def test_names_imported_before_the_patch_are_not_patched():
    lib = library("lib")
    with fastlstm.patch_torch():
        assert not isinstance(lib.Early(3, 4), fastlstm.LSTM)
        assert library("later").Early is fastlstm.LSTM
        assert type(fastlstm.convert(lib.Early(3, 4))) is fastlstm.LSTM
