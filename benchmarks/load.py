"""How much of the machine other processes took while something was measured: `others`; and waiting for calm.

A neighbour that holds one core stalls every parallel region at its barrier, and hits the implementation with more
regions hardest: times grow a hundredfold and the ratio means nothing. So every row says how quiet it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Above this share of all CPU time a measurement is repeated, and marked if it stays so.
BUSY = 0.10


def _busy_seconds() -> float | None:
    """CPU seconds all processes together, and the hypervisor's other guests, have used since boot; None off Linux."""
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
            continue  # off Linux
        used += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return used


def others(pids: Iterable[int] = ()) -> Callable[[], float | None]:
    """Start watching; the returned function gives the share of CPU time, 0 to 1, of other processes since then.

    pids: running processes that belong to the measurement, besides this one; they must outlive it.
    """
    pids = tuple(pids)
    before, mine, start = _busy_seconds(), _seconds_of(pids), time.monotonic()

    def share() -> float | None:
        after = _busy_seconds()
        if before is None or after is None:
            return None
        available = max(time.monotonic() - start, 1e-3) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (after - before - (_seconds_of(pids) - mine)) / available))

    return share


def wait_for_quiet(seconds: float, glance: float = 0.5) -> None:
    """Returns once the others' share over a `glance` was at most BUSY, or after `seconds`, or at once off Linux."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        share = others()
        time.sleep(glance)
        busy = share()
        if busy is None or busy <= BUSY:
            return
