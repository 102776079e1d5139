"""The suites by name, and the rows of each: `rows_of`."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import replace

from benchmarks import calls, features, gpu, products_error, sweeps, variants, xla
from benchmarks.cases import CPU, QUICK, Case
from benchmarks.implementations import Implementation
from benchmarks.inference import suite as inference
from benchmarks.measure import Plan
from benchmarks.memory import peak_rows
from benchmarks.models import suite as models
from benchmarks.results import Row
from benchmarks.run import Suite, run_suite

Report = Callable[[str, list[Row]], None]

NAMES = (
    "cpu", "gpu", "gpu_points", "quick", "grid", "random", "bf16_products", "few_rows", "scaling", "tutorials",
    "features", "calls", "models", "inference", "frozen_accuracy", "products_error", "variants",
    "gpu_variants", "xla",
)  # fmt: skip
IMPLEMENTATIONS_OF = {"xla": ["fastlstm", "xla"]}  # measured if --impl is not given, instead of the defaults


def suite_of(name: str) -> Suite:
    """Build a suite of cases; the rows of the others, "models" for example, have their own functions."""
    if name == "cpu":
        return Suite("cpu", CPU, isolated=True)
    if name == "quick":
        return Suite("quick", QUICK, plan=Plan(budget=0.4, min_rounds=5), attempts=1)
    if name in ("grid", "random", "few_rows"):
        # Few gate flops: two hundred float64 references would otherwise take longer than the timing.
        plan = Plan(budget=0.5, min_rounds=5, patience=3.0)
        cases = {"grid": sweeps.grid, "random": sweeps.random_cases, "few_rows": lambda: sweeps.FEW_ROWS}[name]()
        return Suite(name, cases, plan=plan, gate_flops=2e9, attempts=2, isolated=True)
    if name == "bf16_products":
        return Suite(
            name,
            sweeps.bf16_products(),
            plan=Plan(budget=0.5, min_rounds=5, patience=3.0),
            gate_flops=2e9,
            attempts=2,
            precision=sweeps.products,
            isolated=True,
        )
    if name == "xla":
        return Suite(name, xla.CASES, isolated=True)
    if name == "scaling":
        return Suite("scaling", sweeps.SCALING_T + sweeps.SCALING_PACKED, gate_flops=2e10, isolated=True)
    if name in ("gpu", "gpu_points"):
        points = name == "gpu_points"
        return Suite(
            name,
            gpu.points() if points else gpu.cases(),
            device="cuda",
            plan=Plan(budget=0.3, min_rounds=5, patience=2.0) if points else Plan(budget=0.6, patience=4.0),
            gate_flops=5e12,
            attempts=1,  # CUDA events time the device, so background load on the host has little effect
            precision=gpu.precision,
            baseline=gpu.cudnn_algorithm,
        )
    raise ValueError(f"suite must be one of {', '.join(NAMES)}, got {name!r}")


def size_of(name: str, matching: str = "", done: Set[str] = frozenset(), dtype: str = "") -> int:
    """Number of reports of `rows_of`, if it has enough time."""
    if name == "tutorials":
        from benchmarks.tutorials import chosen

        return len(chosen(matching))
    if name == "features":
        return len(features.chosen(matching)) + len(features.compiled(matching))
    if name == "calls":
        return len(calls.chosen(matching))
    if name == "models":
        return len(models.chosen(matching, done))
    if name == "inference":
        return len(inference.chosen(matching, done))
    if name in ("variants", "gpu_variants"):
        return len(variants.chosen(matching, done))
    if name == "frozen_accuracy":
        from benchmarks import frozen_accuracy

        return len(frozen_accuracy.chosen(matching, done))
    if name == "products_error":
        return len(products_error.chosen(matching, done))
    return len(_select(suite_of(name).cases, matching, done, dtype)) + len(_memory_cases(name, matching, done, dtype))


def rows_of(
    name: str,
    implementations: dict[str, Implementation],
    report: Report,
    matching: str = "",
    budget: float | None = None,
    wait: float = 0.0,
    done: Set[str] = frozenset(),
    seconds: float | None = None,
    dtype: str = "",
) -> list[Row]:
    """Measure a suite; `report` is called with the name and rows of each case when it is done.

    `matching` keeps the cases whose name contains it, `dtype` those of that dtype; `budget` replaces the suite's
    seconds per case and mode; `wait` is the max number of seconds a case may wait for an idle machine. Cases named in
    `done` are left out, and none is started after `seconds`.
    """
    if name == "tutorials":
        from benchmarks.tutorials import tutorial_rows

        return tutorial_rows(matching, report)
    if name == "features":
        return features.feature_rows(matching, report, budget)
    if name == "calls":
        return calls.call_rows(matching, report, budget)
    until = float("inf") if seconds is None else time.monotonic() + seconds
    if name == "models":
        return list(models.model_rows(matching, report, budget, wait, done, until))
    if name == "inference":
        return list(inference.rows_of(matching, report, budget, wait, done, until))
    if name in ("variants", "gpu_variants"):
        return list(variants.variant_rows(name, matching, report, budget, wait, done, until))
    if name == "frozen_accuracy":
        from benchmarks import frozen_accuracy

        return list(frozen_accuracy.accuracy_rows(matching, report, done, until))
    if name == "products_error":
        return list(products_error.error_rows(matching, report, done, until))
    suite = suite_of(name)
    suite.cases, suite.wait = _select(suite.cases, matching, done, dtype), wait
    if budget is not None:
        suite.plan = replace(suite.plan, budget=budget)
    rows = run_suite(suite, implementations, lambda case, new_rows: report(case.name, new_rows), until)
    for case in _memory_cases(name, matching, done, dtype):
        if time.monotonic() > until:
            break
        new_rows = peak_rows(
            name,
            case,
            [impl for impl, implementation in implementations.items() if implementation.refuses(case) is None],
            suite.device,
        )
        report(f"memory: {case.name}", new_rows)
        rows += new_rows
    return rows


def _select(cases: list[Case], matching: str, done: Set[str], dtype: str) -> list[Case]:
    return [c for c in cases if matching in c.name and c.name not in done and dtype in ("", c.dtype)]


def _memory_cases(name: str, matching: str, done: Set[str], dtype: str) -> list[Case]:
    return _select(sweeps.MEMORY, matching, done, dtype) if name == "scaling" else []
