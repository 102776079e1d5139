"""One inf, NaN, huge or denormal number in x, h0, c0 or a weight: results are finite, inf and NaN as in nn.LSTM.

Results and every gradient, in float64 (where nn.LSTM runs ATen's own kernels) and in float32 and bfloat16 (oneDNN's).
tests/adversarial.py has the exemptions: products with zeros that are skipped, after a length and at a reset.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import fastlstm

INF = float("inf")
PLACES = ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
# Kernels for one step and for several, unpacked and packed weights, and a projection.
SHAPES = {"T1-B1": (1, 1, 3, 5, {}), "T1-B6": (1, 6, 3, 5, {}), "T4-B3": (4, 3, 3, 5, {}), "T20-B4": (20, 4, 2, 17, {}),
          "bidirectional": (4, 3, 3, 5, {"bidirectional": True}), "proj": (4, 3, 3, 5, {"proj_size": 2})}  # fmt: skip


def values(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    return [INF, -INF, float("nan"), info.max / 1e8, -info.max / 1e8, info.smallest_normal / 64]


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 NaN."""
    return 1 * (t == INF) + 2 * (t == -INF) + 3 * t.isnan()


def results(lstm: nn.Module, x: Tensor, hx: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, *hx)]
    y, (h_n, c_n) = lstm(leaves[0], (leaves[1], leaves[2]))
    slopes = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
    names, weights = zip(*lstm.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * slopes).sum() + h_n.sum() + c_n.sum(), [*leaves, *weights])
    return dict(zip(["y", "h_n", "c_n", "dx", "dh0", "dc0", *names], [y, h_n, c_n, *grads], strict=True))


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
@pytest.mark.parametrize("value", [INF, float("nan")])
def test_identity_as_input_weight(backend, value):
    """Its zeros are multiplied as any other weight's: 0 * inf and 0 * NaN are NaN."""
    theirs, ours = nn.LSTM(20, 5), fastlstm.LSTM(20, 5)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(20))
    ours.load_state_dict(theirs.state_dict())
    dy = torch.ones(3, 2, 5)
    dy[2, 0, 1] = value
    x = torch.randn(3, 2, 20, requires_grad=True)
    expected, dx = (torch.autograd.grad(module(x)[0], x, dy)[0] for module in (theirs, ours))
    assert torch.equal(kinds(dx), kinds(expected))


def keep_from_zero(modules: Iterable[nn.Module], c0: Tensor) -> None:
    """Give c, and so h without a projection, the same sign in all steps, per unit: at a zero, whose product with inf
    is NaN, or a change of sign rounding decides what follows."""
    signs = torch.ones(c0.shape[-1])
    signs[::2] = -1
    c0.copy_(c0.abs() * signs)
    with torch.no_grad():
        for module in modules:
            for name, bias in module.named_parameters():
                if name.startswith("bias_ih"):
                    bias.view(4, -1)[2] += 3 * signs.to(bias.dtype)  # tanh of the cell's candidate: close to +-1


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_non_finite_number_reaches_the_same_results_as_in_nn_lstm(backend, shape, dtype):
    T, B, I, H, options = SHAPES[shape]  # noqa: E741
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, **options).to(dtype)
    ours = fastlstm.LSTM(I, H, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    D = 1 + theirs.bidirectional
    inputs = {"x": torch.randn(T, B, I), "h0": torch.randn(D, B, theirs.proj_size or H), "c0": torch.randn(D, B, H)}
    keep_from_zero((theirs, ours), inputs["c0"])
    for place in PLACES:
        for k, value in enumerate(values(dtype)):
            tensors = {name: t.to(dtype) for name, t in inputs.items()}
            saved = theirs.state_dict()[place].clone() if place not in inputs else None
            for module in (theirs, ours):
                target = tensors[place] if saved is None else getattr(module, place).data
                target.view(-1)[(3 + 7 * k) % target.numel()] = value
            expected = results(theirs, tensors["x"], (tensors["h0"], tensors["c0"]))
            collected = results(ours, tensors["x"], (tensors["h0"], tensors["c0"]))
            for module in (theirs, ours):
                if saved is not None:
                    getattr(module, place).data.copy_(saved)
            for name, wanted in expected.items():
                assert torch.equal(kinds(collected[name]), kinds(wanted)), f"{value} in {place}: {name}"
