"""The thread partitions and the barrier of the CPU kernels under ThreadSanitizer (tests/cpu/cpu_host/partitions.cpp).

Partitions and barrier are the extension's (csrc/cpu/partition.h, sequence.h); std::thread replaces OpenMP, which
ThreadSanitizer does not support. Null and misaligned pointers trap. Excluded are the kernels of csrc/cpu/bf16.h, whose
tiles read rows that other threads may write, and discard them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ..thread_sanitizer import FIRST_REPORT_ENDS, REPORT, compile_program, run_program
from .test_cpu_host import ROOT

pytestmark = pytest.mark.toolchain

BEST = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability())


def compile_partitions(folder: Path, isa: str) -> Path:
    sources = [ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp", ROOT / "tests" / "cpu" / "cpu_host" / "partitions.cpp"]
    # A null or misaligned pointer traps.
    flags = ("-fsanitize=null,alignment", "-fsanitize-undefined-trap-on-error")
    flags = (*flags, f"-I{ROOT / 'csrc'}", f"-DFASTLSTM_HOST_ISA={isa}", "-DFASTLSTM_TABLES(f)=f(float, float)")
    return compile_program(sources, folder / isa, "-ffp-contract=fast", "-fno-math-errno", *flags)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_partitions(tmp_path_factory.mktemp("partitions"), "baseline")


def assert_right_without_races(program: Path, max_members: int, at_least: int) -> None:
    """Rows, units, projection, ragged rows, one direction and two, at 2 to max_members threads per direction."""
    ran = run_program(program, max_members)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[:4000]
    results = re.search(r"^(\d+) of (\d+) partitions are right$", ran.stdout, re.MULTILINE)
    assert results is not None, ran.stdout
    assert results[1] == results[2], ran.stdout
    assert int(results[1]) >= at_least, ran.stdout


def test_partitions_have_no_races(baseline):
    assert_right_without_races(baseline, 8, at_least=160)


@pytest.mark.skipif(BEST is None, reason="requires x86-64 with AVX2")
def test_partitions_have_no_races_in_wide_vectors(tmp_path):
    """Threads begin at other units; accesses of masked instructions are not checked."""
    assert_right_without_races(compile_partitions(tmp_path, BEST), 3, at_least=80)


def test_missing_barrier_is_reported_as_a_race(baseline):
    ran = run_program(baseline, 2, "without-barrier", **FIRST_REPORT_ENDS)
    assert REPORT in ran.stderr
    assert ran.returncode != 0


SEQUENCE = (ROOT / "csrc" / "cpu" / "sequence.h").read_text()
# Of Barrier::wait: what each thread wrote before it, what the last to arrive publishes, and what the others read.
WEAKER = (
    ("fetch_add(1, std::memory_order_acq_rel)", "fetch_add(1, std::memory_order_relaxed)"),
    ("store(phase + 1, std::memory_order_release)", "store(phase + 1, std::memory_order_relaxed)"),
    ("load(std::memory_order_acquire)", "load(std::memory_order_relaxed)"),
)


def compile_barrier(folder: Path, sequence: str) -> Path:
    """tests/cpu/cpu_host/barrier.cpp with `sequence` as cpu/sequence.h."""
    (folder / "cpu").mkdir()
    (folder / "cpu" / "sequence.h").write_text(sequence)
    source = ROOT / "tests" / "cpu" / "cpu_host" / "barrier.cpp"
    return compile_program([source], folder / "barrier", f"-I{folder}", f"-I{ROOT / 'csrc'}")


def test_barrier_orders_what_threads_write(tmp_path):
    ran = run_program(compile_barrier(tmp_path, SEQUENCE), 3, **FIRST_REPORT_ENDS)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("order", "weaker"), WEAKER, ids=["arrival", "release", "acquire"])
def test_weaker_memory_order_in_the_barrier_is_reported_as_a_race(order, weaker, tmp_path):
    assert SEQUENCE.count(order) == 1
    ran = run_program(compile_barrier(tmp_path, SEQUENCE.replace(order, weaker)), 3, **FIRST_REPORT_ENDS)
    assert REPORT in ran.stderr
    assert ran.returncode != 0
