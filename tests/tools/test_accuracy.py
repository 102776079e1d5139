"""The accuracy rule (fastlstm/accuracy.py): bounds allow rounding and no more."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm.accuracy import (
    _RULES,
    DEVIATIONS,
    TRUTH_UNIT,
    Precision,
    RandomRounding,
    compare,
    error_bounds,
    max_error,
)

from ..cases import random_case
from ..runners import run, run_torch

NAN, INF = float("nan"), float("inf")
SINGLE = Precision.of(torch.float32)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bound(run, precision: Precision = SINGLE) -> float:
    return error_bounds(lambda: {"result": run()}, precision)[1]["result"]


@pytest.mark.parametrize(
    ("got", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([-3.0], [1.0], 4.0),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([NAN, 1.0], [0.0, 1.0], None),
        ([0.0, 1.0], [NAN, 1.0], None),
        ([INF], [-INF], None),
        ([], [], 0.0),
        ([[1.0]], [1.0], None),
    ],
    ids=str,
)
def test_max_error(got, reference, expected):
    off = max_error(torch.tensor(got), torch.tensor(reference, dtype=torch.float64))
    assert off > 1e300 if expected is None else off == expected


@pytest.mark.parametrize("K", [1, 16, 400, 6000])
@pytest.mark.parametrize("kind", ["signs", "positive"])
def test_gemm_bound_is_that_of_a_running_sum(K, kind):
    """Running sums in float32 have the standard deviation of error that the model predicts."""
    a, b = normal(40, K).float().double(), normal(K, 30, seed=1).float().double()
    if kind == "positive":
        a, b = a.abs(), b.abs()
    sums = torch.zeros(40, 30)
    for k in range(K):
        sums += a[:, k : k + 1].float() * b[k].float()
    measured = (sums.double() - a @ b).square().mean().sqrt()
    modelled = torch.stack([perturbed(lambda: a @ b, seed) - a @ b for seed in range(4)]).square().mean().sqrt()
    assert 0.3 * modelled <= measured <= 1.5 * modelled


def perturbed(run, seed: int, precision: Precision = SINGLE) -> torch.Tensor:
    with RandomRounding(precision, seed):
        return run()


def test_bound_of_a_cancelling_sum_scales_with_its_terms():
    terms = torch.tensor([[1e6, 1.0, -1e6]], dtype=torch.float64)
    allowed = bound(lambda: terms @ terms.new_ones(3, 1))
    assert 1e6 * 2.0**-24 < allowed < 100 * 1e6 * 2.0**-24


def test_zeros_must_be_exact():
    x = torch.zeros(3, 4, dtype=torch.float64)
    assert bound(lambda: torch.tanh(x @ normal(4, 5)) * 3 + 0) == 0
    reference = {"result": torch.zeros(2)}
    assert compare({"result": torch.zeros(2)}, reference, {"result": 0.0})[0].ok
    assert not compare({"result": torch.tensor([0.0, 1e-40])}, reference, {"result": 0.0})[0].ok


def test_non_finite_reference_requires_equal_results():
    x = torch.tensor([1.0, INF, -INF, NAN], dtype=torch.float64)
    reference, bounds = error_bounds(lambda: {"result": x * 3}, SINGLE)
    assert 0 < bounds["result"] < 1e-5
    assert compare({"result": (x * 3).float()}, reference, bounds)[0].ok
    assert not compare({"result": torch.tensor([3.0, INF, INF, NAN])}, reference, bounds)[0].ok


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bounds_follow_dtype_and_scale(scale):
    a, b = normal(8, 16) * scale, normal(16, 8, seed=1)
    allowed = [bound(lambda: a @ b, Precision.of(dtype)) / scale for dtype in (torch.float64, torch.float32)]
    # In float64 the truth errs as well, which the bound doubles, and so does each evaluation that it is taken from: up
    # to sqrt(6), by how the BLAS of this CPU adds.
    assert 2.0**29 / 6**0.5 / 1.3 < allowed[1] / allowed[0] < 2.0**29
    halves = [bound(lambda: a @ b, Precision.of(dtype)) for dtype in (torch.float16, torch.bfloat16)]
    assert halves[1] / halves[0] == pytest.approx(8, rel=0.5) or scale < 1e-7  # subnormal in float16
    tf32 = bound(lambda: a @ b, Precision.of(torch.float32, "tf32")) / scale
    assert 1000 < tf32 / allowed[1] < 8192  # 13 bits less, of the operands only


def test_bound_allows_rounding_and_refuses_four_times_rounding():
    """Rounding to float32, for 200 draws of the bound."""
    for seed in range(200):
        x = normal(1 + seed % 7, seed=seed)
        allowed = bound(lambda x=x: x * 1.5)
        assert max_error((x * 1.5).float(), x * 1.5) <= allowed, seed
        assert allowed <= 4 * DEVIATIONS * 2.0**-24 * float((x * 1.5).abs().max()), seed


def test_blockwise_sum_has_a_smaller_bound():
    a, b = normal(4, 20_000), normal(20_000, 4, seed=1)
    whole = bound(lambda: a @ b)
    assert bound(lambda: a @ b, replace(SINGLE, max_running_sum=500)) < 0.3 * whole


def test_perturbation_covers_forward_and_backward():
    lstm, x = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64), normal(5, 2, 3)

    def run():
        y, _ = lstm(x)
        grads = torch.autograd.grad(y.sin().sum(), list(lstm.parameters()))
        return {"output": y.detach(), **dict(zip(dict(lstm.named_parameters()), grads, strict=True))}

    reference, bounds = error_bounds(run, SINGLE)
    assert reference.keys() == bounds.keys() == run().keys()
    for name, value in run().items():
        assert torch.equal(value, reference[name])  # the perturbation is off
        size = float(value.abs().max())
        assert 1e-8 * size < bounds[name] < 1e-4 * max(size, 0.1), name
    assert error_bounds(run, SINGLE)[1] == bounds  # bounds are deterministic


def test_close_results_get_more_evaluations():
    runs, x = [], normal(8)

    def run():
        runs.append(None)
        return {"result": x * 3}

    def judge(error: float):
        runs.clear()
        reference, bounds = error_bounds(run, SINGLE)
        results = compare({"result": reference["result"] + error}, reference, bounds)[0]
        return len(runs), results

    full = error_bounds(run, SINGLE)[1]["result"]
    assert len(runs) == 1 + 128 // 8  # the reference, and 8 values per evaluation
    count, results = judge(0.1 * full)
    assert (count, results.ok) == (1 + 2, True)
    for ratio, ok in ((0.99, True), (1.01, False), (100.0, False)):
        count, results = judge(ratio * full)
        assert (count, results.ok, results.allowed) == (1 + 128 // 8, ok, full)


def test_saturated_gates_may_be_flushed_to_zero():
    """sigmoid(-200) is 1e-87 in float64 and zero in float32."""
    x = torch.full((4,), -200.0, dtype=torch.float64)
    reference, bounds = error_bounds(lambda: {"result": x.sigmoid()}, SINGLE)
    assert compare({"result": torch.zeros(4)}, reference, bounds)[0].ok
    assert not compare({"result": torch.full((4,), 1e-30)}, reference, bounds)[0].ok


def test_results_are_listed_worst_first():
    reference = {name: torch.tensor([1.0]) for name in "abc"}
    results = compare(
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.5]), "c": torch.tensor([1.1])},
        reference,
        dict.fromkeys("abc", 0.2),
    )
    assert [accuracy.name for accuracy in results] == ["b", "c", "a"]
    assert [accuracy.ok for accuracy in results] == [False, True, True]
    assert math.isclose(results[0].error_ratio, 2.5)
    assert str(results[0]) == "b: error 0.5, allowed 0.2 at scale 1"


def test_one_sum_is_allowed_where_the_float64_run_splits_it():
    parts = normal(300, 4, 1).abs()

    def run():
        total = parts[0].sum(0, keepdim=True)
        for part in parts[1:]:
            total = total + part.sum(0, keepdim=True)
        return {"result": total}

    in_parts, as_one = (error_bounds(run, SINGLE, terms)[1]["result"] for terms in (None, {"result": 1200}))
    assert 1.5 * in_parts < as_one < 10 * in_parts


def test_non_finite_bound_allows_no_error():
    assert not compare({"a": torch.tensor([NAN])}, {"a": torch.tensor([1.0])}, {"a": INF})[0].ok


# Ops that move, create or select numbers without rounding. index_add and index_put sum what
# autograd's indexing split: each element once.
EXACT = """
    alias arange as_strided bitwise_and bitwise_not cat clone copy_ detach empty empty_like expand full ge gt
    index index_add index_copy index_fill index_put index_put_ index_select lift_fresh lt masked_fill new_empty_strided
    new_zeros nonzero permute rand randn repeat_interleave scalar_tensor scatter_ select select_backward slice
    slice_backward sort split squeeze stack t transpose unbind uniform_ unsafe_split unsqueeze view where zeros
    zeros_like _local_scalar_dense _pack_padded_sequence _to_copy _unsafe_view aminmax cumsum
"""


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in _RULES and func.namespace == "aten":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_every_op_of_the_float64_run_is_perturbed_or_exact():
    """An op without a rule would count as exact, and bounds would be too narrow."""
    with Recorder() as recorder:
        for k in range(60):
            case = random_case(random.Random(k), (torch.float64,))
            run_torch(case)
            with fastlstm.use_backend("reference"):
                run(case)
    assert "cat" in recorder.names
    assert recorder.names <= set(EXACT.split())


def test_float64_bounds_allow_errors_on_both_sides():
    a, b = normal(30, 40), normal(40, 30, seed=1)
    double = Precision.of(torch.float64)
    assert double.sums == TRUTH_UNIT
    single = replace(double, sums=2 * TRUTH_UNIT, pointwise=2 * TRUTH_UNIT, storage=2 * TRUTH_UNIT)
    assert 2**0.5 * bound(lambda: a @ b, single) == pytest.approx(2 * bound(lambda: a @ b, double), rel=0.3)


def test_half_precision_ops_add_in_float32():
    """The error of rounding a product once is independent of K; that of bfloat16 accumulation is not."""
    a, b = normal(4, 20_000), normal(20_000, 4, seed=1)
    per_op, stored = (bound(lambda: a @ b, of(torch.bfloat16)) for of in (Precision.per_op, Precision.of))
    assert stored <= per_op < 3 * stored
