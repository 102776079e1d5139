"""The tables of the suite, and its plot's series: `tables`, `speedup_summary`, `speedups`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.inference.engines import COMPARED_WITH, ENGINES
from benchmarks.results import InferenceRow
from benchmarks.tables import geometric_mean, is_busy, ms, number, table

SPEEDUP = "Speedup: time of the fastest other runtime / time of the engine."
FROZEN = ("frozen", "frozen_bf16", "frozen_int8")
REDUCED = tuple(name for name, engine in ENGINES.items() if engine.weights != "float32")

ByCase = dict[str, dict[str, InferenceRow]]  # rows by case and engine


def by_case(rows: Iterable[InferenceRow], mode: str) -> ByCase:
    cases: ByCase = {}
    for row in rows:
        if row.mode == mode:
            cases.setdefault(row.case, {})[row.impl] = row
    return cases


def tables(rows: list[InferenceRow]) -> list[str]:
    """Times and ratios of whole calls; errors and sizes of weights in 16 and 8 bits; latency of steps."""
    calls, steps = by_case(rows, "forward"), by_case(rows, "stream")
    parts = []
    packages = dict.fromkeys(row.package for row in rows if row.package)
    if packages:
        parts.append(f"With {', '.join(packages)}.")
    if calls:
        ours = [name for name in FROZEN if any(name in engines for engines in calls.values())]
        headings = ["case", *(e.title for e in ENGINES.values()), *(f"{ENGINES[name].title}: speedup" for name in ours)]
        lines = [
            [
                case,
                *(ms(engines[name]) if name in engines else "" for name in ENGINES),
                *(_speedup(engines.get(name)) for name in ours),
            ]
            for case, engines in calls.items()
        ]
        parts += ["**Milliseconds per call**", table(headings, lines)]
        parts.append(" ".join([SPEEDUP, *speedup_summary(rows)]))
        headings = ["case", "output", *(f"{ENGINES[name].title}: error" for name in REDUCED)]
        headings += [f"{ENGINES[name].title}: KiB" for name in ("nn", *REDUCED)]
        lines = [[case, *_errors(engines), *_sizes(engines)] for case, engines in calls.items()]
        parts += ["**RMS of the output and of its error, and size of the weights**", table(headings, lines)]
    if steps:
        names = [name for name in ENGINES if any(name in engines for engines in steps.values())]
        lines = [[case, *(_latency(engines.get(name)) for name in names)] for case, engines in steps.items()]
        parts += ["**Microseconds per step: 50th / 99th / 99.9th percentile (steps per second of all threads)**"]
        parts.append(table(["steps", *(ENGINES[name].title for name in names)], lines))
    return parts


def speedup_summary(rows: Iterable[InferenceRow]) -> list[str]:
    """One sentence per engine of ours: the geometric mean and the minimum of its speedups."""
    by_engine: dict[str, list[float]] = {}
    for row in rows:
        if row.mode == "forward" and row.speedup:
            by_engine.setdefault(row.impl, []).append(row.speedup)
    lines = []
    for name, values in by_engine.items():
        others = " and ".join(ENGINES[other].title for other in COMPARED_WITH[ENGINES[name].weights])
        mean = f"geometric mean {geometric_mean(values):.2f}x over {len(values)} cases, min {min(values):.2f}x"
        lines.append(f"{ENGINES[name].title} relative to the faster of {others}: {mean}.")
    return lines


def speedups(rows: Iterable[InferenceRow]) -> dict[str, dict[str, float]]:
    """For the plot: the speedups by case of each frozen engine, by its title."""
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.mode == "forward" and row.impl in FROZEN and row.speedup:
            series.setdefault(ENGINES[row.impl].title, {})[row.case] = row.speedup
    return series


def _speedup(row: InferenceRow | None) -> str:
    if row is None or row.speedup is None:
        return ""
    return f"{row.speedup:.2f}x" + (" (busy)" if is_busy(row) else "")


def _errors(engines: Mapping[str, InferenceRow]) -> list[str]:
    """RMS of the float64 output, then that of each engine's error."""
    size = next((row.rms_output for row in engines.values() if row.rms_output is not None), None)
    errors = [engines[name].rms_error if name in engines else None for name in REDUCED]
    return [number(size), *("" if error is None else f"{error:.1e}" for error in errors)]


def _sizes(engines: Mapping[str, InferenceRow]) -> list[str]:
    sizes = [engines[name].weight_bytes if name in engines else None for name in ("nn", *REDUCED)]
    return ["" if size is None else number(size / 1024) for size in sizes]


def _latency(row: InferenceRow | None) -> str:
    if row is None:
        return ""
    if row.status != "ok":
        return row.status.split(":")[0]
    percentiles = " / ".join(number(value) for value in (row.p50_us, row.p99_us, row.p999_us))
    return f"{percentiles} ({number(row.steps_per_s / 1e3)}k/s)" if row.steps_per_s else percentiles
