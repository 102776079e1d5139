"""The quick suite under pytest-benchmark, for tracking regressions: pytest benchmarks --benchmark-autosave.

One benchmark per case, mode and implementation; the correctness gate runs first. Not part of the test run.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.cases import MODES, QUICK, Case
from benchmarks.data import make_inputs
from benchmarks.peers import PEERS
from benchmarks.run import Judged, judge_all

pytest.importorskip("pytest_benchmark")

IMPLS = ("nn", "fastlstm")


@cache
def judged(case: Case) -> dict[str, Judged]:
    return judge_all(case, "cpu", {name: PEERS[name] for name in IMPLS})


@pytest.mark.benchmark_suite
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_quick(benchmark, case: Case, mode: str, impl: str) -> None:
    verdict = judged(case)[impl].status(mode)
    assert verdict == "ok"
    benchmark.group = f"{case.name}, {mode}"
    benchmark.extra_info.update(backend=judged(case)[impl].backend, flops=case.flops(mode))
    with PEERS[impl].build(case, make_inputs(case)).mode(mode) as run:
        benchmark(run)
