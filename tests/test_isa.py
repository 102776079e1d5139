"""The native CPU kernels at each instruction set that this machine has; ATEN_CPU_CAPABILITY chooses, as for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlstm import backends

from .test_bfloat16 import flags

NAMES = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}
LEVELS = [level for level in NAMES if level in ("DEFAULT", "AVX2", torch.backends.cpu.get_cpu_capability())]

PROGRAM = """
import sys, torch
from dataclasses import replace
from fastlstm import backends
from tests.runners import check
from tests.test_bfloat16 import CASES
from tests.test_parity import DTYPES, OPTIONS, SIZES
from tests.cases import Case
torch.set_num_threads(1)
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.backends.cpu.get_cpu_capability()
assert backends.native.extension.isa() == sys.argv[2], backends.native.extension.isa()
assert backends.native.extension.bfloat16_isa() == sys.argv[3], backends.native.extension.bfloat16_isa()
cases = [OPTIONS[k] for k in (2, 6, 14, 18, 19, 21, 22)] + [Case(*SIZES[k], hx="tuple") for k in (0, 2, 4, 5)]
shapes = ((20, 3), (1, 130), (1, 4), (4, 1))
cases += [Case(T=5, B=3, H=183)] + [Case(T=T, B=B, H=H) for T, B in shapes for H in (1, 2, 6, 7, 12, 29)]
for dtype in DTYPES:
    for case in cases:
        check(replace(case, dtype=dtype), "native")
for case in CASES:
    check(replace(case, dtype=torch.bfloat16), "native")
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in NAMES, reason="this CPU is no x86-64 with AVX")
@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_parity_at_each_level(level, backend):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT" and level != "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    # No level of torch's variable names AMX, so each of them turns it off.
    bfloat16 = "avx512_bf16" if level == "AVX512" and "avx512_bf16" in flags() else NAMES[level]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, level, NAMES[level], bfloat16],
        env={**os.environ, "ATEN_CPU_CAPABILITY": level.lower()},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr


def test_this_process_runs_at_torchs_level():
    if backends.native.extension is None:
        pytest.skip(backends.native.load_error)
    level = torch.backends.cpu.get_cpu_capability()
    if level not in NAMES:
        pytest.skip(f"{level} is no level of x86-64")
    assert backends.native.extension.isa() == NAMES[level]
