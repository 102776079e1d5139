"""Random configurations on every backend against nn.LSTM: sixty in every run of the tests, a thousand with `-m fuzz`.

FASTLSTM_FUZZ_COUNT and FASTLSTM_FUZZ_SEED set the number and the first seed; configuration k is drawn from seed + k, so
that a failure runs again alone from the seed that it prints.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from ..cases import random_case
from ..runners import check, require

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
MOST_FAILURES = 5


def run_cases(count: int, seed: int, backend: str) -> tuple[int, list[str]]:
    """(number of configurations that ran, a description of each failure)."""
    ran, failures = 0, []
    for k in range(seed, seed + count):
        case = random_case(random.Random(k), DTYPES)
        try:
            require(backend, case)
            check(case, backend)
        except pytest.skip.Exception:
            continue
        except Exception as error:
            again = f"FASTLSTM_FUZZ_SEED={k} FASTLSTM_FUZZ_COUNT=1 python -m pytest -m fuzz -k {backend}"
            failures.append(f"{type(error).__name__}: {error}\n  {case!r}\n  again: {again}")
            if len(failures) == MOST_FAILURES:
                break
        ran += 1
    return ran, failures


def test_sixty_random_configurations(backend):
    ran, failures = run_cases(60, 20260, backend)
    assert ran > 0
    assert not failures, "\n".join(failures)


@pytest.mark.fuzz
def test_random_configurations(backend, capsys):
    count = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "1000"))
    seed = int(os.environ.get("FASTLSTM_FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    ran, failures = run_cases(count, seed, backend)
    with capsys.disabled():
        summary = f"{ran} of {count} configurations ran, {len(failures)} failed"
        print(f"\nfuzz on {backend}: {summary}, FASTLSTM_FUZZ_SEED={seed}")
    assert ran > 0
    assert not failures, "\n".join(failures)
