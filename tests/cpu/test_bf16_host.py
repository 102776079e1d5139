"""The AMX kernels on emulated tiles, without torch.

tests/cpu/cpu_host/bf16_kernels.cpp compares them with the kernels of AVX512_BF16, and the GEMM of both with float64.
Where the CPU lacks AVX512_BF16, its instructions are emulated too.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from .test_cpu_host import FLAGS, HOST, ROOT, avx512_flags

pytestmark = pytest.mark.toolchain


def test_amx_kernels_on_emulated_tiles(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    sources = [HOST / "bf16_kernels.cpp", HOST / "bf16_amx_emulated.cpp", ROOT / "csrc" / "cpu" / "bf16_avx512.cpp"]
    silent = ["-Wno-maybe-uninitialized"]  # GCC 12's own header of intrinsics
    program = tmp_path / "bf16_kernels"
    flags = [*FLAGS, *silent, *avx512_flags("bf16"), f"-I{ROOT / 'csrc'}"]
    command = [compiler, *flags, *map(str, sources), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    results = re.search(r"^(\d+) of (\d+) results are right$", ran.stdout, re.MULTILINE)
    assert results is not None, ran.stdout + ran.stderr
    assert results[1] == results[2] != "0", ran.stdout
