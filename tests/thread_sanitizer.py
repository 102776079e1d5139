"""Programs that are compiled with ThreadSanitizer and run under it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPORT = "WARNING: ThreadSanitizer: data race"
FIRST_REPORT_ENDS = {"TSAN_OPTIONS": "halt_on_error=1"}


def compile_program(sources: list[Path], program: Path, *flags: str) -> Path:
    """Compile `program` with g++; skip the test where there is none or it has no ThreadSanitizer."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    command = ["g++", "-std=c++20", "-O1", "-g1", "-Wall", "-Werror", *flags, "-fsanitize=thread", "-pthread"]
    ran = subprocess.run([*command, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    if "cannot find -ltsan" in ran.stderr or "libtsan" in ran.stderr:
        pytest.skip("g++ has no ThreadSanitizer here")
    assert ran.returncode == 0, ran.stderr
    return program


def run_program(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    # With address space randomization of some Linux kernels ThreadSanitizer's shadow memory does not fit.
    command = [*(("setarch", "-R") if shutil.which("setarch") else ()), str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
