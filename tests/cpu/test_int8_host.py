"""The int8 products of each instruction set without torch: tests/cpu/cpu_host/int8_sums.cpp against scalar sums.

AVX_VNNI is compiled as the 256-bit instruction of AVX512_VNNI, which computes the same; AMX runs on emulated tiles,
aarch64 in an emulator. tests/cpu/cpu_host/int8_layers.cpp compares layers on AMX with those on AVX512_VNNI, bit by bit.
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

HOST = ROOT / "tests" / "cpu" / "cpu_host"
AVX512_VNNI = [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", "vnni")] + ["-mfma"]

# name: bytes of a vector, flags of the compiler, flags of the CPU, macros
SETS = {
    "baseline": (16, [], set(), []),
    "avx2": (32, ["-mavx2", "-mfma"], {"avx2", "fma"}, []),
    "avx_vnni": (
        32, ["-mavx2", "-mfma", "-mavx512vl", "-mavx512vnni"], {"avx512vl", "avx512_vnni"},
        ["FASTLSTM_VNNI", "FASTLSTM_AVX_VNNI_AS_AVX512"],
    ),
    "avx512_vnni": (64, AVX512_VNNI, {"avx512vl", "avx512_vnni"}, ["FASTLSTM_VNNI"]),
    "amx_int8": (
        64, AVX512_VNNI, {"avx512vl", "avx512_vnni"},
        ["FASTLSTM_VNNI", "FASTLSTM_INT8_AMX", "FASTLSTM_EMULATED_TILES"],
    ),
}  # fmt: skip


def assert_right(compiler: str, arguments: list[str], program: Path, emulator: tuple[str, ...], counted: str) -> None:
    """Compile a program that prints "N of N `counted`", and run it."""
    silent = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12's own header of intrinsics
    command = [compiler, *FLAGS, *silent, f"-I{ROOT / 'csrc'}", *arguments, "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    results = re.search(rf"^(\d+) of (\d+) {counted}$", ran.stdout, re.MULTILINE)
    assert results is not None, ran.stdout + ran.stderr
    assert results[1] == results[2] != "0", ran.stdout


def run(compiler: str, name: str, folder: Path, *emulator: str) -> None:
    width, flags, _, macros = SETS[name]
    defines = [f"-DFASTLSTM_ISA={name}_host", f"-DFASTLSTM_VECTOR_BYTES={width}", f'-DFASTLSTM_INT8_NAME="{name}"']
    defines += [f"-D{macro}" for macro in macros]
    static = ["-static"] if emulator else []
    arguments = [*flags, *defines, *static, str(HOST / "int8_sums.cpp")]
    assert_right(compiler, arguments, folder / name, emulator, "sums are right")


@pytest.mark.parametrize("name", SETS)
def test_sums_are_exact(name, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    if missing := SETS[name][2] - cpuinfo("flags"):
        pytest.skip(f"requires a CPU with {', '.join(sorted(missing))}")
    run(compiler, name, tmp_path)


def test_layers_on_emulated_tiles_equal_those_of_vnni(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    if missing := SETS["amx_int8"][2] - cpuinfo("flags"):
        pytest.skip(f"requires a CPU with {', '.join(sorted(missing))}")
    sources = [HOST / "int8_layers.cpp", HOST / "int8_amx_emulated.cpp", ROOT / "csrc" / "cpu" / "int8_avx512.cpp"]
    arguments = [*AVX512_VNNI, *map(str, sources)]
    assert_right(compiler, arguments, tmp_path / "int8_layers", (), "layers are equal")


def test_sums_are_exact_on_emulated_aarch64(tmp_path):
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH (Debian: g++-aarch64-linux-gnu, qemu-user)")
    run("aarch64-linux-gnu-g++", "baseline", tmp_path, "qemu-aarch64")
