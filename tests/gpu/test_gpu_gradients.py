"""Gradients on the GPU: gradcheck in float64, second order, any subset of inputs, and opcheck."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastlstm
from fastlstm import dispatch

from ..cases import Case
from .gpu_support import IEEE, backends, gpu, on_device, ours, require, run, same, with_gradients

pytestmark = gpu

SMALL = {"T": 3, "B": 2, "I": 2, "H": 4, "dtype": torch.float64, "hx": "tuple"}
DENSE = Case(**SMALL)
CASES = (
    DENSE,
    Case(**SMALL, bias=False, bidirectional=True),
    Case(**SMALL, proj=2, bidirectional=True, layers=2),
    Case(**SMALL, lengths=(0, 3), bidirectional=True),
    Case(**SMALL, lengths=(1, 3), resets=((0, 0), (2, 1)), proj=2, bidirectional=True, cells=True),
)


def function(case):
    """(f, its tensor inputs), where f maps all inputs and weights to all results of the layer."""
    case_tensors = on_device(case, torch.float64)
    names = list(case_tensors.weights)
    module = case.module(fastlstm.LSTM, case_tensors.weights)
    options = {"lengths": case_tensors.lengths, "reset_mask": case_tensors.reset_mask, "return_cell_states": case.cells}

    def f(x, h0, c0, *weights):
        swapped = dict(zip(names, weights, strict=True))
        output, states, *cells = torch.func.functional_call(module, swapped, (x, (h0, c0)), options)
        return (output, *states, *cells)

    x = torch.nan_to_num(case_tensors.leaves["x"].detach()).requires_grad_()
    return f, [x, *case_tensors.hx, *(w.detach().requires_grad_() for w in case_tensors.weights.values())]


@backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case, backend):
    require(backend, case)
    f, inputs = function(case)
    with fastlstm.use_backend(backend):
        assert gradcheck(f, inputs, fast_mode=True)


@backends
def test_gradcheck_in_full(backend):
    case = Case(**{**SMALL, "T": 2}, proj=2, cells=True)
    require(backend, case)
    f, inputs = function(case)
    with fastlstm.use_backend(backend):
        assert gradcheck(f, inputs)


@backends
def test_gradgradcheck(backend):
    """cuDNN has no double backward."""
    require(backend, DENSE)
    f, inputs = function(DENSE)
    with fastlstm.use_backend(backend):
        assert gradgradcheck(f, inputs, fast_mode=True)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, dtype, backend):
    case = case.to(dtype)
    require(backend, case)
    case_tensors = on_device(case, dtype)
    weights = list(case_tensors.weights.values())[: len(case_tensors.weights) // case.layers]
    D = case.directions
    h0, c0 = (state[:D].detach().requires_grad_() for state in case_tensors.hx)
    x = torch.nan_to_num(case_tensors.leaves["x"].detach()).requires_grad_()
    layer = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    torch.library.opcheck(layer, (x, h0, c0, weights, case_tensors.lengths, case_tensors.reset_mask, case.cells, True))
    torch.library.opcheck(layer, (x.detach(), None, None, [w.detach() for w in weights], None, None, False, False))


@backends
@pytest.mark.parametrize(("H", "proj"), [(8, 0), (8, 4), (200, 0), (300, 0)])
def test_backward_twice(H, proj, backend):
    """Tensors saved by forward are not overwritten."""
    case = Case(T=9, B=5, I=4, H=H, bidirectional=True, hx="tuple", proj=proj)
    require(backend, case)
    case_tensors = on_device(case, torch.float32)
    with fastlstm.use_backend(backend):
        results = ours(case, case_tensors)()
        loss = results["output"].square().sum() + results["c_n"].sum()
        leaves = list(case_tensors.grad_leaves().values())
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
def test_any_subset_of_gradients(backend):
    """Each gradient is independent of which others are needed."""
    case = Case(T=4, B=3, I=4, H=8, hx="tuple")
    require(backend, case)
    whole = run(case, IEEE, backend)
    names = [name.removeprefix("d ") for name in whole if name.startswith("d ")]
    for size in (1, 2, len(names) - 1):
        for wanted in combinations(names, size):
            case_tensors = on_device(case, torch.float32)
            for name, leaf in case_tensors.leaves.items():
                leaf.requires_grad_(name in wanted)
            with IEEE.flags(), fastlstm.use_backend(backend):
                results = with_gradients(case, case_tensors, ours(case, case_tensors))
            same(
                {f"d {name}": results[f"d {name}"] for name in wanted},
                {f"d {name}": whole[f"d {name}"] for name in wanted},
            )


def test_auto_selects_native_if_built_for_cuda():
    """Otherwise a broken build would skip the suite and pass."""
    extension = dispatch.BACKENDS["native"].extension
    if extension is None or "cuda" not in extension.devices():
        pytest.fail("fastlstm._C was not built for CUDA: FASTLSTM_BUILD=cuda pip install --no-build-isolation .")
    case_tensors = on_device(Case(), torch.float32)
    call = dispatch.describe(case_tensors.input, list(case_tensors.weights.values()), None, None)
    assert dispatch.BACKENDS["native"].supports(call) is None
