"""The suites by name, and the rows of each: `rows_of`."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import replace

from benchmarks import features, gpu, sweeps
from benchmarks.cases import CPU, QUICK, Case
from benchmarks.measure import Plan
from benchmarks.memory import peak_rows
from benchmarks.models import suite as models
from benchmarks.peers import Peer
from benchmarks.results import Row
from benchmarks.run import Suite, run_suite

Report = Callable[[str, list[Row]], None]

NAMES = (
    "cpu", "gpu", "gpu_points", "quick", "grid", "random", "few_rows", "scaling", "tutorials", "features", "models",
)  # fmt: skip


def suite_of(name: str) -> Suite:
    """A suite of cases; "tutorials", "features" and "models" are not, they have programs of their own."""
    if name == "cpu":
        return Suite("cpu", CPU, alone=True)
    if name == "quick":
        return Suite("quick", QUICK, plan=Plan(budget=0.4, min_rounds=5), attempts=1)
    if name in ("grid", "random", "few_rows"):
        # Gate flops small: two hundred float64 references would otherwise take longer than the timing.
        plan = Plan(budget=0.5, min_rounds=5, patience=3.0)
        cases = {"grid": sweeps.grid, "random": sweeps.random_cases, "few_rows": lambda: sweeps.FEW_ROWS}[name]()
        return Suite(name, cases, plan=plan, gate_flops=2e9, attempts=2, alone=True)
    if name == "scaling":
        return Suite("scaling", sweeps.SCALING_T + sweeps.SCALING_PACKED, gate_flops=2e10, alone=True)
    if name in ("gpu", "gpu_points"):
        points = name == "gpu_points"
        return Suite(
            name,
            gpu.points() if points else gpu.cases(),
            device="cuda",
            plan=Plan(budget=0.3, min_rounds=5, patience=2.0) if points else Plan(budget=0.6, patience=4.0),
            gate_flops=5e12,
            attempts=1,  # the device times itself; what else runs on the host matters little
            precision=gpu.precision,
            baseline=gpu.cudnn_algorithm,
        )
    raise ValueError(f"suite must be one of {', '.join(NAMES)}, got {name!r}")


def size_of(name: str, matching: str = "", done: Set[str] = frozenset(), dtype: str = "") -> int:
    """How many times `rows_of` will report, if it has the time."""
    if name == "tutorials":
        from benchmarks.tutorials import chosen

        return len(chosen(matching))
    if name == "features":
        return len(features.chosen(matching)) + len(features.compiled(matching))
    if name == "models":
        return len(models.chosen(matching, done))
    return len(_select(suite_of(name).cases, matching, done, dtype)) + len(_memory_cases(name, matching, done, dtype))


def rows_of(
    name: str,
    peers: dict[str, Peer],
    report: Report,
    matching: str = "",
    budget: float | None = None,
    wait: float = 0.0,
    done: Set[str] = frozenset(),
    seconds: float | None = None,
    dtype: str = "",
) -> list[Row]:
    """Measures a suite; `report` is called with the name and rows of each case as it is done.

    `matching` keeps the cases whose name contains it, `dtype` those of that dtype; `budget` replaces the suite's
    seconds per case and mode; `wait` is how many seconds a case may wait for other processes to calm down. Cases named
    in `done` are left out, and none is started after `seconds`.
    """
    if name == "tutorials":
        from benchmarks.tutorials import tutorial_rows

        return tutorial_rows(matching, report)
    if name == "features":
        return features.feature_rows(matching, report, budget)
    until = float("inf") if seconds is None else time.monotonic() + seconds
    if name == "models":
        return list(models.model_rows(matching, report, budget, wait, done, until))
    suite = suite_of(name)
    suite.cases, suite.wait = _select(suite.cases, matching, done, dtype), wait
    if budget is not None:
        suite.plan = replace(suite.plan, budget=budget)
    rows = run_suite(suite, peers, lambda case, made: report(case.name, made), until)
    for case in _memory_cases(name, matching, done, dtype):
        if time.monotonic() > until:
            break
        made = peak_rows(name, case, [impl for impl, peer in peers.items() if peer.refuses(case) is None], suite.device)
        report(f"memory: {case.name}", made)
        rows += made
    return rows


def _select(cases: list[Case], matching: str, done: Set[str], dtype: str) -> list[Case]:
    return [c for c in cases if matching in c.name and c.name not in done and dtype in ("", c.dtype)]


def _memory_cases(name: str, matching: str, done: Set[str], dtype: str) -> list[Case]:
    return _select(sweeps.MEMORY, matching, done, dtype) if name == "scaling" else []
