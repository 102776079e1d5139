"""The CPU that tests run on."""

from __future__ import annotations

from pathlib import Path


def cpuinfo(key: str) -> set[str]:
    """The words of the first line of /proc/cpuinfo that begins with `key`; none where there is no such file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((set(line.split()) for line in lines if line.startswith(key)), set())
