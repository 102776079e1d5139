"""The benchmark suites' cases: sizes, lengths and flops."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

for package in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import gpu, implementations, suites, sweeps
from benchmarks.cases import CPU, MODES, QUICK, RAGGED, Case
from benchmarks.data import make_inputs
from benchmarks.gate import in_float64, reference_results


def name(case: Case) -> str:
    return case.name


SCALING = sweeps.SCALING_T + sweeps.SCALING_PACKED


@pytest.mark.parametrize(
    "cases",
    [CPU, QUICK, sweeps.grid(), sweeps.random_cases(), sweeps.bf16_products(), sweeps.FEW_ROWS, SCALING, gpu.cases()],
    ids=["cpu", "quick", "grid", "random", "bf16_products", "few_rows", "scaling", "gpu"],
)
def test_case_names_are_unique_within_a_suite(cases):
    assert len({case.name for case in cases}) == len(cases)


def test_cpu_suite_is_fixed():
    sizes = [(case.T, case.B, case.I, case.H, case.L) for case in CPU]
    assert sizes == [
        (10, 1, 1, 100, 1),
        (20, 8, 10, 32, 2),
        (5, 20, 1, 16, 1),
        (1, 1, 64, 64, 1),
        (999, 97, 1, 51, 2),
        (999, 97, 1, 51, 2),
        (200, 64, 50, 100, 2),
        (50, 32, 256, 256, 2),
        (100, 32, 128, 128, 1),
        (100, 64, 512, 512, 1),
        (100, 16, 1024, 1024, 1),
        (35, 20, 650, 650, 2),
        (500, 16, 64, 64, 1),
        (100, 32, 256, 256, 1),
        (100, 32, 256, 256, 1),
    ]
    assert all(case.target(mode) > 1 for case in CPU for mode in MODES)
    assert [case.target_train for case in CPU] == [8, 8, 8, 8, 4, 4, 2, 2, 1.7, 1.3, 1.3, 1.3, 8, 3, 2]


def test_grid_covers_its_sizes_within_the_flop_budget():
    grid = sweeps.grid()
    assert {case.T for case in grid} == set(sweeps.GRID_T)
    assert {case.B for case in grid} == set(sweeps.GRID_B)
    assert {case.H for case in grid} == set(sweeps.GRID_H)
    assert max(case.flops("forward") for case in grid) <= sweeps.GRID_FLOPS
    assert suites.size_of("grid") == len(grid) == sweeps.grid_size()[0]


def test_random_cases_are_deterministic_and_cover_every_kind():
    cases = sweeps.random_cases()
    assert len(cases) == suites.size_of("random") == sweeps.RANDOM_CASES
    assert cases == sweeps.random_cases()
    assert max(case.flops("forward") for case in cases) <= sweeps.GRID_FLOPS
    kinds = {
        "bidirectional": lambda case: case.bidirectional,
        "two layers": lambda case: case.L == 2,
        "projection": lambda case: case.proj,
        "packed": lambda case: case.kind == "packed",
        "float64": lambda case: case.dtype == "float64",
        "bfloat16": lambda case: case.dtype == "bfloat16",
        "I != H": lambda case: case.I != case.H,
        "large": lambda case: case.H >= 256 and case.B >= 32,
    }
    for kind, is_kind in kinds.items():
        assert 1 < sum(map(bool, map(is_kind, cases))) < len(cases), kind


def test_bf16_products_are_measured_beside_float32():
    cases = sweeps.bf16_products()
    for plain, flagged in zip(cases[::2], cases[1::2], strict=True):
        assert plain == replace(flagged, dtype="float32")
        assert flagged.dtype == "bf16_products"
        assert plain.H >= 64
    assert {Case(100, 16, 1024, 1024), Case(100, 32, 256, 256, proj=64), Case(50, 16, 128, 128)} <= set(cases[::2])
    rnn = torch.backends.mkldnn.rnn
    for case, setting in zip(cases, ("ieee", "bf16"), strict=False):
        with suites.suite_of("bf16_products").precision(case):
            assert rnn.fp32_precision == setting
    assert rnn.fp32_precision == "none"


@pytest.mark.parametrize("ragged", RAGGED)
def test_lengths_are_within_T_and_the_longest_is_T(ragged):
    lengths = Case(50, 20, 3, 4, kind="packed", ragged=ragged).lengths()
    assert lengths.min() >= 1
    assert lengths.max() == 50
    assert (ragged == "full") == bool((lengths == 50).all())


@pytest.mark.parametrize(
    "invalid",
    [
        {"T": 0},
        {"dtype": "int8"},
        {"kind": "loop"},
        {"kind": "packed"},
        {"ragged": "random"},
        {"proj": 6},
        {"kind": "cells", "bidirectional": True},
    ],
    ids=str,
)
def test_invalid_case_is_refused(invalid):
    with pytest.raises(ValueError, match=r"got|neither"):
        replace(Case(5, 3, 4, 6), **invalid)


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 3, 4, 6, kind="stream"),
        Case(4, 2, 3, 5, 3, kind="stream"),
        Case(4, 2, 3, 5, 2, bidirectional=True, kind="stream"),
        Case(4, 2, 3, 6, 2, proj=2, kind="stream"),
    ],
    ids=name,
)
def test_flops_equal_those_of_the_pytorch_counter(case):
    # Streaming cases, because a gradient for h0 keeps the first step's product in the count.
    inputs = make_inputs(case)
    with FlopCounterMode(display=False) as counter:
        reference_results(case, in_float64(inputs))
    assert counter.get_total_flops() == case.flops("train")
    program = implementations.IMPLEMENTATIONS["reference"].build(case, inputs)
    with program.mode("forward") as forward, FlopCounterMode(display=False) as counter:
        forward()
    assert counter.get_total_flops() == case.flops("forward")


def test_packed_flops_are_proportional_to_the_sum_of_lengths():
    case = Case(50, 20, 3, 4, kind="packed", ragged="random")
    assert case.rows == int(case.lengths().sum()) < 50 * 20
    assert case.flops("train") * 50 * 20 == Case(50, 20, 3, 4).flops("train") * case.rows


def test_shortened_case_fits_its_budget():
    case = Case(999, 97, 1, 51, 2)
    short = case.shortened(1e8)
    assert 1 <= short.T < case.T
    assert short.flops("train") <= 1e8
    assert case.shortened(1e15) == case
