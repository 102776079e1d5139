"""Random configurations, frozen in a random form: forty in every run of the tests, a thousand with `-m fuzz`.

FASTLSTM_FUZZ_COUNT and FASTLSTM_FUZZ_SEED as in tests/tools/test_fuzz.py.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from ..cases import random_case
from .forms import FORMS, NO_EXTENSION, check_frozen, in_form

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

MOST_FAILURES = 5


def run_cases(count: int, seed: int) -> list[str]:
    """A description of each failure."""
    failures = []
    for k in range(seed, seed + count):
        rng = random.Random(k)
        case, form = random_case(rng, (torch.float32,)), rng.choice(list(FORMS))
        try:
            check_frozen(in_form(case, form), form)
        except Exception as error:
            again = f"FASTLSTM_FUZZ_SEED={k} FASTLSTM_FUZZ_COUNT=1 python -m pytest -m fuzz tests/frozen"
            failures.append(f"{type(error).__name__}: {error}\n  {form}, {case!r}\n  again: {again}")
            if len(failures) == MOST_FAILURES:
                break
    return failures


def test_forty_random_configurations():
    failures = run_cases(40, 20270)
    assert not failures, "\n".join(failures)


@pytest.mark.fuzz
def test_random_configurations(capsys):
    count = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "1000"))
    seed = int(os.environ.get("FASTLSTM_FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    failures = run_cases(count, seed)
    with capsys.disabled():
        print(f"\nfuzz of frozen layers: {count} configurations, {len(failures)} failed, FASTLSTM_FUZZ_SEED={seed}")
    assert not failures, "\n".join(failures)
