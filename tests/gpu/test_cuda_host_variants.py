"""Recurrent masks, zoneout and layer normalization in the CUDA backend, compiled as in tests/gpu/test_cuda_host.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastlstm
from fastlstm import dispatch
from fastlstm.accuracy import Precision
from fastlstm.ops.schema import LayerInputs

from ..cases import Case
from .test_cuda_host import DTYPES, backend, compiled  # noqa: F401
from .variant_layers import BOTH, LAYERS, NORMALIZED, RAGGED, VariantLayer, check, run

pytestmark = pytest.mark.toolchain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*LAYERS, *NORMALIZED], ids=str)
def test_parity(layer, dtype, backend, poisoned_empty):  # noqa: F811
    check(layer.to(dtype), backend, Precision.of(dtype))


@pytest.mark.parametrize(
    "variant", [("sequence", "", ""), ("", "flags", ""), ("", "", "number"), ("", "", "", True)], ids=str
)
def test_persistent_kernels_are_not_used(variant, backend):  # noqa: F811
    layer = VariantLayer(Case(T=9, B=5, I=3, H=40, hx="tuple", dtype=torch.bfloat16), *variant)
    expected = run(layer, backend, torch.bfloat16)
    torch.ops.fastlstm_cuda_host.persistent(True, "B")
    try:
        results = run(layer, backend, torch.bfloat16)
    finally:
        torch.ops.fastlstm_cuda_host.persistent(False, "")
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("proj", [0, 3])
@pytest.mark.parametrize("options", [{}, RAGGED, {"hx": "none"}], ids=["whole", "ragged", "zeros"])
@pytest.mark.parametrize(
    "variant",
    [("steps", "flags", "flags"), ("steps", "numbers", ""), ("", "", "numbers"), ("", "flags", "flags", True)],
    ids=str,
)
def test_h_is_recomputed_if_the_output_was_changed(variant, options, proj, backend, poisoned_empty):  # noqa: F811
    layer, results = VariantLayer(replace(BOTH, proj=proj, **options), *variant), []
    for in_place in (True, False):
        inputs, leaves = layer.inputs(torch.float64, "cpu")
        y = dispatch.layer(inputs, keep_cells=False)[0]
        y = y.tanh_() if in_place else y.tanh()
        results.append(torch.autograd.grad(y.sum(), list(leaves.values())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["recurrent_mask", "zoneout_h", "zoneout_c"])
@pytest.mark.parametrize("form", ["flags", "numbers"])
def test_masks_that_do_not_fit_the_vector_width(form, name, backend):  # noqa: F811
    """A mask misaligned by one element, or with rows that are: the kernels must fall back to scalar loads."""
    layer = VariantLayer(replace(BOTH, dtype=torch.float16), "steps", form, form)
    inputs, leaves = layer.inputs(torch.float16, "cpu")
    given = getattr(inputs, name)
    shifted = given.new_empty(given.numel() + 1)[1:].view(given.shape).copy_(given)
    padded = given.new_empty(*given.shape[:-1], given.shape[-1] + 1)[..., :-1].copy_(given)
    results = []
    for values in (given, shifted, padded):
        y, h_n, c_n, _ = dispatch.layer(inputs._replace(**{name: values}), keep_cells=False)
        grads = torch.autograd.grad([y.sum(), h_n.sum(), c_n.sum()], list(leaves.values()))
        results.append([y, h_n, c_n, *grads])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_flags_drop_nan(backend):  # noqa: F811
    """A step whose candidates are NaN and are all dropped leaves the state as it was."""
    x, flags = torch.ones(4, 2, 3), torch.zeros(1, 4, 2, 8, dtype=torch.bool)
    x[1, 0], flags[:, 1, 0] = float("nan"), True
    weights = [torch.full(size, 0.1) for size in ((32, 3), (32, 8))]
    inputs = LayerInputs(x, None, None, weights, zoneout_h=flags, zoneout_c=flags)
    y, _, _, cells = dispatch.layer(inputs, keep_cells=True)
    assert torch.equal(y[1, 0], y[0, 0])
    assert torch.equal(cells[1, 0], cells[0, 0])
    assert not y.isnan().any()


def test_module_options(backend):  # noqa: F811
    """LSTM(recurrent_dropout, zoneout) as a whole: the masks of a seed give the reference's results."""
    lstm = fastlstm.LSTM(3, 8, 2, bidirectional=True, recurrent_dropout=0.3, zoneout=(0.2, 0.1), dtype=torch.float64)
    x, results = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 4, 3), []
    for training in (True, False):
        lstm.train(training)
        for name in ("reference", backend):
            torch.manual_seed(7)
            with fastlstm.use_backend(name):
                y = lstm(x)[0]
                results.append((y, *torch.autograd.grad(y.square().sum(), list(lstm.parameters()))))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[3])
