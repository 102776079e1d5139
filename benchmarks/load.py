"""How much of the machine other processes took while something was measured: `others`; and waiting for calm.

A neighbour that holds one core stalls every parallel region at its barrier, and hits the implementation with more
regions hardest: times grow a hundredfold and the ratio means nothing. So every row says how quiet it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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


def others() -> Callable[[], float | None]:
    """Starts watching; the function it gives tells the share of CPU time, 0 to 1, that was not this process's since."""
    before, mine, start = _busy_seconds(), sum(os.times()[:4]), time.monotonic()

    def share() -> float | None:
        after = _busy_seconds()
        if before is None or after is None:
            return None
        available = max(time.monotonic() - start, 1e-3) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (after - before - (sum(os.times()[:4]) - mine)) / available))

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
