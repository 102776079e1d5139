"""The CPU kernels for aarch64. They include no torch header, so tests/cpu/cpu_host/main.cpp compiles with a cross
compiler and runs in an emulator."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..machine import cpuinfo

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "cpu" / "cpu_host"
SOURCES = [
    HOST / "main.cpp",
    *sorted((ROOT / "csrc" / "cpu").glob("isa*.cpp")),
    *sorted((ROOT / "csrc" / "cpu").glob("bf16*.cpp")),
]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror"]


def avx512_flags(*extensions: str) -> list[str]:
    """The compiler's flags for AVX-512 and extensions such as "bf16", emulated on AVX2 where this CPU lacks one."""
    present = cpuinfo("flags")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", *(f"avx512_{name}" for name in extensions)} <= present:
        return [f"-mavx512{name}" for name in ("f", "bw", "dq", "vl", *extensions)] + ["-mfma"]
    if not {"avx2", "fma"} <= present:
        pytest.skip("requires a CPU with AVX2")
    return ["-mavx2", "-mfma", "-Wno-psabi", "-include", str(HOST / "emulated_avx512.h")]


def test_sources_include_no_torch_header():
    cpu = ROOT / "csrc" / "cpu"
    names = ("tuning.h", "sequence.h", "partition.h", "kernel_table.h")
    headers = {*cpu.glob("bf16*.h"), *cpu.glob("plan*"), *(cpu / name for name in names)}
    for path in {*SOURCES[1:], *headers}:
        assert not re.search(r"#include <(?:torch|ATen|c10)/", path.read_text()), path


@pytest.mark.packages
def test_layers_on_emulated_aarch64(tmp_path):
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH (Debian: g++-aarch64-linux-gnu, qemu-user)")
    host = tmp_path / "host"
    command = ["aarch64-linux-gnu-g++", *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-static", "-o", str(host)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run(["qemu-aarch64", str(host)], capture_output=True, text=True)
    results = re.search(r"^baseline: (\d+) of (\d+) layers are right$", ran.stdout, re.MULTILINE)
    assert results is not None, ran.stdout + ran.stderr
    assert results[1] == results[2] != "0", ran.stdout
    assert ran.returncode == 0
