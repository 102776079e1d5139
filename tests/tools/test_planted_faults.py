"""The comparison of tests/runners.py detects small planted faults of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastlstm

from ..cases import Case, Tensors, tensors
from ..runners import Results, call_fastlstm, compare, precision, require, results_of, run_backend

CASE = Case(T=9, B=5, I=12, H=33, proj=7, hx="tuple")
LEAVES = ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")


@pytest.fixture(params=["native", "eager"])
def backend(request):
    require(request.param, Case())
    return request.param


def altered(case: Case, backend: str, alter: Callable[[Tensors], None]) -> Results:
    """The backend's results for modified tensors of the case."""
    case_tensors = tensors(case)
    with torch.no_grad():
        alter(case_tensors)
    with fastlstm.use_backend(backend):
        return results_of(case, case_tensors, call_fastlstm)


def assert_found(case: Case, backend: str, results: Results, *names: str, fault: str = "the fault") -> None:
    """Assert that the comparison fails and names these results."""
    try:
        compare(case, results, precision(case.dtype, backend), backend)
    except AssertionError as error:
        found = str(error)
    else:
        pytest.fail(f"{fault} was not found in {case!r}")
    for name in names:
        assert f"  {name}: error" in found, f"{fault}: {found}"


def few_bits(t: Tensor, bits: int) -> Tensor:
    """Round float32 to `bits` of mantissa."""
    drop = 23 - bits
    return ((t.contiguous().view(torch.int32) + (1 << (drop - 1))) >> drop << drop).view(torch.float32)


@pytest.mark.parametrize("leaf", LEAVES)
def test_relative_gradient_error_of_2_to_the_minus_17_is_detected(leaf, backend):
    results = run_backend(CASE, backend)
    results[f"d {leaf}"] *= 1 + 2.0**-17
    assert_found(CASE, backend, results, f"d {leaf}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["bias_ih_l0", "bias_hh_l0"])
def test_missing_bias_is_detected(bias, dtype, backend):
    case = replace(CASE, dtype=dtype)
    results = altered(case, backend, lambda case_tensors: case_tensors.weights[bias].zero_())
    assert_found(case, backend, results, "output", "h_n", "c_n", "d weight_hh_l0")


@pytest.mark.parametrize("bits", [23, 7])
def test_one_percent_error_of_a_weight_gradient_element_is_detected(bits, backend):
    """An element of typical size."""
    case = CASE if bits == 23 else replace(CASE, dtype=torch.bfloat16)
    results = run_backend(case, backend)
    grad = results["d weight_hh_l0"].view(-1)
    part = 0.01 if bits == 23 else 0.5  # bfloat16 has two decimal digits
    grad[grad.abs().argsort()[len(grad) * 3 // 4]] *= 1 + part
    assert_found(case, backend, results, "d weight_hh_l0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_accumulation_is_detected(dtype, backend):
    """x W_ih^T accumulated in bfloat16; the backend multiplies the sum by the identity."""
    case = Case(T=2, B=3, I=4096, H=8, x_scale=0.02, dtype=dtype, used=())

    def presummed(case_tensors: Tensors) -> None:
        terms = case_tensors.input[:, :, None] * case_tensors.weights["weight_ih_l0"]  # [T, B, 4H, I]
        sums = torch.zeros(terms.shape[:-1], dtype=torch.bfloat16)
        for k in range(case.I):
            sums += terms[..., k].bfloat16()
        case_tensors.input.zero_()[..., : 4 * case.H] = sums.to(dtype)
        case_tensors.weights["weight_ih_l0"].zero_()[:, : 4 * case.H] = torch.eye(4 * case.H)

    compare(case, run_backend(case, backend), precision(case.dtype, backend), backend)
    assert_found(case, backend, altered(case, backend, presummed), "output", "c_n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_ignored_reset_is_detected(bidirectional, dtype, backend):
    resets = ((0, 0), (3, 0), (4, 1), (7, 3))
    case = replace(CASE, resets=resets, bidirectional=bidirectional, dtype=dtype)
    for reset in resets:
        ignored = replace(case, resets=tuple(other for other in resets if other != reset))
        assert_found(case, backend, run_backend(ignored, backend), "output", fault=f"no reset at {reset}")


@pytest.mark.parametrize("factor", ["x", "h0", "weight_ih_l0", "weight_hh_l0", "weight_hr_l0"])
def test_tf32_rounding_of_one_operand_is_detected(factor, backend):
    def rounded(case_tensors: Tensors) -> None:
        case_tensors.leaves[factor].copy_(few_bits(case_tensors.leaves[factor], 10))

    assert_found(CASE, backend, altered(CASE, backend, rounded), "output")
