"""tests/adversarial.py in new processes: no crash, hang or wrong result. 100 calls; more with `-m fuzz`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BATCH = 500  # configurations per process


def run_adversarial(backend: str, seed: int, count: int, device: str = "cpu") -> None:
    command = [sys.executable, "-m", "tests.adversarial", backend, str(seed), str(count), device]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, timeout=60 + 2 * count, capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    wrong = [line for k, line in enumerate(lines) if "WRONG" in line or (k and "WRONG" in lines[k - 1])]
    last = lines[-1] if lines else "nothing"
    assert ran.returncode == 0, f"exit {ran.returncode} after {last!r}\n" + "\n".join(wrong) + ran.stderr[-2000:]
    assert last == "done, 0 wrong"


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
def test_100_adversarial_calls(backend):
    run_adversarial(backend, 1000, 100)


@pytest.mark.fuzz
@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
def test_adversarial_calls(backend):
    count = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "10000"))
    seed = int(os.environ.get("FASTLSTM_FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    for start in range(seed, seed + count, BATCH):
        run_adversarial(backend, start, min(BATCH, seed + count - start))
