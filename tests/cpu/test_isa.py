"""The native CPU kernels at each instruction set of this machine, selected by ATEN_CPU_CAPABILITY as in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlstm import backends

from ..cases import Case
from ..machine import cpuinfo
from ..ops.test_parity import DTYPES, OPTIONS
from ..runners import check_elsewhere
from .plans import assert_path
from .test_bfloat16 import CASES as BFLOAT16_CASES
from .test_blocks import HOISTED, ON_USE, UNPACKED

NAMES = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}
LEVELS = [level for level in NAMES if level in ("DEFAULT", "AVX2", torch.backends.cpu.get_cpu_capability())]

# (T, B) and the path of the weights: hoisted input projection, packing on use for one step, and unpacked.
SHAPES = {(20, 3): HOISTED, (1, 130): ON_USE, (1, 4): UNPACKED, (4, 1): UNPACKED}
CHOSEN_OPTIONS = (
    "no bias",
    "three layers",
    "strided",
    "two layers with lengths",
    "packed",
    "lengths and resets",
    "cell states",
)
CASES = [
    replace(case, dtype=dtype)
    for dtype in DTYPES
    for case in (
        *(OPTIONS[name] for name in CHOSEN_OPTIONS),
        *(Case(*size, hx="tuple") for size in ((1, 1, 1, 1), (1, 9, 5, 33), (3, 17, 8, 65), (7, 5, 9, 31))),
        Case(T=5, B=3, H=183),
        # Half and whole vectors and panels, with and without a rest, of each width.
        *(
            Case(T=T, B=B, H=H)
            for T, B in SHAPES
            for H in ((1, 2, 6, 7, 12, 29) if dtype == torch.float32 else (1, 29))
        ),
    )
] + [replace(case, dtype=torch.bfloat16) for case in BFLOAT16_CASES]

PROGRAM = """
import sys
from fastlstm import backends
from tests.runners import run_backend
torch.set_num_threads(1)
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.backends.cpu.get_cpu_capability()
assert backends.native.extension.isa() == sys.argv[2], backends.native.extension.isa()
assert backends.native.extension.bfloat16_isa() == sys.argv[3], backends.native.extension.bfloat16_isa()
save([[run_backend(case, "native")] for case in cases])
"""


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("T", "B"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paths_at_each_level(T, B, dtype, backend):
    for vector_bytes in (16, 32, 64):
        on = {"vector_bytes": vector_bytes, "bf16_kernels": False}
        assert_path(Case(T=T, B=B, H=29, dtype=dtype), "forward", at=1, on=on, **SHAPES[T, B])


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in NAMES, reason="requires x86-64 with AVX")
@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_parity_at_each_level(level, backend):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT" and level != "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    # No level of ATEN_CPU_CAPABILITY includes AMX, so each of them disables it.
    bfloat16 = "avx512_bf16" if level == "AVX512" and "avx512_bf16" in cpuinfo("flags") else NAMES[level]
    check_elsewhere(CASES, "native", PROGRAM, level, NAMES[level], bfloat16, ATEN_CPU_CAPABILITY=level.lower())


def test_isa_equals_torchs_level():
    if backends.native.extension is None:
        pytest.skip(backends.native.load_error)
    level = torch.backends.cpu.get_cpu_capability()
    if level not in NAMES:
        pytest.skip(f"{level} is not an x86-64 level")
    assert backends.native.extension.isa() == NAMES[level]
