"""convert and patch_torch on whole models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastlstm

from ..module_pairs import data


class Tagger(nn.Module):
    """LSTMs at several depths, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.0)
        self.blocks = nn.ModuleList([nn.Linear(8, 4), nn.ModuleDict({"cell": nn.LSTMCell(4, 4)})])
        self.decoder = nn.LSTM(4, 4, proj_size=2)
        self.again = self.decoder
        self.gru = nn.GRU(2, 2)

    def forward(self, x):
        x, _ = self.encoder(x)
        x = self.blocks[0](x)
        x = torch.stack([self.blocks[1]["cell"](step)[0] for step in x])
        x, _ = self.decoder(x)
        x, _ = self.again(torch.cat([x, x], -1))
        return self.gru(x)[0]


def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger().double()


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(x).pow(2).sum().backward()
    return {name: w.grad.clone() for name, w in module.named_parameters()}


def test_convert_keeps_everything_but_the_class():
    converted, x = model(), data(5, 2, 3)
    before, expected = gradients(converted, x), converted(x)
    objects = [(name, id(m)) for name, m in converted.named_modules()]
    parameters = [(name, id(w)) for name, w in converted.named_parameters()]
    assert fastlstm.convert(converted) is converted
    assert [(name, id(m)) for name, m in converted.named_modules()] == objects
    assert [(name, id(w)) for name, w in converted.named_parameters()] == parameters
    for module in (converted.encoder, converted.decoder):
        assert type(module) is fastlstm.LSTM
    assert type(converted.blocks[1]["cell"]) is fastlstm.LSTMCell
    assert type(converted.gru) is nn.GRU
    assert converted.again is converted.decoder
    torch.testing.assert_close(converted(x), expected)
    torch.testing.assert_close(gradients(converted, x), before)
    assert repr(converted) == repr(model())


def test_convert_round_trip():
    converted, x = model(), data(5, 2, 3)
    expected = converted(x)
    fastlstm.convert(fastlstm.convert(converted), to="torch")
    assert {type(m) for m in converted.modules()} == {type(m) for m in model().modules()}
    assert torch.equal(converted(x), expected)
    fastlstm.convert(converted, to="torch")  # a second conversion has no effect
    assert type(converted.encoder) is nn.LSTM


def test_convert_of_the_module_itself():
    lstm = nn.LSTM(3, 4)
    assert fastlstm.convert(lstm) is lstm
    assert type(lstm) is fastlstm.LSTM
    assert lstm(torch.zeros(2, 1, 3), lengths=[1])[0].shape == (2, 1, 4)


def test_convert_keeps_mode_hooks_buffers_and_attributes():
    lstm, calls = nn.LSTM(3, 4, 2, dropout=0.5).eval(), []
    lstm.register_forward_hook(lambda *_: calls.append("forward"))
    lstm.register_full_backward_hook(lambda *_: calls.append("backward"))
    lstm.register_buffer("steps", torch.tensor(3))
    lstm.note = "mine"
    lstm.weight_hh_l0.requires_grad_(False)
    fastlstm.convert(lstm)
    lstm(torch.zeros(2, 1, 3))[0].sum().backward()
    assert calls == ["forward", "backward"]
    assert not lstm.training
    assert lstm.note == "mine"
    assert "steps" in lstm.state_dict()
    assert lstm.weight_hh_l0.grad is None
    assert lstm.weight_hh_l1.grad is not None


def test_convert_of_parametrized_and_pruned_modules():
    lstm, x = nn.LSTM(3, 4, dtype=torch.float64), data(4, 2, 3)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    prune.l1_unstructured(lstm, "weight_ih_l0", amount=0.5)
    expected = lstm(x)[0]
    fastlstm.convert(lstm)
    assert isinstance(lstm, fastlstm.LSTM)
    torch.testing.assert_close(lstm(x)[0], expected)
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original1.grad is not None
    fastlstm.convert(lstm, to="torch")
    assert isinstance(lstm, nn.LSTM)
    torch.testing.assert_close(lstm(x)[0], expected)


def test_convert_of_a_module_that_has_weights_from_an_optimizer():
    converted, x = model(), data(5, 2, 3)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    fastlstm.convert(converted)
    before = converted(x)
    gradients(converted, x)
    optimizer.step()
    assert not torch.allclose(converted(x), before)


def test_subclasses_are_not_converted():
    class Mine(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    module = nn.ModuleList([Mine(3, 4), nn.LSTM(3, 4)])
    with pytest.warns(UserWarning, match=r"leaves subclasses .*Mine\)"):
        fastlstm.convert(module)
    assert type(module[0]) is Mine
    assert type(module[1]) is fastlstm.LSTM


def test_convert_refuses_another_target():
    with pytest.raises(ValueError, match='to must be "fastlstm" or "torch", got \'onnx\''):
        fastlstm.convert(nn.LSTM(3, 4), to="onnx")


def test_patch_torch_as_a_context():
    before = nn.LSTM, nn.LSTMCell
    with fastlstm.patch_torch():
        assert nn.LSTM is nn.modules.LSTM is nn.modules.rnn.LSTM is fastlstm.LSTM
        assert nn.LSTMCell is nn.modules.LSTMCell is fastlstm.LSTMCell
        patched, x = model(), data(5, 2, 3)
        assert isinstance(patched.encoder, nn.LSTM)
        assert type(patched.blocks[1]["cell"]) is fastlstm.LSTMCell
    assert (nn.LSTM, nn.LSTMCell) == before
    assert nn.modules.rnn.LSTM is before[0]
    assert type(model().encoder) is nn.LSTM
    torch.testing.assert_close(patched(x), model()(x))


def test_patch_torch_is_undone_by_an_error():
    before = nn.LSTM
    with pytest.raises(KeyError), fastlstm.patch_torch():
        raise KeyError
    assert nn.LSTM is before


def test_patched_contexts_nest():
    before = nn.LSTM
    with fastlstm.patch_torch():
        with fastlstm.patch_torch():
            assert nn.LSTM is fastlstm.LSTM
        assert nn.LSTM is fastlstm.LSTM
        assert type(fastlstm.convert(nn.LSTM(3, 4), to="torch")) is before
    assert nn.LSTM is before


def test_patch_torch_as_a_function_persists():
    program = (
        "import torch, fastlstm; fastlstm.patch_torch(); from torch.nn import LSTM, LSTMCell\n"
        "assert LSTM is torch.nn.LSTM is fastlstm.LSTM and LSTMCell is fastlstm.LSTMCell\n"
        "assert isinstance(LSTM(3, 4), torch.nn.LSTM) and LSTM(3, 4)(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
