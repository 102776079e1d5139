"""Results on the GPU against the float64 reference at every dtype and precision, to within rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlstm

from ..cases import Case, tensors
from ..runners import assert_accurate
from .gpu_support import (
    BFLOAT16,
    HALF,
    IEEE,
    PRECISIONS,
    TF32,
    Arithmetic,
    backends,
    check,
    check_variant,
    expected,
    gpu,
    nan_outside,
    on_device,
    ours,
    require,
    run,
    same,
    with_gradients,
)
from .variant_layers import LAYERS, NORMALIZED, VariantLayer

pytestmark = gpu

SIZES = (1, 17, 192, 500, 1024, 2048)
RAGGED = {"lengths": (9, 0, 4, 1, 9, 6, 2), "resets": ((0, 0), (3, 0), (2, 2), (8, 4), (5, 5), (7, 6))}
STACKED = Case(T=9, B=7, I=12, H=40, layers=2, bidirectional=True, hx="tuple")
ALL_OPTIONS = Case(T=9, B=7, I=12, H=40, bidirectional=True, layers=2, proj=8, hx="tuple", cells=True, **RAGGED)
FEATURES = (
    Case(T=9, B=7, I=12, H=40, bias=False, hx="tuple"),
    STACKED,
    Case(T=9, B=7, I=12, H=40, proj=20, layers=2, bidirectional=True, hx="tuple"),
    Case(T=9, B=7, I=12, H=41, proj=7, batch_first=True),
    Case(T=9, B=1, I=12, H=40, unbatched=True),
    Case(T=9, B=7, I=12, H=40, bidirectional=True, hx="tuple", cells=True),
    Case(T=9, B=7, I=12, H=40, bidirectional=True, hx="tuple", lengths=RAGGED["lengths"]),
    Case(T=9, B=7, I=12, H=40, bidirectional=True, hx="tuple", resets=RAGGED["resets"]),
    ALL_OPTIONS,
    Case(T=1, B=7, I=12, H=40, hx="tuple"),
    Case(T=9, B=7, I=12, H=40, hx="tuple", frozen=("weight_ih_l0", "bias_hh_l0"), x_grad=False),
    Case(T=9, B=7, I=12, H=40, hx="tuple", hx_grad=False, frozen=("weight_hh_l0", "bias_ih_l0")),
    Case(T=9, B=7, I=12, H=40, hx="tuple", used=("c_n",)),
    Case(T=9, B=7, I=12, H=40, hx="tuple", used=("h_n",), bidirectional=True),
)


@backends
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("H", SIZES)
def test_hidden_sizes(H, bidirectional, precision, backend):
    check(Case(T=6, B=13, I=33, H=H, bidirectional=bidirectional, hx="tuple"), precision, backend)


@backends
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case, precision, backend):
    check(case, precision, backend)


# Several blocks of features and of rows, at and off the vector width, next to the layers that the simulation runs.
VARIANTS = (
    *LAYERS,
    *NORMALIZED,
    VariantLayer(
        Case(T=9, B=37, I=12, H=192, bidirectional=True, hx="tuple", cells=True), "sequence", "flags", "flags"
    ),
    VariantLayer(Case(T=9, B=37, I=12, H=131, proj=65, hx="tuple", cells=True), "steps", "numbers", "number"),
    VariantLayer(Case(T=9, B=7, I=12, H=40, bidirectional=True, hx="tuple", **RAGGED), "steps", "flags", "numbers"),
    # more rows and features than a CTA of layer normalization has threads
    VariantLayer(Case(T=4, B=137, I=12, H=192, bidirectional=True, hx="tuple", cells=True), norm=True),
    VariantLayer(Case(T=9, B=37, I=12, H=131, proj=65, hx="tuple", cells=True), norm=True),
)


@backends
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layer", VARIANTS, ids=str)
def test_variants(layer, precision, backend):
    check_variant(layer, precision, backend)


@backends
@pytest.mark.parametrize("precision", [IEEE, TF32, HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("B", [1, 3, 31, 127, 6464])
def test_batches(B, precision, backend):
    check(Case(T=4, B=B, I=24, H=72), precision, backend)


@backends
def test_more_rows_than_grid_blocks(backend):
    """A grid has at most 65,535 blocks in its second dimension."""
    check(Case(T=2, B=66_001, I=2, H=256), IEEE, backend)


@backends
@pytest.mark.parametrize("precision", [IEEE, BFLOAT16], ids=str)
def test_more_steps_than_cudnn_supports(precision, backend):
    check(Case(T=70_000, B=2, I=3, H=8), precision, backend)


@backends
def test_more_than_2_to_the_32_elements(backend):
    """The first and last steps of a run whose gates have 2.2e9 elements equal separate runs of those steps."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free >> 30} GiB are free")
    case = Case(T=1060, B=512, I=8, H=1024, dtype=torch.bfloat16)
    require(backend, case)
    case_tensors = on_device(Case(T=1, B=1, I=8, H=1024, dtype=torch.bfloat16), torch.bfloat16)
    module = case.module(fastlstm.LSTM, case_tensors.weights)
    x = torch.randn(case.T, case.B, case.I, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with fastlstm.use_backend(backend):
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y[-1].float().sum(), x)
        # The state forgets: the last step depends on the previous 60 only, to within rounding.
        tail = x[-60:].detach().requires_grad_()
        y_tail, _ = module(tail)
        (dx_tail,) = torch.autograd.grad(y_tail[-1].float().sum(), tail)
        y_head, _ = module(x[:20])
    parts = {"last y": (y[-1], y_tail[-1]), "last dx": (dx[-20:], dx_tail[-20:]), "first y": (y[:20], y_head)}
    for part, (got, alone) in parts.items():
        scale = float(alone.abs().max())
        assert float((got - alone).abs().max()) <= 2**-5 * scale, part


@backends
@pytest.mark.parametrize("case", [STACKED, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("precision", [IEEE, BFLOAT16], ids=str)
def test_all_tensors_non_contiguous(case, precision, backend):
    """x, hx, weights and arriving gradients that are permuted, with NaN in gaps, give the results of dense ones."""
    case = case.to(precision.dtype)
    require(backend, case)
    dense = run(case, precision, backend)
    case_tensors = on_device(case, precision.dtype)
    case_tensors.input = nan_outside(case_tensors.leaves["x"])
    case_tensors.hx = tuple(nan_outside(state) for state in case_tensors.hx)
    weights = {name: nan_outside(weight) for name, weight in case_tensors.weights.items()}
    module = case.module(fastlstm.LSTM, {})
    options = {"lengths": case_tensors.lengths, "reset_mask": case_tensors.reset_mask, "return_cell_states": case.cells}

    def call():
        output, (h_n, c_n), *cells = torch.func.functional_call(
            module, weights, (case_tensors.input, case_tensors.hx), options
        )
        results = {"output": output, "h_n": h_n, "c_n": c_n, **({"cells": cells[0]} if cells else {})}
        return {name: _GapsInGradient.apply(result) for name, result in results.items()}

    with precision.flags(), fastlstm.use_backend(backend):
        gaps = with_gradients(case, case_tensors, call)
    eps = torch.finfo(precision.dtype).eps
    for name, value in dense.items():  # another layout may use another GEMM, with another order of sums
        limit = 16 * eps * float(value.abs().max())
        assert float((gaps[name].double() - value.double()).abs().max()) <= limit, name


class _GapsInGradient(torch.autograd.Function):
    """An identity whose backward returns a strided gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return nan_outside(grad)


@backends
@pytest.mark.parametrize("case", FEATURES, ids=str)
@pytest.mark.parametrize("precision", [IEEE, BFLOAT16], ids=str)
def test_poisoned_memory(case, precision, backend, poisoned_empty):
    """torch.empty gives NaN, in C++ too, so reads of uninitialized memory show as NaN."""
    check(case, precision, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_cell(dtype, backend):
    """LSTMCell against the layer of one step."""
    case = Case(T=1, B=37, I=20, H=48, hx="tuple", used=("h_n", "c_n"), dtype=dtype)
    require(backend, case)
    case_tensors = on_device(case, dtype)
    cell = fastlstm.LSTMCell(case.I, case.H, device="meta")
    for name, weight in case_tensors.weights.items():
        setattr(cell, name.removesuffix("_l0"), weight)

    def call():
        h, c = cell(case_tensors.input[0], tuple(state[0] for state in case_tensors.hx))
        return {"h_n": h[None], "c_n": c[None]}

    precision = Arithmetic(dtype)
    with precision.flags(), fastlstm.use_backend(backend):
        results = with_gradients(case, case_tensors, call)
    assert_accurate(results, *expected(case, precision.rounding(backend), "cuda"), f"{backend}, LSTMCell, {dtype}")


@backends
@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
def test_flags_of_tf32(rnn, matmul, backend):
    """Only the RNN flag applies, as in nn.LSTM; the matmul flag is ignored and restored."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    case = Case(T=8, B=64, I=256, H=256, bidirectional=True, hx="tuple")
    require(backend, case)
    mixed = Arithmetic(torch.float32, rnn, matmul)
    check(case, mixed, backend)
    with mixed.flags():
        run(case, mixed, backend)
        assert torch.backends.cuda.matmul.fp32_precision == matmul
    reference = run(case, Arithmetic(torch.float64), "reference")["output"]
    off = float((run(case, mixed, backend)["output"].double() - reference).abs().max())
    # TF32 keeps 10 bits of a factor, IEEE 23; the errors are orders of magnitude apart.
    assert (off > 1e-5) == (rnn == "tf32"), off


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend):
    """float32 weights and input: results of autocast's dtype, nn.LSTM's numbers, and gradients in float32.

    cuDNN's LSTM gives float16 whatever autocast's dtype is.
    """
    case = Case(T=9, B=7, I=12, H=40, bidirectional=True, hx="tuple")
    require(backend, case.to(dtype))
    results = {}
    for kind in ("ours", "theirs"):
        case_tensors = on_device(case, torch.float32)
        module = case.module(fastlstm.LSTM if kind == "ours" else nn.LSTM, case_tensors.weights)
        with fastlstm.use_backend(backend), torch.autocast("cuda", dtype):
            output, (h_n, c_n) = module(case_tensors.input, case_tensors.hx)
        leaves = list(case_tensors.grad_leaves().values())
        grads = torch.autograd.grad(output.float().square().sum() + c_n.float().sum(), leaves)
        results[kind] = {
            "output": output,
            "h_n": h_n,
            "c_n": c_n,
            **dict(zip(case_tensors.grad_leaves(), grads, strict=True)),
        }
    for name, theirs in results["theirs"].items():
        got = results["ours"][name]
        assert got.dtype == (dtype if name in ("output", "h_n", "c_n") else torch.float32), name
        limit = 16 * torch.finfo(dtype).eps * float(theirs.detach().abs().max())
        assert float((got - theirs).detach().abs().max()) <= limit, name


@backends
def test_backward_in_eval_mode(backend):
    """cuDNN refuses it."""
    case = Case(T=5, B=3, I=4, H=8, hx="tuple")
    require(backend, case)
    case_tensors = on_device(case, torch.float32)
    module = case.module(fastlstm.LSTM, case_tensors.weights).eval()

    def call():
        output, (h_n, c_n) = module(case_tensors.input, case_tensors.hx)
        return {"output": output, "h_n": h_n, "c_n": c_n}

    with IEEE.flags(), fastlstm.use_backend(backend):
        evaluated = with_gradients(case, case_tensors, call)
    same(evaluated, run(case, IEEE, backend))


@backends
def test_empty_batch(backend):
    case = Case(T=3, B=0, I=4, H=8, bidirectional=True)
    require(backend, case)
    case_tensors = on_device(case, torch.float32)
    with fastlstm.use_backend(backend):
        results = with_gradients(case, case_tensors, ours(case, case_tensors))
    assert results["output"].shape == (3, 0, 16)
    assert all(not results[f"d {name}"].any() for name in tensors(case).weights)
