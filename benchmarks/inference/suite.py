"""The rows of the suite: each case in every engine, interleaved, in a new process; then single steps (`rows_of`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import Inputs, make_inputs
from benchmarks.gate import OUTPUTS
from benchmarks.inference.engines import ENGINES, Call, Layer, Setting, installed
from benchmarks.inference.gate import References
from benchmarks.inference.rows import checked, compare, new_row
from benchmarks.inference.streaming import STREAMS, Stream, stream_rows
from benchmarks.load import MAX_BACKGROUND_LOAD, background_load, wait_for_idle, wait_for_rest
from benchmarks.measure import Measurement, Plan, Runnable, Spread, alternate, wall_timer
from benchmarks.results import InferenceRow

# A sample starts with threads that sleep and with caches that another engine has filled. After an untimed call, 20 ms
# make both negligible.
PLAN = Plan(budget=6.0, min_rounds=7, slow_rounds=5, patience=20.0, min_sample=0.02)
TRIAL = Plan(budget=0.0, min_rounds=3, slow_rounds=3, min_sample=0.02)  # of each setting of an engine
ATTEMPTS = 2  # max timings of a case while the background load is too high

CASES: tuple[Case, ...] = (
    Case(1, 1, 64, 64, kind="stream"),
    Case(1, 1, 1024, 1024, kind="stream"),
    Case(10, 1, 1, 100, 2),
    Case(50, 1, 512, 512),
    Case(100, 8, 256, 256),
    Case(100, 32, 128, 128),
    Case(50, 16, 256, 256, 2, bidirectional=True),
    Case(100, 16, 512, 512),
    Case(30, 16, 1024, 1024),
    Case(1, 1, 128, 128, 2, kind="stream"),  # voice activity detection
    Case(128, 1, 1, 40, kind="stream"),  # an audio effect's buffer
    Case(80, 1, 512, 256, bidirectional=True),  # encoder of speech synthesis
    Case(1, 8, 640, 640, kind="stream"),  # predictor of an RNN transducer
    Case(168, 32, 8, 128),  # forecasts from a week of hours
)


def chosen(matching: str = "", done: Set[str] = frozenset()) -> list[Case | Stream]:
    """The cases and streams whose name contains `matching`, without those in `done`."""
    return [case for case in (*CASES, *STREAMS) if matching in case.name and case.name not in done]


def rows_of(
    matching: str,
    report: Callable[[str, list[InferenceRow]], None],
    budget: float | None = None,
    wait: float = 0.0,
    done: Set[str] = frozenset(),
    until: float = float("inf"),
) -> Iterator[InferenceRow]:
    """One row per case or stream and engine that is installed; `report` is called after each case.

    Args:
        matching, done: see `chosen`.
        budget: seconds per case, in place of PLAN's.
        wait: max seconds to wait for an idle machine before timing.
        until: no case is started later than this (time.monotonic).
    """
    plan = PLAN if budget is None else replace(PLAN, budget=budget, patience=max(budget, 1.0))
    for case in chosen(matching, done):
        if time.monotonic() > until:
            return
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            new_rows = pool.submit(_in_new_process, case, plan, wait, torch.get_num_threads()).result()
        report(case.name, new_rows)
        yield from new_rows


def _in_new_process(case: Case | Stream, plan: Plan, wait: float, threads: int) -> list[InferenceRow]:
    if isinstance(case, Stream):
        wait_for_idle(wait)
        return stream_rows(case, plan.budget)
    torch.set_num_threads(threads)
    return measure_case(case, plan, wait)


@dataclass
class Built:
    """An engine's layer of a case, at its fastest setting."""

    layer: Layer
    call: Call
    setting: Setting


def measure_case(case: Case, plan: Plan = PLAN, wait: float = 0.0) -> list[InferenceRow]:
    """The rows of one case. An engine that is wrong or raises gets a row without a time."""
    inputs, threads = make_inputs(case), torch.get_num_threads()
    references = References(case, inputs)
    rows = {name: new_row(case, "forward", name) for name in installed()}
    calls: dict[str, Call] = {}
    for name, row in rows.items():

        def results(name: str = name, row: InferenceRow = row) -> dict[str, Tensor]:
            built = fastest_setting(name, case, inputs, threads)
            row.setting = " ".join(f"{key}={value}" for key, value in built.setting.items())
            row.weight_bytes, calls[name] = built.layer.weight_bytes, built.call
            with torch.inference_mode():
                built.call.run()
            return dict(zip(OUTPUTS, built.call.outputs(), strict=True))

        if not checked(row, references, results):
            calls.pop(name, None)
    _time(case, calls, rows, plan, wait)
    compare(rows, {name: rows[name].p50_ms for name in calls})
    return list(rows.values())


def fastest_setting(name: str, case: Case, inputs: Inputs, threads: int) -> Built:
    """Build an engine with each of its settings; return the one with the smallest median of a few samples."""
    candidates = []
    for setting in ENGINES[name].settings:
        layer = ENGINES[name].build(case, inputs.weights, threads, setting)
        candidates.append(Built(layer, layer.bind(inputs.x, inputs.hx), setting))
    if len(candidates) == 1:
        return candidates[0]
    trials = {str(k): resting(built.call.run) for k, built in enumerate(candidates)}
    alternate(trials, wall_timer, TRIAL)
    return candidates[int(min(trials, key=lambda k: statistics.median(trials[k].samples)))]


def resting(run: Runnable) -> Measurement:
    """A measurement whose samples start when the thread pools of all engines sleep.

    Pools spin for milliseconds after a call (benchmarks/load.py). An engine profits from its own pool's spinning
    within a sample, as in a service that is called all the time, and does not suffer from another's.
    """

    @contextmanager
    def enter() -> Iterator[Runnable]:
        with torch.inference_mode():
            wait_for_rest()
            yield run

    return Measurement(enter)


def _time(case: Case, calls: dict[str, Call], rows: dict[str, InferenceRow], plan: Plan, wait: float) -> None:
    """Fill the rows' times, of the attempt with the lowest background load."""
    best: tuple[float, dict[str, Measurement], int] | None = None
    for _ in range(ATTEMPTS if calls else 0):
        wait_for_idle(wait)
        measurements = {name: resting(call.run) for name, call in calls.items()}
        measured_load = background_load()
        rounds = alternate(measurements, wall_timer, plan)
        load = measured_load() or 0.0
        if best is None or load < best[0]:
            best = load, measurements, rounds
        if load <= MAX_BACKGROUND_LOAD:
            break
    if best is None:
        return
    load, measurements, rounds = best
    baseline = measurements["nn"].samples if "nn" in measurements else None
    for name, measurement in measurements.items():
        row, spread = rows[name], Spread.of(measurement.samples)
        row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
        row.rounds, row.calls, row.others_cpu = rounds, measurement.calls, load
        row.us_per_step, row.ns_per_row = spread.p50 * 1e6 / case.T, spread.p50 * 1e9 / case.rows
        if baseline:
            row.ratio = Spread.of(baseline).p50 / spread.p50
            row.ratio_rounds = statistics.median(a / b for a, b in zip(baseline, measurement.samples, strict=True))
