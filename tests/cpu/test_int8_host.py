"""The int8 products of each instruction set without torch: tests/cpu/cpu_host/int8_sums.cpp against scalar sums.

AVX_VNNI is compiled as the 256-bit instruction of AVX512_VNNI, which computes the same; AMX runs on emulated tiles,
AVX-512 on emulated instructions where the CPU lacks them, aarch64 in an emulator. tests/cpu/cpu_host/int8_layers.cpp
compares layers on AMX with those on AVX512_VNNI, bit by bit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..machine import cpuinfo
from .test_cpu_host import FLAGS, HOST, ROOT, avx512_flags

pytestmark = pytest.mark.toolchain

# name: bytes of a vector, macros
SETS: dict[str, tuple[int, list[str]]] = {
    "baseline": (16, []),
    "avx2": (32, []),
    "avx_vnni": (32, ["FASTLSTM_VNNI", "FASTLSTM_AVX_VNNI_AS_AVX512"]),
    "avx512_vnni": (64, ["FASTLSTM_VNNI"]),
    "amx_int8": (64, ["FASTLSTM_VNNI", "FASTLSTM_INT8_AMX", "FASTLSTM_EMULATED_TILES"]),
}


def flags_of(name: str) -> list[str]:
    """The compiler's flags for an instruction set; skips the test where this CPU cannot run it."""
    if name == "baseline":
        return []
    if name != "avx2":
        return avx512_flags("vnni")
    if not {"avx2", "fma"} <= cpuinfo("flags"):
        pytest.skip("requires a CPU with AVX2")
    return ["-mavx2", "-mfma"]


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
    width, macros = SETS[name]
    defines = [f"-DFASTLSTM_ISA={name}_host", f"-DFASTLSTM_VECTOR_BYTES={width}", f'-DFASTLSTM_INT8_NAME="{name}"']
    defines += [f"-D{macro}" for macro in macros]
    static = ["-static"] if emulator else []
    arguments = [*flags_of(name), *defines, *static, str(HOST / "int8_sums.cpp")]
    assert_right(compiler, arguments, folder / name, emulator, "sums are right")


@pytest.mark.parametrize("name", SETS)
def test_sums_are_exact(name, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    run(compiler, name, tmp_path)


def test_layers_on_emulated_tiles_equal_those_of_vnni(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("requires a C++ compiler")
    sources = [HOST / "int8_layers.cpp", HOST / "int8_amx_emulated.cpp", ROOT / "csrc" / "cpu" / "int8_avx512.cpp"]
    arguments = [*avx512_flags("vnni"), *map(str, sources)]
    assert_right(compiler, arguments, tmp_path / "int8_layers", (), "layers are equal")


def test_sums_are_exact_on_emulated_aarch64(tmp_path):
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH (Debian: g++-aarch64-linux-gnu, qemu-user)")
    run("aarch64-linux-gnu-g++", "baseline", tmp_path, "qemu-aarch64")
