"""Interleaved timing: `alternate` runs A B A B ... in one process; `Spread` summarizes the samples.

Absolute times on shared machines drift by tens of percent from minute to minute. Interleaved measurements share the
drift, so it cancels in their ratio.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

Runnable = Callable[[], object]


class Timer(Protocol):
    """Return the seconds that `calls` calls of `run` take until their work is done."""

    def __call__(self, run: Runnable, calls: int) -> float: ...


def wall_timer(run: Runnable, calls: int) -> float:
    """For CPUs, where a call returns when its work is done."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def cpu_time_timer(run: Runnable, calls: int) -> float:
    """CPU seconds of all threads of this process: with one thread, the time without that of other processes."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - start


def cuda_timer(run: Runnable, calls: int) -> float:
    """For CUDA, between two events on the current stream: the device's time, with the gaps a slow launch leaves."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timer_for(device: str) -> Timer:
    return cuda_timer if device == "cuda" else wall_timer


@dataclass(frozen=True)
class Plan:
    """How long to measure. Seconds, except the rounds."""

    budget: float = 3.0  # per case and mode, all implementations together
    min_rounds: int = 7
    slow_rounds: int = 3  # if min_rounds would take more than `patience`
    patience: float = 12.0
    max_rounds: int = 101
    min_sample: float = 0.005  # one sample repeats its call until it lasts this long, so timer overhead is negligible
    warm_up: float = 0.05  # min seconds; at least two calls

    def rounds(self, round_time: float) -> int:
        """An odd number of rounds, so that the median is one of them, for rounds of `round_time` seconds."""
        rounds = max(self.min_rounds, min(self.max_rounds, int(self.budget / round_time)))
        if rounds * round_time > max(self.patience, self.budget):
            rounds = max(self.slow_rounds, int(max(self.patience, self.budget) / round_time))
        return rounds | 1


@dataclass
class Measurement:
    """What is timed, and its samples. `enter` returns a context that yields the function to time, once per sample."""

    enter: Callable[[], AbstractContextManager[Runnable]]
    calls: int = 1
    samples: list[float] = field(default_factory=list)  # seconds per call, one per round

    @classmethod
    def of(cls, run: Runnable) -> Measurement:
        return cls(lambda: nullcontext(run))


@dataclass(frozen=True)
class Spread:
    """Percentiles of seconds per call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(*(float(p) for p in np.percentile(samples, [20, 50, 80])))


def alternate(measurements: dict[str, Measurement], timer: Timer, plan: Plan) -> int:
    """Warm up and calibrate each measurement, then fill its samples round by round. Return the number of rounds."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for measurement in measurements.values():
            measurement.calls = calibrate(measurement, timer, plan)
        first = sum(sample(measurement, timer) * measurement.calls for measurement in measurements.values())
        rounds = plan.rounds(max(first, 1e-9))
        for _ in range(rounds):
            for measurement in measurements.values():
                measurement.samples.append(sample(measurement, timer))
    finally:
        if collecting:
            gc.enable()
    return rounds


def sample(measurement: Measurement, timer: Timer) -> float:
    """Seconds per call. The first call is untimed: another measurement has just used the caches and thread pool."""
    with measurement.enter() as run:
        if measurement.calls > 1:
            run()
        return timer(run, measurement.calls) / measurement.calls


def calibrate(measurement: Measurement, timer: Timer, plan: Plan) -> int:
    """Warm up; return the number of calls a sample needs to last plan.min_sample."""
    with measurement.enter() as run:
        once = timer(run, 1)
        if once > plan.warm_up:
            return 1
        calls, spent = 1, once
        while spent < plan.warm_up or calls < 2:
            calls *= 2
            once = timer(run, calls) / calls
            spent += once * calls
    return max(1, math.ceil(plan.min_sample / once))
