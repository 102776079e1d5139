"""The background load, other processes' share of CPU time, during a measurement; waiting for idle CPUs or threads.

A process that occupies one core delays the barrier of every parallel region, most of all in the implementation with the
most regions: times grow a hundredfold and ratios are meaningless. So every row records its background load.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Above this share of all CPU time a measurement is repeated, and marked if the load remains.
MAX_BACKGROUND_LOAD = 0.10

# Thread pools spin for a while after a parallel region before they sleep, and would take a core from what is measured
# next: libgomp's for up to 300,000 pause instructions. CPU time used while asleep after the last region, on two cores
# of a Xeon with AVX-512, 2026-11-29: 5 ms after an ATen kernel, 1 ms after an MKL product, 0.05 ms under
# OMP_WAIT_POLICY=passive, which is not what users run. A process is at rest if it used less than REST_SHARE of a core
# over REST_S.
REST_S = 0.002
REST_SHARE = 0.1
REST_LIMIT_S = 5.0


def _used_cpu_seconds() -> float | None:
    """CPU seconds used since boot by all processes and by the hypervisor's other guests; None if not on Linux."""
    try:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _seconds_of(pids: Iterable[int]) -> float:
    """CPU seconds of this process, its children that have ended, and the running processes `pids`."""
    used = sum(os.times()[:4])
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # not on Linux
        used += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return used


def background_load(pids: Iterable[int] = ()) -> Callable[[], float | None]:
    """Start measuring; the returned function gives other processes' share of CPU time, 0 to 1, since this call.

    pids: running processes that belong to the measurement, besides this one; they must outlive it.
    """
    pids = tuple(pids)
    before, own_before, start = _used_cpu_seconds(), _seconds_of(pids), time.monotonic()

    def share() -> float | None:
        after = _used_cpu_seconds()
        if before is None or after is None:
            return None
        available = max(time.monotonic() - start, 1e-3) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (after - before - (_seconds_of(pids) - own_before)) / available))

    return share


def wait_for_idle(seconds: float, interval: float = 0.5) -> None:
    """Wait until the load over an `interval` is at most MAX_BACKGROUND_LOAD, or for `seconds`. Linux only."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        measured_load = background_load()
        time.sleep(interval)
        load = measured_load()
        if load is None or load <= MAX_BACKGROUND_LOAD:
            return


def process_seconds() -> float:
    """CPU seconds of all threads of this process, also of those that are running.

    Linux adds the time of a thread on another CPU to time.process_time only at a timer tick, every 4 ms at 250 Hz, so
    that a thread which spins goes unnoticed for longer than REST_S. The clock of a thread is exact; its id is the one
    that pthread_getcpuclockid computes from the thread's.
    """
    if not sys.platform.startswith("linux"):
        return time.process_time()
    total = 0.0
    for thread in os.listdir("/proc/self/task"):
        try:
            total += time.clock_gettime((~int(thread) << 3) | 6)
        except OSError:
            continue  # it has ended
    return total


def wait_for_rest() -> float:
    """Sleep until no thread of this process uses CPU time; return the seconds this took.

    Raises RuntimeError after REST_LIMIT_S, as under OMP_WAIT_POLICY=active.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < REST_LIMIT_S:
        used = process_seconds()
        time.sleep(REST_S)
        if process_seconds() - used < REST_SHARE * REST_S:
            return time.perf_counter() - start
    raise RuntimeError(
        f"a thread of this process still spins {REST_LIMIT_S:g} s after its last call (OMP_WAIT_POLICY=active?), "
        "and would slow down what is measured next"
    )
