"""Runs a suite: gate, alternate, rows. `run_suite` does all cases, `measure_case` one.

A case of a long CPU suite has a process of its own. What malloc kept of the cases before it serves whoever frees and
allocates at every step: nn.LSTM's training step at T=200, B=64, H=100, L=2 takes 125 ms in a fresh process and 82 after
a larger model, fastlstm's 74 in both (by hand, two Zen 4 cores).
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
from benchmarks.gate import Expected, expected, judge, precision
from benchmarks.load import BUSY, others, wait_for_quiet
from benchmarks.machine import Limit
from benchmarks.measure import Contender, Plan, Spread, alternate, timer_for
from benchmarks.peers import PEERS, Peer
from benchmarks.programs import Program
from benchmarks.results import BASELINES, Row
from fastlstm.accuracy import Accuracy, Precision


def as_it_is(case: Case) -> AbstractContextManager[None]:
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
    gate_flops: float = 1e11  # training flops the gate may spend on a case; T is cut to fit, and the CSV says to what
    attempts: int = 3  # at timing a case while other processes keep the machine busy
    wait: float = 0.0  # seconds to wait for a quiet machine before each attempt
    # Sets the arithmetic of a case (TF32 or IEEE) for all implementations alike.
    precision: Callable[[Case], AbstractContextManager[None]] = as_it_is
    # What runs inside nn.LSTM, for the CSV.
    baseline: Callable[[Case, str], str] = unnamed
    alone: bool = False  # a new process for each case; its peers are then those of PEERS by name


@dataclass
class Judged:
    """What the gate found about a peer on a case: the accuracy in each mode, or why there is none."""

    why: str = ""
    backend: str = ""
    accuracy: dict[str, Accuracy] = field(default_factory=dict)

    def status(self, mode: str) -> str:
        if self.why:
            return self.why
        return "ok" if self.accuracy[mode].ok else f"WRONG: {self.accuracy[mode]}"


def run_suite(
    suite: Suite,
    peers: dict[str, Peer],
    report: Callable[[Case, list[Row]], None] = lambda case, rows: None,
    until: float = float("inf"),
) -> list[Row]:
    """Every case of the suite under every peer that takes it; `report` is told of each case when it is done.

    No case is started after `until` (time.monotonic).
    """
    limits: dict[str, Limit] = {}
    rows: list[Row] = []
    for case in suite.cases:
        if time.monotonic() > until:
            break
        if suite.alone:
            made = _measure_alone(suite, case, list(peers))
        else:
            with suite.precision(case):
                if case.dtype not in limits:
                    limits[case.dtype] = Limit(case.dtype, suite.device)
                made = measure_case(suite, case, peers, limits[case.dtype])
        rows += made
        report(case, made)
    return rows


def _measure_alone(suite: Suite, case: Case, names: list[str]) -> list[Row]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        one = replace(suite, cases=[case], alone=False)
        return pool.submit(_in_new_process, one, names, torch.get_num_threads()).result()


def _in_new_process(suite: Suite, names: list[str], threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    silence()
    return run_suite(suite, {name: PEERS[name] for name in names})


def silence() -> None:
    """Of a warning about nn.LSTM, once a process, in the middle of the table."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")


def measure_case(suite: Suite, case: Case, peers: dict[str, Peer], limit: Limit) -> list[Row]:
    """The rows of one case. A peer that is wrong, or that raises, gets its row without a time."""
    gate_case = case.shortened(suite.gate_flops)
    judged = judge_all(gate_case, suite.device, peers)
    rows = []
    for mode in MODES:
        running = [name for name, found in judged.items() if found.status(mode) == "ok"]
        limit.reset()
        limit.sample()
        timing = _alternate(suite, case, mode, {name: peers[name] for name in running})
        limit.sample()
        for name, found in judged.items():
            row = _row(suite, case, mode, name, limit)
            row.gate_T, row.status = gate_case.T, found.status(mode)
            row.backend = suite.baseline(case, mode) if name in BASELINES else found.backend
            if mode in found.accuracy:
                row.error, row.error_allowed = found.accuracy[mode].error, found.accuracy[mode].allowed
            if name in running and timing.failure:
                row.status = timing.failure
            elif name in running:
                row.rounds, row.others_cpu = timing.rounds, timing.others
                _time(row, case, timing.contenders[name], fastest_baseline(timing), limit.floor(case, mode))
            rows.append(row)
    return rows


def judge_all(case: Case, device: str, peers: dict[str, Peer]) -> dict[str, Judged]:
    """The gate on every peer; without a right nn.LSTM, the baseline, no other is timed."""
    inputs = make_inputs(case, device)
    right: dict[Precision, Expected] = {}
    found: dict[str, Judged] = {}
    for name, peer in peers.items():
        one = found[name] = Judged()
        refusal = peer.refuses(case)
        try:
            if refusal is None:
                program = peer.build(case, inputs)
                one.backend, refusal = program.chosen()
            if refusal is not None:
                one.why = f"skipped: {refusal}"
                continue
            rounding = precision(case, peer.ours)
            if rounding not in right:
                right[rounding] = expected(case, inputs, rounding)
            for mode in MODES:
                one.accuracy[mode] = judge(program.results(mode), right[rounding], mode)
        except Exception as error:
            # One peer that cannot run a case must not end the suite; `failures` counts it when it is ours.
            one.why = _failure(error)
        if name == "nn" and any(one.status(mode) != "ok" for mode in MODES):
            return found | {
                other: Judged(why="skipped: nn.LSTM gave nothing to compare with") for other in peers if other != "nn"
            }
    return found


@dataclass
class Timing:
    """What alternating gave: contenders with their samples, or why there are none."""

    contenders: dict[str, Contender] = field(default_factory=dict)
    rounds: int = 0
    others: float | None = None  # share of the CPUs that other processes took meanwhile
    failure: str = ""


def _alternate(suite: Suite, case: Case, mode: str, peers: dict[str, Peer]) -> Timing:
    """Times the peers in turn; again, up to suite.attempts times, while others use the machine. Keeps the calmest."""
    best = Timing(others=float("inf"))
    start = time.monotonic()
    try:
        inputs = make_inputs(case, suite.device)
        programs: dict[str, Program] = {name: peer.build(case, inputs) for name, peer in peers.items()}
        for _ in range(suite.attempts):
            contenders = {
                name: Contender(lambda program=program: program.mode(mode)) for name, program in programs.items()
            }
            wait_for_quiet(suite.wait)
            share = others()
            timing = Timing(contenders, alternate(contenders, timer_for(suite.device), suite.plan), share())
            if timing.others is None or timing.others < best.others:
                best = timing
            if timing.others is None or timing.others <= BUSY or time.monotonic() - start > 2 * suite.plan.patience:
                break
        return best
    except Exception as error:
        # Out of memory at full length, say: the rows tell, and the suite goes on.
        return Timing(failure=_failure(error))


def fastest_baseline(timing: Timing) -> Contender:
    """Whichever of nn.LSTM as called and nn.LSTM in a graph took less time."""
    running = [timing.contenders[name] for name in BASELINES if name in timing.contenders]
    return min(running, key=lambda contender: Spread.of(contender.samples).p50)


def _failure(error: Exception) -> str:
    """One line for the CSV."""
    lines = str(error).splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"


def _row(suite: Suite, case: Case, mode: str, impl: str, limit: Limit) -> Row:
    return Row(
        suite=suite.name,
        case=case.name,
        mode=mode,
        impl=impl,
        goal=case.goal(mode),
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
        limit=limit.name,
        limit_gflops=limit.gemm_rate / 1e9,
        limit_gbytes=limit.copy_rate / 1e9 if limit.copy_rate else None,
    )


def _time(row: Row, case: Case, contender: Contender, baseline: Contender, floor: float) -> None:
    """Fills the row's times and what follows from them; `floor` is in seconds."""
    spread = Spread.of(contender.samples)
    row.p20_ms, row.p50_ms, row.p80_ms = spread.p20 * 1e3, spread.p50 * 1e3, spread.p80 * 1e3
    row.calls = contender.calls
    row.ratio = Spread.of(baseline.samples).p50 / spread.p50
    row.ratio_rounds = statistics.median(a / b for a, b in zip(baseline.samples, contender.samples, strict=True))
    row.floor_ms = floor * 1e3
    row.fraction = floor / spread.p50
    row.us_per_step = spread.p50 * 1e6 / case.T
    row.ns_per_row = spread.p50 * 1e9 / case.rows


def failures(rows: list[Row], peers: dict[str, Peer]) -> list[Row]:
    """Rows of our own implementations that were wrong or raised: what makes a run fail.

    What is no peer is a way of using ours (benchmarks/features.py).
    """
    ours = [row for row in rows if row.impl not in peers or peers[row.impl].ours]
    return [row for row in ours if row.status.startswith(("WRONG", "failed"))]
