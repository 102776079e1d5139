"""tests/hostile.py in processes of their own: no crash, no hang, no wrong number. A hundred; more with `-m fuzz`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BATCH = 500  # configurations a process


def run_hostile(backend: str, seed: int, count: int, device: str = "cpu") -> None:
    command = [sys.executable, "-m", "tests.hostile", backend, str(seed), str(count), device]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, timeout=60 + 2 * count, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    wrong = [line for k, line in enumerate(lines) if "WRONG" in line or (k and "WRONG" in lines[k - 1])]
    last = lines[-1] if lines else "nothing"
    assert done.returncode == 0, f"exit {done.returncode} after {last!r}\n" + "\n".join(wrong) + done.stderr[-2000:]
    assert last == "done, 0 wrong"


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
def test_a_hundred_hostile_calls(backend):
    run_hostile(backend, 1000, 100)


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
def test_hostile_calls(backend):
    count = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "10000"))
    seed = int(os.environ.get("FASTLSTM_FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    for start in range(seed, seed + count, BATCH):
        run_hostile(backend, start, min(BATCH, seed + count - start))
