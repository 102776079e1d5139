"""The CUDA sources compile: kernels with nvcc for each architecture, no spills, no torch headers; bindings with g++."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from .test_cuda_host import cuda_headers, unavailable_reason

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Ampere, Hopper, Blackwell: the supported architectures.
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}

# ptxas takes a minute per file and architecture for the persistent kernels' unrolled products, and the cell kernels
# have no code for one architecture alone: pytest -m slow compiles everything for each. By default the cell kernels
# compile for Hopper, and tests/gpu/test_cuda_sass.py looks for spills in one persistent kernel of each kind.
COMPILED = [
    pytest.param(
        source,
        architecture,
        id=f"{source.name}-{architecture}",
        marks=[pytest.mark.slow] if source.name.startswith("persistent_") or architecture != "sm_90a" else [],
    )
    for source in KERNELS
    for architecture in ARCHITECTURES
]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@needs_nvcc
@pytest.mark.parametrize(("source", "architecture"), COMPILED)
def test_kernels_do_not_spill(source, architecture, tmp_path):
    """ptxas -v: no spill and no stack frame, in any instantiation."""
    target = f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", target, f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-Werror"]
    # The host's part of the source is compiled once.
    command += ["all-warnings", "-c" if architecture == "sm_90a" else "-cubin", str(source)]
    command += ["-o", str(tmp_path / "kernels.o")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    name, spilled, registers = "", [], []
    for line in ran.stderr.splitlines():
        if found := re.search(r"Function properties for (\S+)", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += [f"{name}: {line.strip()}"] if any(map(int, found.groups())) else []
        elif found := re.search(r"Used (\d+) registers", line):
            registers.append(int(found[1]))
    assert registers, f"no output of ptxas: {ran.stderr}"
    assert not spilled, "\n".join(spilled)


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_include_no_torch_header(source):
    """So they compile in seconds and work with every torch."""
    command = ["nvcc", "-std=c++17", "-M", f"-I{ROOT / 'csrc'}", str(source)]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cell_kernels.h" in files
    assert not re.findall(r"\S*/(?:torch|ATen|c10)/\S*", files)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", ["latency", "exchange_by_data", pytest.param("steps", marks=pytest.mark.slow)])
def test_benchmark_programs_compile(name, architecture, tmp_path):
    """benchmarks/cuda, which scripts/gpu_*.sh run."""
    target = f"-gencode=arch={ARCHITECTURES[architecture]},code={architecture}"
    command = ["nvcc", "-std=c++17", "-O3", target, f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings"]
    command += [str(ROOT / "benchmarks" / "cuda" / f"{name}.cu"), "-o", str(tmp_path / name)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())
@pytest.mark.parametrize("name", ["device.cpp", "layer_persistent.cpp", "ops.cpp", "products.cpp"])
def test_binding_compiles(name):
    """The files that tests/gpu/test_cuda_host.py replaces or compiles with additional headers."""
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-I{ROOT / 'csrc'}", *(f"-isystem{folder}" for folder in (*include_paths(), cuda_headers()))]
    ran = subprocess.run([*command, str(ROOT / "csrc" / "cuda" / name)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
