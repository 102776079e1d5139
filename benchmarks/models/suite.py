"""The rows of the suite: each model unconverted and converted, interleaved, in a new process (`model_rows`)."""

from __future__ import annotations

import copy
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import nn

import fastlstm
from benchmarks.cases import MODES, SEED
from benchmarks.load import MAX_BACKGROUND_LOAD, background_load, wait_for_idle
from benchmarks.measure import Measurement, Plan, Spread, alternate, wall_timer
from benchmarks.models.clock import LSTMClock, lstms_of
from benchmarks.models.gate import check_accuracy, reference_of, results_of, step_of
from benchmarks.models.zoo import MODELS, Model, Workload
from benchmarks.results import ModelRow

PLAN = Plan(budget=4.0, min_rounds=7, slow_rounds=5, patience=20.0, warm_up=0.2)
ATTEMPTS = 2  # max timings of a model while the background load is too high
SHARE_ROUNDS = 5
IMPLS = ("nn", "fastlstm")


def chosen(matching: str = "", done: Set[str] = frozenset()) -> list[Model]:
    """The models whose case name contains `matching`, without those in `done`."""
    return [model for model in MODELS if matching in model.case and model.case not in done]


def model_rows(
    matching: str,
    report: Callable[[str, list[ModelRow]], None],
    budget: float | None = None,
    wait: float = 0.0,
    done: Set[str] = frozenset(),
    until: float = float("inf"),
) -> list[ModelRow]:
    """Four rows per model, by mode and implementation; `report` is called after each model.

    Args:
        matching, done: see `chosen`.
        budget: seconds per model and mode, in place of PLAN's.
        wait: max seconds to wait for an idle machine before timing.
        until: no model is started later than this (time.monotonic).
    """
    plan = PLAN if budget is None else replace(PLAN, budget=budget)
    rows = []
    for model in chosen(matching, done):
        if time.monotonic() > until:
            break
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            new_rows = pool.submit(_in_new_process, model, plan, wait, torch.get_num_threads()).result()
        rows += new_rows
        report(model.case, new_rows)
    return rows


def _in_new_process(model: Model, plan: Plan, wait: float, threads: int) -> list[ModelRow]:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")  # of the packages, about versions of what they use
    return measure_model(model, plan, wait)


def failure_status(error: Exception, model: Model) -> str:
    """Return the status of a model that could not be built: its package is not installed, or the error."""
    if isinstance(error, ModuleNotFoundError) and not _is_installed(model.package):
        return f"skipped: {model.package} is not installed (pip install 'fastlstm[models]')"
    if isinstance(error, (ImportError, OSError)):
        return f"skipped: {model.package} cannot be imported: {_one_line(error)}"
    return f"failed: {_one_line(error)}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measure_model(model: Model, plan: Plan = PLAN, wait: float = 0.0) -> list[ModelRow]:
    """The rows of one model: built, converted, checked, and timed where the results are right."""
    rows = {
        (mode, impl): ModelRow("models", model.case, mode, impl, kind="model", dtype="float32")
        for mode in MODES
        for impl in IMPLS
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            workload = model.build()
        package = f"{model.package} {importlib.metadata.version(model.package)}" if model.package else ""
    except Exception as error:
        # One model that cannot be built must not end the suite; the rows say why.
        for row in rows.values():
            row.status = failure_status(error, model)
        return list(rows.values())
    for row in rows.values():
        row.package = package
    for mode in MODES:
        pair = [rows[mode, impl] for impl in IMPLS]
        try:
            _measure_mode(workload, mode, pair, plan, wait)
        except Exception as error:
            pair[-1].status = f"failed: {_one_line(error)}"
    return list(rows.values())


def _measure_mode(workload: Workload, mode: str, pair: list[ModelRow], plan: Plan, wait: float) -> None:
    theirs = copy.deepcopy(workload.module)
    ours = fastlstm.convert(copy.deepcopy(workload.module))
    left = [type(lstm).__name__ for lstm in lstms_of(ours) if not isinstance(lstm, (fastlstm.LSTM, fastlstm.LSTMCell))]
    converted = len(lstms_of(ours)) - len(left)
    if left or not converted:
        raise ValueError(f"convert left {len(left)} LSTMs as they were and converted {converted}")
    reference = reference_of(workload, mode)
    accuracy = check_accuracy(results_of(workload, ours, mode), results_of(workload, theirs, mode), reference)
    for row in pair:
        row.lstms = converted
    pair[1].error, pair[1].error_allowed = accuracy.error, accuracy.allowed
    if not accuracy.ok:
        pair[1].status = f"WRONG: {accuracy}"
        return
    del reference
    _time(workload, mode, dict(zip(IMPLS, (theirs, ours), strict=True)), pair, plan, wait)


def _time(
    workload: Workload, mode: str, modules: dict[str, nn.Module], pair: list[ModelRow], plan: Plan, wait: float
) -> None:
    """Fill both rows' times, of the attempt with the lowest background load (max ATTEMPTS), and the LSTMs' shares."""
    steps = {impl: step_of(workload, module, mode) for impl, module in modules.items()}
    best: tuple[float, dict[str, Measurement], int] | None = None
    for _ in range(ATTEMPTS):
        wait_for_idle(wait)
        measurements = {impl: Measurement.of(step) for impl, step in steps.items()}
        measured_load = background_load()
        rounds = alternate(measurements, wall_timer, plan)
        load = measured_load() or 0.0
        if best is None or load < best[0]:
            best = load, measurements, rounds
        if load <= MAX_BACKGROUND_LOAD:
            break
    assert best is not None
    load, measurements, rounds = best
    baseline = measurements["nn"].samples
    for row, measurement in zip(pair, measurements.values(), strict=True):
        spread = Spread.of(measurement.samples)
        row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
        row.rounds, row.calls, row.others_cpu = rounds, measurement.calls, load
        row.ratio = Spread.of(baseline).p50 / spread.p50
        row.ratio_rounds = statistics.median(a / b for a, b in zip(baseline, measurement.samples, strict=True))
        row.lstm_share = lstm_share(modules[row.impl], steps[row.impl], measurement.calls)


def lstm_share(module: nn.Module, step: Callable[[], object], calls: int = 1) -> float:
    """The LSTMs' share of the time of `step`, 0 to 1: the median of SHARE_ROUNDS samples of `calls` calls."""
    shares = []
    for _ in range(SHARE_ROUNDS):
        with LSTMClock(module) as clock:
            shares.append(sum(_timed(clock, step) for _ in range(calls)) / calls)
    return statistics.median(shares)


def _timed(clock: LSTMClock, step: Callable[[], object]) -> float:
    before, start = clock.seconds, time.perf_counter()
    step()
    clock.close()
    return (clock.seconds - before) / (time.perf_counter() - start)


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
