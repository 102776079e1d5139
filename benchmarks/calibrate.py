"""python -m benchmarks calibrate: the cost model of the CPU plan (csrc/cpu/cost.cpp) against this machine.

Measures the figures of csrc/cpu/tuning.h that follow from a layer's times, prints them next to the recorded ones, and
prints which plans of the suites they would change. Then times random layers on candidate thread partitions, and prints
how close the planned ones come to the fastest, with both sets of figures. Changes nothing. See docs/measuring.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlstm
from benchmarks import machine, sweeps
from benchmarks.cases import CPU, SEED, TORCH_DTYPES, Case
from benchmarks.console import Print, printer
from benchmarks.run import silence
from fastlstm.backends import native

Figures = dict[str, float]
Key = tuple[int, int, str, bool]  # threads per direction, row groups, split, concurrent directions

PASSES = ("forward", "backward")
# Idle threads fork and join faster than in a layer, so these are lower bounds.
LOWER_BOUNDS = ("fork_join_us", "fork_join_thread_us", "barrier_us", "barrier_thread_us")
# Multiply-adds of a pass of a random layer: 0.5 us to 5 ms on one core.
MIN_MACS, MAX_MACS = 3e4, 4e8
# Timed candidates per layer: those with the lowest predicted time; the best of each kind is timed in addition.
TIMED_CANDIDATES = 6
ROUNDS = 7


@contextmanager
def forced_partition(key: Key) -> Iterator[None]:
    """Run layers on this partition instead of the planned one."""
    _extension().force_cpu_partition(*key)
    try:
        yield
    finally:
        _extension().force_cpu_partition(0)


def _extension() -> Any:
    assert native.extension is not None
    return native.extension


def seconds(call: Callable[[], object], min_sample: float = 2e-3) -> Callable[[], float]:
    """Return a function that gives the seconds per call, over enough calls to last `min_sample` seconds."""
    call()
    begin = time.perf_counter()
    call()
    calls = max(1, min(1000, int(min_sample / (time.perf_counter() - begin))))

    def once() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    return once


# ---- Figures.


def forward_us(T: int, B: int, I: int, H: int) -> float:  # noqa: E741
    """Median time of a layer's forward in float32 on one thread, in microseconds."""
    lstm, x = fastlstm.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        once = seconds(lambda: lstm(x), 5e-3)
        return 1e6 * statistics.median(once() for _ in range(ROUNDS))


def measure_figures(threads: int) -> Figures:
    """Estimate the figures of CostFigures from a layer's times on one thread, and from fork, join and barrier times."""
    lanes = _extension().cpu_machine()["vector_bytes"] // 4
    recorded = _extension().cost_figures()
    torch.set_num_threads(1)
    # Many rows: the time per multiply-add from two depths K; the remainder is the cost per gate and row.
    T, B, H, shallow, deep = 20, 96, 128, 64, 256
    times = [forward_us(T, B, I, H) for I in (shallow, deep)]  # noqa: E741
    us_per_mac = (times[1] - times[0]) / (T * B * 4 * H * (deep - shallow))
    gate = times[0] / (T * B * 4 * H * us_per_mac) - (shallow + H)
    figures = {"vector_fmas_per_us": 1 / us_per_mac / lanes, "gate_cost_macs": gate}

    def product_rows(B: int, H: int) -> float:
        """Cost of a step's product with W_hh, as the number of rows whose multiply-adds take equally long; I = 1."""
        few, many = 50, 250
        step = (forward_us(many, B, 1, H) - forward_us(few, B, 1, H)) / (many - few)
        return (step / us_per_mac / (4 * H) - gate * max(B, recorded["gate_cost_min_rows"])) / (H + 1)

    figures["l2_read_rows"] = product_rows(1, 128)  # rows + read (1 - rows / read), of one row
    # rows + read (1 - rows / hidden), of one row and of eight.
    one, eight = product_rows(1, 512), product_rows(8, 512)
    falls = (one + 7 - eight) / 7
    if falls > 0:
        figures["l3_read_rows"] = one - 1 + falls
        figures["l3_hidden_min_rows"] = figures["l3_read_rows"] / falls
    if threads > 1:
        team = _extension().team_us
        barriers = 1000
        figures["fork_join_us"] = team(2, 0, 2000)
        figures["barrier_us"] = (team(2, barriers, 50) - team(2, 0, 50)) / barriers
        if threads > 2:
            extra_threads = threads - 2
            figures["fork_join_thread_us"] = (team(threads, 0, 2000) - figures["fork_join_us"]) / extra_threads
            barrier_us = (team(threads, barriers, 50) - team(threads, 0, 50)) / barriers
            figures["barrier_thread_us"] = (barrier_us - figures["barrier_us"]) / extra_threads
    torch.set_num_threads(threads)
    return {name: value for name, value in figures.items() if value > 0 and math.isfinite(value)}


# ---- Plans.


def arguments(case: Case) -> tuple[Any, ...]:
    return (case.dtype, case.T, case.B, case.I, case.H, case.P, case.D)


def plan(case: Case, threads: int, figures: Figures) -> dict[str, Any]:
    return _extension().cpu_plan(*arguments(case), threads=threads, figures=figures, **_extension().cpu_machine())


def key_of(p: dict[str, Any]) -> Key:
    return (p["members"], p["row_groups"], p["split"], p["concurrent"])


def partition_name(key: Key) -> str:
    members, groups, split, concurrent = key
    how = {"none": "1", "grid": f"{groups} x {members // groups}"}.get(split, f"{members} by {split}")
    return ("each direction " if concurrent else "") + how


def changes(threads: Sequence[int], figures: Figures) -> tuple[list[str], int]:
    """(plans of the suites' first layers that other figures change, number of plans)."""
    lines, count = [], 0
    for case in [*CPU, *sweeps.grid(), *sweeps.random_cases()]:
        if case.kind not in ("sequence", "stream"):
            continue
        for n in threads:
            before, after = plan(case, n, {}), plan(case, n, figures)
            for pass_ in PASSES:
                count += 1
                keys = key_of(before[pass_]), key_of(after[pass_])
                if keys[0] != keys[1]:
                    lines.append(
                        f"{case.name}, {pass_}, {n} threads: {partition_name(keys[0])} -> {partition_name(keys[1])}"
                    )
    return lines, count


# ---- Timed partitions.


@dataclass
class Timed:
    """A pass of a layer on some of its candidate partitions: predicted and measured us."""

    case: Case
    pass_: str
    predicted: dict[Key, float]
    measured: dict[Key, float] = field(default_factory=dict)

    def regret(self, key: Key) -> float:
        """Time of a partition / time of the fastest."""
        return self.measured[key] / min(self.measured.values())


def random_layer(draw: random.Random) -> Case:
    while True:
        T, B, I, H = (round(2 ** draw.uniform(0, log2_max)) for log2_max in (9, 7, 9.5, 10))  # noqa: E741
        case = Case(
            T=T,
            B=B,
            I=I,
            H=H,
            dtype=draw.choice(["float32", "float32", "float64", "bfloat16"]),
            bidirectional=draw.random() < 0.25,
            proj=draw.randint(1, H - 1) if H > 4 and draw.random() < 0.15 else 0,
        )
        if MIN_MACS < case.flops("forward") / 2 < MAX_MACS:
            return case


def candidates_to_time(candidates: list[tuple[int, int, str, bool, float]], chosen: set[Key]) -> dict[Key, float]:
    ordered = sorted(candidates, key=lambda candidate: candidate[4])
    kinds = {(c[2], c[3]): c for c in reversed(ordered)}
    planned = [c for c in ordered if c[:4] in chosen]
    return {tuple(c[:4]): c[4] for c in [*kinds.values(), *ordered[:TIMED_CANDIDATES], *planned]}  # type: ignore[misc]


def time_layer(case: Case, threads: int, figures: Figures) -> list[Timed]:
    """Time both passes on their candidates, interleaved; the partitions planned with both sets of figures included."""
    plans = [plan(case, threads, overrides) for overrides in ({}, figures)]
    chosen = {pass_: {key_of(p[pass_]) for p in plans} for pass_ in PASSES}
    candidates = _extension().cpu_plan_candidates(*arguments(case), threads=threads, **_extension().cpu_machine())
    dtype = TORCH_DTYPES[case.dtype]
    lstm = fastlstm.LSTM(case.I, case.H, bidirectional=case.bidirectional, proj_size=case.proj, dtype=dtype)
    x, weights = torch.randn(case.T, case.B, case.I, dtype=dtype), list(lstm.parameters())

    timed = []
    for pass_ in PASSES:
        row = Timed(case, pass_, candidates_to_time(candidates[pass_], chosen[pass_]))
        with torch.set_grad_enabled(pass_ == "backward"):
            y = lstm(x)[0]
            dy = torch.ones_like(y)

            def call(y: Tensor = y, dy: Tensor = dy, pass_: str = pass_) -> object:
                return lstm(x) if pass_ == "forward" else torch.autograd.grad(y, weights, dy, retain_graph=True)

            runs: dict[Key, Callable[[], float]] = {}
            for key in row.predicted:
                with forced_partition(key):
                    runs[key] = seconds(call)
            times: dict[Key, list[float]] = {key: [] for key in runs}
            for k in range(ROUNDS):
                for key in list(runs)[:: 1 if k % 2 == 0 else -1]:
                    with forced_partition(key):
                        times[key].append(runs[key]())
        row.measured = {key: 1e6 * statistics.median(values) for key, values in times.items()}
        timed.append(row)
    return timed


def summary(rows: list[Timed], threads: int, figures: Figures, label: str) -> list[str]:
    lines = []
    for pass_ in PASSES:
        regrets = [row.regret(key_of(plan(row.case, threads, figures)[pass_])) for row in rows if row.pass_ == pass_]
        mean = math.exp(sum(map(math.log, regrets)) / len(regrets))
        close = sum(regret < 1.05 for regret in regrets) / len(regrets)
        lines.append(
            f"{pass_}, {label}: {len(regrets)} layers take {mean:.3f} times the fastest partition's time (geometric "
            f"mean), {close:.0%} of them less than 1.05"
        )
    return lines


def write(path: Path, rows: list[Timed], threads: int) -> None:
    about = machine.describe("cpu")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["case", "pass", "threads", "partition", "predicted_us", "measured_us", "chosen", "cpu", "commit"]
        )
        for row in rows:
            chosen = key_of(plan(row.case, threads, {})[row.pass_])
            for key, us in row.measured.items():
                predicted = f"{row.predicted[key]:.1f}"
                values = [
                    partition_name(key),
                    predicted,
                    f"{us:.1f}",
                    int(key == chosen),
                    about["cpu"],
                    about["commit"],
                ]
                writer.writerow([row.case.name, row.pass_, threads, *values])


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks calibrate", description="The cost model of the CPU plan against this machine."
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's default otherwise")
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="to time random layers for (%(default)g)"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="of the random layers (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV of every partition's time")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    say: Print = printer()
    if native.extension is None:
        say(f"[red]{native.load_error}[/]")
        return 2
    silence()
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    about = machine.describe("cpu")
    say(f"{about['device']}, {threads} threads, torch {about['torch']}, commit {about['commit']}")
    with fastlstm.use_backend("native"):
        figures = measure_figures(threads)
        say(f"{'figure':<28}{'tuning.h':>12}{'here':>12}")
        for name, recorded in _extension().cost_figures().items():
            here = f"{figures[name]:12.4g}" if name in figures else f"{'-':>12}"
            say(f"{name:<28}{recorded:12.4g}{here}")
        numbers = sorted({threads, *(2**k for k in range(threads.bit_length()))})
        # The lower bounds of idle threads are no figures for a plan.
        figures = {name: value for name, value in figures.items() if name not in LOWER_BOUNDS}
        lines, count = changes(numbers, figures)
        say(f"with the figures measured here, {len(lines)} of {count} plans of the suites cpu, grid and random change")
        for line in lines[:20]:
            say(f"    {line}")
        rows: list[Timed] = []
        draw, end = random.Random(options.seed), time.monotonic() + options.seconds
        while threads > 1 and time.monotonic() < end:
            rows += time_layer(random_layer(draw), threads, figures)
    if rows:
        for line in [
            *summary(rows, threads, {}, "figures of tuning.h"),
            *summary(rows, threads, figures, "figures measured here"),
        ]:
            say(line)
    if options.output:
        write(options.output, rows, threads)
    return 0
