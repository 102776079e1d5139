"""Run a suite: `run_suite` runs all cases, `measure_case` one: accuracy gate, interleaved timing, rows.

Each case of a long CPU suite runs in a new process. Memory that malloc cached in earlier cases speeds up an
implementation that frees and allocates at every step: nn.LSTM's training step at T=200, B=64, H=100, L=2 takes 125 ms
in a new process and 82 ms after a larger model, fastlstm's 74 ms in both (two Zen 4 cores, no CSV).
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import torch

from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.gate import Expected, check_accuracy, expected, precision
from benchmarks.implementations import IMPLEMENTATIONS, Implementation
from benchmarks.load import MAX_BACKGROUND_LOAD, background_load, wait_for_idle
from benchmarks.machine import Peak
from benchmarks.measure import Measurement, Plan, Spread, alternate, timer_for
from benchmarks.programs import Program
from benchmarks.results import BASELINES, Row
from fastlstm.accuracy import Accuracy, Precision


def unchanged_precision(case: Case) -> AbstractContextManager[None]:
    return nullcontext()


def unnamed(case: Case, mode: str) -> str:
    return ""


@dataclass
class Suite:
    """A list of cases and how to run them."""

    name: str
    cases: list[Case]
    device: str = "cpu"
    plan: Plan = field(default_factory=Plan)
    gate_flops: float = 1e11  # max training flops of the gate per case; T is cut to fit, and the CSV has it as gate_T
    attempts: int = 3  # max timings of a case while the background load is too high
    wait: float = 0.0  # max seconds to wait for an idle machine before each attempt
    # Sets the arithmetic of a case (TF32 or IEEE) for all implementations.
    precision: Callable[[Case], AbstractContextManager[None]] = unchanged_precision
    # What runs inside nn.LSTM, for the CSV.
    baseline: Callable[[Case, str], str] = unnamed
    isolated: bool = False  # a new process for each case, which looks up its implementations in IMPLEMENTATIONS by name


@dataclass
class AccuracyResult:
    """An implementation's accuracy on a case, by mode, or the reason there is none."""

    reason: str = ""
    backend: str = ""
    accuracy: dict[str, Accuracy] = field(default_factory=dict)

    def status(self, mode: str) -> str:
        if self.reason:
            return self.reason
        return "ok" if self.accuracy[mode].ok else f"WRONG: {self.accuracy[mode]}"


def run_suite(
    suite: Suite,
    implementations: dict[str, Implementation],
    report: Callable[[Case, list[Row]], None] = lambda case, rows: None,
    until: float = float("inf"),
) -> list[Row]:
    """Measure every case of the suite with every implementation that supports it; `report` is called after each case.

    No case is started after `until` (time.monotonic).
    """
    peaks: dict[str, Peak] = {}
    rows: list[Row] = []
    for case in suite.cases:
        if time.monotonic() > until:
            break
        if suite.isolated:
            new_rows = _measure_alone(suite, case, list(implementations))
        else:
            with suite.precision(case):
                if case.dtype not in peaks:
                    peaks[case.dtype] = Peak(case.dtype, suite.device)
                new_rows = measure_case(suite, case, implementations, peaks[case.dtype])
        rows += new_rows
        report(case, new_rows)
    return rows


def _measure_alone(suite: Suite, case: Case, names: list[str]) -> list[Row]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        single = replace(suite, cases=[case], isolated=False)
        return pool.submit(_in_new_process, single, names, torch.get_num_threads()).result()


def _in_new_process(suite: Suite, names: list[str], threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    silence()
    return run_suite(suite, {name: IMPLEMENTATIONS[name] for name in names})


def silence() -> None:
    """Of a warning about nn.LSTM, once a process, in the middle of the table."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")


def measure_case(suite: Suite, case: Case, implementations: dict[str, Implementation], peak: Peak) -> list[Row]:
    """Return the rows of one case. An implementation that is wrong or raises gets a row without a time."""
    gate_case = case.shortened(suite.gate_flops)
    checked = check_all(gate_case, suite.device, implementations)
    rows = []
    for mode in MODES:
        running = [name for name, result in checked.items() if result.status(mode) == "ok"]
        peak.reset()
        peak.sample()
        timing = _alternate(suite, case, mode, {name: implementations[name] for name in running})
        peak.sample()
        for name, result in checked.items():
            row = _row(suite, case, mode, name, peak)
            row.gate_T, row.status = gate_case.T, result.status(mode)
            row.backend = suite.baseline(case, mode) if name in BASELINES else result.backend
            if mode in result.accuracy:
                row.error, row.error_allowed = result.accuracy[mode].error, result.accuracy[mode].allowed
            if name in running and timing.failure:
                row.status = timing.failure
            elif name in running:
                row.rounds, row.others_cpu = timing.rounds, timing.load
                _time(row, case, timing.measurements[name], fastest_baseline(timing), peak.lower_bound(case, mode))
            rows.append(row)
    return rows


def check_all(case: Case, device: str, implementations: dict[str, Implementation]) -> dict[str, AccuracyResult]:
    """Apply the gate to every implementation. If nn.LSTM, the baseline, is wrong or fails, no other is timed."""
    inputs = make_inputs(case, device)
    references: dict[Precision, Expected] = {}
    checked: dict[str, AccuracyResult] = {}
    for name, implementation in implementations.items():
        result = checked[name] = AccuracyResult()
        refusal = implementation.refuses(case)
        try:
            if refusal is None:
                program = implementation.build(case, inputs)
                result.backend, refusal = program.chosen()
            if refusal is not None:
                result.reason = f"skipped: {refusal}"
                continue
            rounding = precision(case, implementation.ours)
            if rounding not in references:
                references[rounding] = expected(case, inputs, rounding)
            for mode in MODES:
                result.accuracy[mode] = check_accuracy(program.results(mode), references[rounding], mode)
        except Exception as error:
            # An implementation that cannot run a case must not end the suite; `failures` counts it if it is ours.
            result.reason = _failure(error)
        if name == "nn" and any(result.status(mode) != "ok" for mode in MODES):
            return checked | {
                other: AccuracyResult(reason="skipped: nn.LSTM gave nothing to compare with")
                for other in implementations
                if other != "nn"
            }
    return checked


@dataclass
class Timing:
    """Interleaved measurements of a case and mode, or the reason there are none."""

    measurements: dict[str, Measurement] = field(default_factory=dict)
    rounds: int = 0
    load: float | None = None  # share of the CPUs that other processes used
    failure: str = ""


def _alternate(suite: Suite, case: Case, mode: str, implementations: dict[str, Implementation]) -> Timing:
    """Time the implementations, interleaved, up to suite.attempts times until the background load is low."""
    best = Timing(load=float("inf"))
    start = time.monotonic()
    try:
        inputs = make_inputs(case, suite.device)
        programs: dict[str, Program] = {
            name: implementation.build(case, inputs) for name, implementation in implementations.items()
        }
        for _ in range(suite.attempts):
            measurements = {
                name: Measurement(lambda program=program: program.mode(mode)) for name, program in programs.items()
            }
            wait_for_idle(suite.wait)
            measured_load = background_load()
            timing = Timing(measurements, alternate(measurements, timer_for(suite.device), suite.plan), measured_load())
            if timing.load is None or timing.load < best.load:
                best = timing
            if (
                timing.load is None
                or timing.load <= MAX_BACKGROUND_LOAD
                or time.monotonic() - start > 2 * suite.plan.patience
            ):
                break
        return best
    except Exception as error:
        # Out of memory at full length, for example: the rows say so, and the suite continues.
        return Timing(failure=_failure(error))


def fastest_baseline(timing: Timing) -> Measurement:
    """Return the faster of nn.LSTM as called and nn.LSTM in a CUDA graph."""
    running = [timing.measurements[name] for name in BASELINES if name in timing.measurements]
    return min(running, key=lambda measurement: Spread.of(measurement.samples).p50)


def _failure(error: Exception) -> str:
    """Format an exception as one line for the CSV."""
    lines = str(error).splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"


def _row(suite: Suite, case: Case, mode: str, impl: str, peak: Peak) -> Row:
    return Row(
        suite=suite.name,
        case=case.name,
        mode=mode,
        impl=impl,
        target=case.target(mode),
        T=case.T,
        B=case.B,
        I=case.I,
        H=case.H,
        L=case.L,
        D=case.D,
        P=case.P,
        kind=case.kind,
        rows=case.rows,
        dtype=case.dtype,
        flops=case.flops(mode),
        limit=peak.name,
        limit_gflops=peak.gemm_rate / 1e9,
        limit_gbytes=peak.copy_rate / 1e9 if peak.copy_rate else None,
    )


def _time(row: Row, case: Case, measurement: Measurement, baseline: Measurement, lower_bound: float) -> None:
    """Fill the row's times and the columns derived from them; `lower_bound` is in seconds."""
    spread = Spread.of(measurement.samples)
    row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
    row.calls = measurement.calls
    row.ratio = Spread.of(baseline.samples).p50 / spread.p50
    row.ratio_rounds = statistics.median(a / b for a, b in zip(baseline.samples, measurement.samples, strict=True))
    row.floor_ms = lower_bound * 1e3
    row.fraction = lower_bound / spread.p50
    row.us_per_step = spread.p50 * 1e6 / case.T
    row.ns_per_row = spread.p50 * 1e9 / case.rows


def failures(rows: list[Row], implementations: dict[str, Implementation]) -> list[Row]:
    """Return the rows of our own implementations that were wrong or raised; if there are any, the run fails.

    A row whose name is not among the implementations is a feature of ours (benchmarks/features.py).
    """
    ours = [row for row in rows if row.impl not in implementations or implementations[row.impl].ours]
    return [row for row in ours if row.status.startswith(("WRONG", "failed"))]
