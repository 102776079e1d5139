"""The quick suite under pytest-benchmark, for tracking regressions: pytest benchmarks --benchmark-autosave.

One benchmark per case, mode and implementation; the accuracy gate runs first. Not part of the test run.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.cases import MODES, QUICK, Case
from benchmarks.data import make_inputs
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.run import AccuracyResult, check_all

pytest.importorskip("pytest_benchmark")

IMPLS = ("nn", "fastlstm")


@cache
def checked(case: Case) -> dict[str, AccuracyResult]:
    return check_all(case, "cpu", {name: IMPLEMENTATIONS[name] for name in IMPLS})


@pytest.mark.benchmark_suite
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_quick(benchmark, case: Case, mode: str, impl: str) -> None:
    status = checked(case)[impl].status(mode)
    assert status == "ok", f"{impl} on {case.name}, {mode}: {status}"
    benchmark.group = f"{case.name}, {mode}"
    benchmark.extra_info.update(backend=checked(case)[impl].backend, flops=case.flops(mode))
    with IMPLEMENTATIONS[impl].build(case, make_inputs(case)).mode(mode) as run:
        benchmark(run)
