"""Measures one case in both revisions: `measure_case` gives an `AbRow` per mode.

The workers take turns: old new, new old, old new, ... in a launch; one runs a block of calls while the other sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.ab.paired import MIN_CHANGE, Launch, Ratio, noise_of, ratio_of, typical_spread, verdict_of
from benchmarks.ab.process import SIDES, WorkerError, WorkerProcess, workers
from benchmarks.ab.trees import Tree
from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.gate import check_accuracy, expected, precision
from benchmarks.load import background_load, wait_for_idle
from benchmarks.measure import Plan, Spread
from benchmarks.run import Suite

# A turn ends with a wait of some milliseconds (worker.py), so a block is longer than a sample of measure.py.
BLOCK_S = 0.02


@dataclass(frozen=True)
class Settings:
    """How to measure; times in seconds."""

    threads: int
    budget: float = 6.0  # per case and mode, all launches together, without the start of the processes
    launches: int = 4  # pairs of new processes per case
    wait: float = 0.0  # max, for an idle machine before each launch
    clock: str = "wall"  # or "cpu": CPU time, for one thread under background load
    block: float = BLOCK_S  # a block repeats its call until it lasts this long
    min_change: float = MIN_CHANGE

    def plan(self) -> Plan:
        """The plan of one launch."""
        return Plan(budget=self.budget / self.launches, min_rounds=5, patience=self.budget, min_sample=self.block)


@dataclass
class AbRow:
    """Columns in file order. Times are milliseconds per call; an empty field was not measured."""

    suite: str
    case: str
    mode: str  # train or forward
    status: str = "ok"  # ok; refused: which side is wrong, and how; failed: which side, and the exception
    ratio: float | None = None  # old time / new time
    ratio_low: float | None = None  # bounds of the 95 % interval
    ratio_high: float | None = None
    noise: float | None = None  # fraction of the time up to which a change is within noise
    verdict: str = ""  # faster, slower (the new revision, outside noise), within noise
    launch_spread: float | None = None  # standard deviation of the launches' medians, a fraction
    round_error: float | None = None  # standard error of one launch's median, from its rounds, a fraction
    old_p50_ms: float | None = None
    new_p50_ms: float | None = None
    launches: int | None = None
    rounds: int | None = None  # per launch
    calls: int | None = None  # per block
    clock: str = ""  # wall, or cpu: CPU time
    rest_ms: float | None = None  # median wait at the end of a turn until the process is at rest
    others_cpu: float | None = None  # share of the CPUs that other processes used
    old_backend: str = ""
    new_backend: str = ""
    gate_T: int | None = None  # the length the accuracy gate ran
    old_error: float | None = None  # of the gate's worst tensor, max norm against float64
    new_error: float | None = None
    error_allowed: float | None = None  # of new_error's tensor
    T: int | None = None
    B: int | None = None
    I: int | None = None  # noqa: E741
    H: int | None = None
    L: int | None = None
    D: int | None = None
    P: int | None = None
    kind: str = ""
    rows: int | None = None
    dtype: str = ""
    flops: int | None = None
    old_commit: str = ""
    new_commit: str = ""
    device: str = ""
    cpu: str = ""
    cpu_capability: str = ""
    cores: int | None = None
    threads: int | None = None
    torch: str = ""
    python: str = ""
    date: str = ""

    def estimate(self) -> Ratio | None:
        """What paired.py estimated, None if the case was refused or failed."""
        if self.ratio is None or self.ratio_low is None or self.ratio_high is None:
            return None
        spreads = (self.launch_spread or 0.0, self.round_error or 0.0)
        return Ratio(self.ratio, self.ratio_low, self.ratio_high, *spreads, self.launches or 1)


@dataclass
class _Samples:
    """Of one mode."""

    calls: int = 0
    rounds: int = 0
    launches: list[Launch] = field(default_factory=list)


def measure_case(suite: Suite, case: Case, trees: dict[str, Tree], settings: Settings) -> list[AbRow]:
    """Return the rows of a case. If a revision is wrong or raises, they have no time, and status has the reason."""
    rows = {mode: _row(suite.name, case, mode, trees) for mode in MODES}
    samples = {mode: _Samples() for mode in MODES}
    loads: list[float] = []
    rest: list[float] = []
    try:
        for launch in range(settings.launches):
            wait_for_idle(settings.wait)
            with workers(trees) as pair:
                measured_load = background_load(worker.pid for worker in pair.values())
                backends = {side: pair[side].run("load", case, settings.threads, settings.clock) for side in SIDES}
                for mode in MODES:
                    rows[mode].old_backend, rows[mode].new_backend = backends["old"], backends["new"]
                    _launch(pair, mode, settings.plan(), samples[mode], SIDES if launch % 2 == 0 else SIDES[::-1])
                load = measured_load()
                loads += [] if load is None else [load]
                rest += [seconds for worker in pair.values() for seconds in worker.rest_s]
                if launch == 0:  # after the timing, so that no launch runs anything before it
                    _check(pair, case.shortened(suite.gate_flops), settings, rows)
            if all(row.status != "ok" for row in rows.values()):
                break
    except WorkerError as error:
        for row in rows.values():
            row.status = f"failed: {error}"
    for mode, row in rows.items():
        if row.status == "ok":
            _fill(row, samples[mode])
            row.others_cpu = sum(loads) / len(loads) if loads else None
            row.clock = settings.clock
            row.rest_ms = Spread.of(rest).p50 * 1e3
    return list(rows.values())


def _launch(pair: dict[str, WorkerProcess], mode: str, plan: Plan, samples: _Samples, order: Sequence[str]) -> None:
    """Time a mode in one pair of processes; the first launch fixes the calls per block and the number of rounds."""
    calls = max(pair[side].run("calibrate", mode, plan) for side in order)
    samples.calls = samples.calls or calls
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    if not samples.rounds:
        start = time.monotonic()
        for side in order:
            pair[side].run("sample", mode, samples.calls)
        # Plan's number is odd; an even one gives both orders equally many rounds.
        samples.rounds = plan.rounds(time.monotonic() - start) + 1
    for turn in range(samples.rounds):
        for side in order if turn % 2 == 0 else order[::-1]:
            times[side].append(pair[side].run("sample", mode, samples.calls))
    samples.launches.append(Launch(times["old"], times["new"]))


def _check(pair: dict[str, WorkerProcess], case: Case, settings: Settings, rows: dict[str, AbRow]) -> None:
    """The gate of gate.py on both sides, in each mode; a wrong result sets the row's status."""
    reference = expected(case, make_inputs(case), precision(case, ours=True))
    for side in SIDES:
        pair[side].run("load", case, settings.threads, settings.clock)
        for mode, row in rows.items():
            accuracy = check_accuracy(pair[side].run("results", mode), reference, mode)
            row.gate_T, row.error_allowed = case.T, accuracy.allowed
            setattr(row, f"{side}_error", accuracy.error)
            if not accuracy.ok:  # new after old: a row with both wrong blames the new revision
                row.status = f"refused: {side} is WRONG: {accuracy}"


def _row(suite: str, case: Case, mode: str, trees: dict[str, Tree]) -> AbRow:
    sizes = {name: getattr(case, name) for name in ("T", "B", "I", "H", "L", "D", "P", "kind", "rows", "dtype")}
    row = AbRow(suite, case.name, mode, flops=case.flops(mode), **sizes)
    row.old_commit, row.new_commit = (trees[side].commit for side in SIDES)
    return row


def _fill(row: AbRow, samples: _Samples) -> None:
    ratio = ratio_of(samples.launches)
    row.ratio, row.ratio_low, row.ratio_high = ratio.value, ratio.low, ratio.high
    row.launch_spread, row.round_error, row.launches = ratio.launch_spread, ratio.round_error, ratio.launches
    row.rounds, row.calls = samples.rounds, samples.calls
    for side in SIDES:
        p50 = Spread.of([seconds for launch in samples.launches for seconds in getattr(launch, side)]).p50
        setattr(row, f"{side}_p50_ms", p50 * 1e3)


def decide(rows: list[AbRow], min_change: float = MIN_CHANGE) -> float:
    """Set noise and verdict of every row with a ratio, from all of them; return the typical spread of a launch."""
    known = [(row, ratio) for row in rows if (ratio := row.estimate())]
    typical = typical_spread([ratio for _, ratio in known])
    for row, ratio in known:
        row.noise = noise_of(ratio, typical, len(known), min_change)
        row.verdict = verdict_of(ratio, row.noise)
    return typical
