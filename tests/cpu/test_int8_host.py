"""The int8 products of each instruction set without torch: tests/cpu/cpu_host/int8_sums.cpp against scalar sums.

AVX_VNNI is compiled as the 256-bit instruction of AVX512_VNNI, which computes the same; aarch64 runs in an emulator.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..machine import cpuinfo
from .test_cpu_host import FLAGS, ROOT

pytestmark = pytest.mark.toolchain

# name: bytes of a vector, flags of the compiler, flags of the CPU, macros
SETS = {
    "baseline": (16, [], set(), []),
    "avx2": (32, ["-mavx2", "-mfma"], {"avx2", "fma"}, []),
    "avx_vnni": (
        32, ["-mavx2", "-mfma", "-mavx512vl", "-mavx512vnni"], {"avx512vl", "avx512_vnni"},
        ["FASTLSTM_VNNI", "FASTLSTM_AVX_VNNI_AS_AVX512"],
    ),
    "avx512_vnni": (
        64, [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni")] + ["-mfma"], {"avx512vl", "avx512_vnni"},
        ["FASTLSTM_VNNI"],
    ),
}  # fmt: skip


def run(compiler: str, name: str, folder: Path, *emulator: str) -> None:
    width, flags, _, macros = SETS[name]
    defines = [f"-DFASTLSTM_ISA={name}_host", f"-DFASTLSTM_VECTOR_BYTES={width}", f'-DFASTLSTM_INT8_NAME="{name}"']
    defines += [f"-D{macro}" for macro in macros]
    source, program = ROOT / "tests" / "cpu" / "cpu_host" / "int8_sums.cpp", folder / name
    static = ["-static"] if emulator else []
    silent = ["-Wno-maybe-uninitialized"]  # GCC 12's own header of intrinsics
    command = [
        compiler,
        *FLAGS,
        *silent,
        *flags,
        *defines,
        *static,
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    results = re.search(r"^(\d+) of (\d+) sums are right$", ran.stdout, re.MULTILINE)
    assert results is not None, ran.stdout + ran.stderr
    assert results[1] == results[2] != "0", ran.stdout


@pytest.mark.parametrize("name", SETS)
def test_sums_are_exact(name, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    if missing := SETS[name][2] - cpuinfo("flags"):
        pytest.skip(f"requires a CPU with {', '.join(sorted(missing))}")
    run(compiler, name, tmp_path)


def test_sums_are_exact_on_emulated_aarch64(tmp_path):
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH (Debian: g++-aarch64-linux-gnu, qemu-user)")
    run("aarch64-linux-gnu-g++", "baseline", tmp_path, "qemu-aarch64")
