"""The latency of single steps with the state carried, from one or more Python threads: `Stream`, `stream_rows`."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import make_inputs
from benchmarks.gate import OUTPUTS
from benchmarks.inference.engines import ENGINES, Call, installed
from benchmarks.inference.gate import References
from benchmarks.inference.rows import checked, compare, new_row
from benchmarks.load import background_load, wait_for_rest
from benchmarks.measure import Runnable
from benchmarks.results import InferenceRow

STEPS = 100_000  # of all threads together, less where they would take longer than the budget
ROUNDS = 10  # in which the engines take turns
WARM_UP = 50  # untimed steps of each thread in each round
CHECKED_STEPS = 20
IMPLS = ("fastlstm", "frozen", "frozen_int8", "ort", "ort_int8")


@dataclass(frozen=True)
class Stream:
    """Steps of T = 1, B = 1 and I = H units, from `threads` Python threads that share the layer."""

    H: int
    threads: int

    @property
    def name(self) -> str:
        return f"steps H={self.H}, {self.threads} Python thread{'s' if self.threads > 1 else ''}"

    @property
    def case(self) -> Case:
        return Case(1, 1, self.H, self.H, kind="stream")


STREAMS = tuple(Stream(H, threads) for H in (64, 256) for threads in (1, 2, 8))


@dataclass
class Steps:
    """An engine's steps: a call for each thread; the latencies, and the seconds in which they passed."""

    calls: list[Call]
    latencies: list[int] = field(default_factory=list)  # nanoseconds
    seconds: float = 0.0

    def block(self, steps: int) -> None:
        """Run `steps` steps in every thread, all threads at a time, and keep their latencies."""
        barrier = threading.Barrier(len(self.calls))
        latencies: list[list[int]] = [[] for _ in self.calls]
        started, ended = [0.0] * len(latencies), [0.0] * len(latencies)

        def work(k: int) -> None:
            torch.set_num_threads(1)  # OpenMP's setting is each thread's own
            with torch.inference_mode():
                for _ in range(WARM_UP):
                    self.calls[k].run()
                barrier.wait()
                started[k] = time.perf_counter()
                timed_steps(self.calls[k].run, steps, latencies[k])
                ended[k] = time.perf_counter()

        workers = [threading.Thread(target=work, args=(k,)) for k in range(len(latencies))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.latencies += itertools.chain.from_iterable(latencies)
        self.seconds += max(ended) - min(started)

    def affordable(self, budget: float) -> int:
        """The steps of a thread in a round, so that all take at most `budget` seconds; warms up."""
        trial = 200
        self.block(trial)
        per_step = self.seconds / trial
        self.latencies, self.seconds = [], 0.0
        return max(1, min(STEPS // len(self.calls), int(budget / per_step)) // ROUNDS)


def timed_steps(run: Runnable, steps: int, latencies: list[int]) -> None:
    """Append the latency of each step."""
    clock, append = time.perf_counter_ns, latencies.append
    for _ in range(steps):
        start = clock()
        run()
        append(clock() - start)


def stream_rows(stream: Stream, budget: float) -> list[InferenceRow]:
    """One row per engine; `budget` is the max seconds for each of them. Sets torch's threads to 1."""
    torch.set_num_threads(1)
    inputs = make_inputs(stream.case)
    long = replace(stream.case, T=CHECKED_STEPS)
    references = References(long, replace(inputs, x=inputs.x.expand(CHECKED_STEPS, 1, stream.H).contiguous()))
    rows = {name: new_row(stream.case, "stream", name, stream.name) for name in IMPLS if name in installed()}
    running: dict[str, Steps] = {}
    for name, row in rows.items():
        row.python_threads = stream.threads

        def results(name: str = name, row: InferenceRow = row) -> dict[str, Tensor]:
            # One torch thread: no pool, so that spinning does not matter, and the first setting is as good as others.
            layer = ENGINES[name].build(stream.case, inputs.weights, 1, ENGINES[name].settings[0])
            row.weight_bytes = layer.weight_bytes
            running[name] = Steps([layer.bind(inputs.x, inputs.hx, carry=True) for _ in range(stream.threads)])
            return first_steps(running[name].calls[0])

        if not checked(row, references, results):
            running.pop(name, None)
    counts = {name: steps.affordable(budget) for name, steps in running.items()}
    measured_load = background_load()
    for _ in range(ROUNDS):
        for name, steps in running.items():
            wait_for_rest()
            steps.block(counts[name])
    load = measured_load()
    for name, steps in running.items():
        row = rows[name]
        row.p50_us, row.p99_us, row.p999_us = (float(p) / 1e3 for p in np.percentile(steps.latencies, [50, 99, 99.9]))
        row.steps, row.rounds, row.others_cpu = len(steps.latencies), ROUNDS, load
        row.steps_per_s = row.steps / steps.seconds
    # Not by the median: threads that wait for each other have a small one, and a long tail.
    compare(rows, {name: steps.seconds / len(steps.latencies) for name, steps in running.items()})
    return list(rows.values())


def first_steps(call: Call) -> dict[str, Tensor]:
    """The results of the first CHECKED_STEPS steps, as of one call over as many."""
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for _ in range(CHECKED_STEPS):
            call.run()
            outputs.append(call.outputs()[0].clone())
    _, h_n, c_n = call.outputs()
    return dict(zip(OUTPUTS, (torch.cat(outputs), h_n, c_n), strict=True))
