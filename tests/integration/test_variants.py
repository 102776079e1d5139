"""Recurrent dropout, zoneout and layer normalization under torch.compile, torch.export and threads; weight drop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastlstm

VARIANTS = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "layer_norm": {"layer_norm": True},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "layer_norm": True, "num_layers": 2, "bidirectional": True},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lstm_of(**kwargs):
    torch.manual_seed(3)
    return fastlstm.LSTM(4, 8, **kwargs)


@every_variant
def test_compile_without_a_break(kwargs):
    """Evaluation equals the uncompiled module; in training masks are drawn anew at every call of the graph."""
    lstm, x = lstm_of(**kwargs), torch.randn(6, 3, 4)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    first, second = compiled(x)[0], compiled(x)[0]
    assert torch.equal(first, second) == (kwargs.keys() == {"layer_norm"})
    second.sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())
    lstm.eval()
    found, truth = compiled(x)[0], lstm(x)[0]
    torch.testing.assert_close(found, truth)
    grads = [torch.autograd.grad(y.pow(2).sum(), list(lstm.parameters())) for y in (found, truth)]
    torch.testing.assert_close(*grads)


def test_inductor(inductor_cache):
    lstm, x = lstm_of(**VARIANTS["all"]), torch.randn(6, 3, 4)
    compiled = torch.compile(lstm, fullgraph=True)
    compiled(x)[0].sum().backward()
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    lstm.eval()
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])


@every_variant
def test_export(kwargs):
    lstm, x = lstm_of(**kwargs).eval(), torch.randn(6, 3, 4)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(lstm, (x,), dynamic_shapes=({0: T, 1: B},))
    other = torch.randn(9, 5, 4)
    torch.testing.assert_close(program.module()(other), lstm(other))


# ---- Weight drop and weight norm: docs/recipes.md.


class WeightDrop(nn.Module):
    """Zeroes elements of a weight in training, and scales the others: Merity et al. 2018."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, weight):
        return nn.functional.dropout(weight, self.p, self.training)


def dropped_lstm(p=0.5):
    lstm = lstm_of()
    parametrize.register_parametrization(lstm, "weight_hh_l0", WeightDrop(p))
    return lstm


def test_weight_drop():
    lstm, x = dropped_lstm(), torch.randn(6, 3, 4)
    weight = lstm.parametrizations.weight_hh_l0.original
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    torch.manual_seed(9)
    output, _ = lstm(x)
    torch.manual_seed(9)
    masked = nn.functional.dropout(weight, 0.5)
    plain = lstm_of()
    with torch.no_grad():
        plain.weight_hh_l0.copy_(masked)
    torch.testing.assert_close(output, plain(x)[0])
    output.sum().backward()
    assert torch.equal(weight.grad == 0, masked == 0)  # a dropped weight gets no gradient
    lstm.eval()
    plain.load_state_dict({**plain.state_dict(), "weight_hh_l0": weight.detach()})
    assert torch.equal(lstm(x)[0], plain(x)[0])


def test_weight_drop_in_threads():
    """Each call has one weight of its own, whatever other threads do."""
    lstm, x = dropped_lstm(), torch.randn(6, 3, 4)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: lstm(x)[0].detach(), range(64)))
    assert all(output.isfinite().all() for output in outputs)
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 64


def test_weight_drop_compiled():
    lstm, x = dropped_lstm(), torch.randn(6, 3, 4)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    compiled(x)[0].sum().backward()
    assert (lstm.parametrizations.weight_hh_l0.original.grad == 0).float().mean() > 0.3


def test_weight_norm():
    lstm, x = lstm_of(), torch.randn(6, 3, 4)
    expected = lstm(x)[0]
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    torch.testing.assert_close(lstm(x)[0], expected)
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.shape == (32, 1)
