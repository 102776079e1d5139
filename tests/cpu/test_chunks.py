"""Long batches, which the native backend runs in chunks of steps, against the reference."""

from dataclasses import replace

import pytest
import torch

import fastlstm
from fastlstm import reference
from fastlstm.accuracy import Precision, max_error
from fastlstm.backends import native

from ..cases import Case, tensors
from ..runners import check, expected
from .plans import plan_of

# More than three times the steps that one chunk of backward holds at this H.
T, B, I, H = 900, 4, 3, 160  # noqa: E741


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("masks", ["plain", "lengths", "resets", "lengths and resets"])
def test_chunked_equals_reference(bidirectional, masks):
    torch.manual_seed(0)
    if native.extension is not None:
        chunk_steps = plan_of(Case(T=T, B=B, I=I, H=H, dtype=torch.float64))["backward"]["chunk_steps"]
        assert 3 * chunk_steps < T
    lstm = fastlstm.LSTM(I, H, bidirectional=bidirectional, dtype=torch.float64)
    D = 1 + bidirectional
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(D, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([T, 17, 500, 0]) if "lengths" in masks else None
    reset_mask = torch.rand(T, B) < 0.01 if "resets" in masks else None

    def results(backend):
        with fastlstm.use_backend(backend):
            y, (h, c) = lstm(x, hx, lengths=lengths, reset_mask=reset_mask)
            with torch.no_grad():
                inferred = lstm(x, hx, lengths=lengths, reset_mask=reset_mask)[0]
        loss = (y * y).sum() + h.sum() + c.sum()
        return [y, h, c, inferred, *torch.autograd.grad(loss, [x, *hx, *lstm.parameters()])]

    for ours, correct in zip(results("auto"), results("eager"), strict=True):
        torch.testing.assert_close(ours, correct, rtol=1e-9, atol=1e-10)


# Max terms of a running sum in the CPU kernels: the largest KC of a GEMM, that of the
# baseline instruction set (csrc/cpu/gemm.h). Longer sums are blockwise.
BLOCKWISE = replace(Precision.of(torch.float32), max_running_sum=512)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=8, B=16, I=8192, H=64),
        Case(T=1, B=3, I=200_000, H=4, x_scale=1e-2),
        Case(T=40, B=2, I=8192, H=32),
        *(Case(T=1, B=B, I=520, H=512) for B in (1, 3, 7, 12)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_long_sums_are_blockwise(case, backend):
    """Some MKL GEMMs of few rows use running sums on AMD CPUs."""
    check(case, backend, BLOCKWISE)


def test_running_sum_over_a_long_row_is_detected():
    """A running sum exceeds the bound of `test_long_sums_are_blockwise`."""
    case = Case(T=1, B=3, I=200_000, H=4, x_scale=1e-2)
    case_tensors = tensors(case)
    weights = {name: weight.detach() for name, weight in case_tensors.weights.items()}
    terms = (case_tensors.input[0].detach()[:, None] * weights["weight_ih_l0"]).permute(2, 0, 1).contiguous()
    sums = torch.zeros(3, 16)
    for k in range(case.I):
        sums += terms[k]
    h, _ = reference.cell(sums + weights["bias_ih_l0"] + weights["bias_hh_l0"], torch.zeros(3, 4))
    correct, bounds = expected(case, BLOCKWISE)
    assert max_error(h[None], correct["output"]) > bounds["output"]


@pytest.mark.parametrize(
    "case",
    [
        Case(T=120, B=256, I=1, H=1, hx="tuple"),
        Case(T=63, B=4096, I=1, H=1),
        Case(T=80, B=256, I=3, H=2, hx="tuple", bidirectional=True),
        Case(T=80, B=256, I=2, H=6, proj=2, lengths=tuple(80 - k % 9 for k in range(256)), hx="tuple"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_weight_gradients_of_many_rows(case, backend):
    """More rows than one GEMM sums: 2.5 ulp of float32, where one GEMM over 256,000 rows had an error of 56 ulp."""
    plan = plan_of(case)["backward"]
    assert plan["dw_ih"]["float64"], plan["text"]
    assert plan["dw_hh"]["float64"], plan["text"]
    check(case, backend, replace(Precision.of(torch.float32), max_running_sum=4096))


@pytest.fixture
def blas_is_slow_at_unaligned_rows():
    """Set what plans assume of the BLAS, whatever this machine's is."""
    if native.extension is None:
        pytest.skip(native.load_error)
    yield native.extension.force_blas_is_slow_at_unaligned_rows
    native.extension.force_blas_is_slow_at_unaligned_rows(None)


# With T = 80 two chunks, whose dW is a sum; dx of two directions is one.
ALIGNED = [
    Case(T=80, B=20, I=301, H=300),
    Case(T=14, B=20, I=300, H=301, bidirectional=True, hx="tuple"),
    Case(T=15, B=20, I=257, H=302, proj=260),
    Case(T=80, B=30, I=257, H=290, lengths=tuple(range(10, 40)), bidirectional=True),
    Case(T=80, B=20, I=299, H=300, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", ALIGNED, ids=str)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_aligned_results_of_blas(case, backend, blas_is_slow_at_unaligned_rows, poisoned_empty):
    blas_is_slow_at_unaligned_rows(True)
    plan = plan_of(case)["backward"]
    if plan["engine"] == "bf16_products":
        pytest.skip("bfloat16 is multiplied as such on this CPU")
    assert plan["chunk_steps"] < case.T or case.T < 80, plan["text"]
    kinds = [plan["dx"], *(plan[name]["gemm"] for name in ("dw_ih", "dw_hh", "dw_hr") if name in plan)]
    assert kinds == ["aligned_blas"] * len(kinds), plan["text"]
    check(case, backend)


def test_aligned_results_are_copied_once(blas_is_slow_at_unaligned_rows):
    """dx of each chunk, dW_ih and dW_hh: what the plan says is done."""
    case = ALIGNED[0]
    chunks = -(-case.T // plan_of(case)["backward"]["chunk_steps"])
    lstm = fastlstm.LSTM(case.I, case.H)
    x = torch.randn(case.T, case.B, case.I, requires_grad=True)

    def copies(slow):
        blas_is_slow_at_unaligned_rows(slow)
        with fastlstm.use_backend("native"):
            y = lstm(x)[0]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
        return sum(event.name == "aten::copy_" for event in profile.events())

    assert chunks > 1
    assert copies(True) - copies(False) == chunks + 2


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"proj_size": 3}, {"bidirectional": True, "proj_size": 3}], ids=str
)
@pytest.mark.parametrize("rows", [97, 150, 192])
@pytest.mark.parametrize("recompute", [False, 2])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_many_short_rows_and_a_longer_one(rows, options, recompute, backend):
    """More rows in a step than one row block, but few rows in total."""
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(5, 7, dtype=torch.float64, **options)
    lstm.recompute = recompute
    x = torch.randn(4, rows, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.ones(rows, dtype=torch.long)
    lengths[0] = min(4, 193 - rows)

    def results(name):
        with fastlstm.use_backend(name):
            y, (h, c) = lstm(x, lengths=lengths)
        return [y, h, c, *torch.autograd.grad((y * y).sum() + h.sum() + c.sum(), [x, *lstm.parameters()])]

    for ours, correct in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(ours, correct, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masks", ["plain", "lengths", "lengths and resets"])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_dgates_in_place_of_dx_over_several_chunks(masks, backend):
    """They are then stored in dx, from which weight gradients are computed."""
    torch.manual_seed(0)
    T, B, I, H = 90, 60, 3, 66  # noqa: E741
    case = Case(T=T, B=B, I=I, H=H, dtype=torch.float64)
    assert plan_of(case)["backward"]["chunk_steps"] < T / 2
    lengths = torch.randint(0, T + 1, (B,)) if "lengths" in masks else None
    resets = torch.rand(T, B) < 0.02 if "resets" in masks else None
    x, weights = torch.randn(T, B, I, dtype=torch.float64), [w.detach() for w in tensors(case).weights.values()]
    ops = torch.ops.fastlstm
    y, _, _, cells, reserve = ops.native_layer(x, None, None, weights, lengths, resets, True, True)
    grads, needs = [torch.randn_like(y), None, None, None], [True, False, False, *[True] * len(weights)]
    saved = (x, None, None, weights, lengths, resets, y, cells, reserve)
    dx, _, _, dw = ops.native_layer_backward(*grads, *saved, needs)
    dgates, _, _, same_dw = ops.native_layer_backward(*grads, *saved, [*needs, True])
    torch.testing.assert_close(dgates @ weights[0], dx)
    torch.testing.assert_close(same_dw, dw, rtol=0, atol=0)
