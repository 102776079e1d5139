"""The tutorials' training updates as a suite: the same update under nn.LSTM and under fastlstm, from one seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.load import background_load
from benchmarks.measure import Spread
from benchmarks.results import Row
from fastlstm.tutorials.__main__ import TUTORIALS
from fastlstm.tutorials.common import Tutorial, compare_trajectories, missing_packages, time_both

BLOCKS = 9
# Updates compared in float64 before anything is timed; the tutorials themselves compare 50.
GATE_UPDATES = 10


def chosen(matching: str = "") -> dict[str, type[Tutorial]]:
    """The tutorials whose name contains `matching`."""
    return {name: tutorial for name, tutorial in TUTORIALS.items() if matching in name}


def tutorial_rows(matching: str, report: Callable[[str, list[Row]], None], device: str = "cpu") -> list[Row]:
    """Two rows per tutorial: an update (forward, backward and the optimiser) under each implementation.

    The gate is the tutorials' own: losses equal in float64 along the first updates.
    """
    rows = []
    for name, tutorial in chosen(matching).items():
        new_rows = _tutorial(name, tutorial, device)
        report(name, new_rows)
        rows += new_rows
    return rows


def _tutorial(name: str, tutorial: type[Tutorial], device: str) -> list[Row]:
    rows = [Row(suite="tutorials", case=name, mode="train", impl=impl, kind="tutorial") for impl in ("nn", "fastlstm")]
    absent = missing_packages([tutorial])
    if absent:
        for row in rows:
            row.status = f"skipped: needs {', '.join(absent)}"
        return rows
    gate = compare_trajectories(tutorial, device=device, updates=GATE_UPDATES).check()
    for row in rows:
        row.error, row.error_allowed = gate.value, gate.bar
    if not gate.passed:
        rows[1].status = f"WRONG: {gate}"
        return rows
    task = tutorial(device=device)
    measured_load = background_load()
    timing = time_both(task, blocks=BLOCKS)
    load = measured_load()
    for row, samples in zip(rows, (timing.torch, timing.fastlstm), strict=True):
        spread = Spread.of(samples)
        row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
        row.rounds, row.calls, row.dtype = len(samples), task.timing_block, str(task.dtype).removeprefix("torch.")
        row.others_cpu = load
        row.ratio = Spread.of(timing.torch).p50 / spread.p50
        row.ratio_rounds = statistics.median(a / b for a, b in zip(timing.torch, samples, strict=True))
    return rows
