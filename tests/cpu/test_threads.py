"""Threads and processes: torch.set_num_threads, concurrent Python threads, fork after use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import fastlstm
from fastlstm import dispatch
from fastlstm.backends import native

from ..cases import Case
from ..module_pairs import naming
from ..ops.test_parity import OPTIONS
from ..runners import check, check_elsewhere, compare, precision, require, run, run_backend
from .plans import MACHINES, assert_path

LENGTHS = tuple(b % 10 for b in range(33))
# Backward has two chunks, and each thread packs the weights privately.
PRIVATE_PACK = Case(T=140, B=32, I=8, H=64)
# Cases large enough for two threads, and what those split: rows, units, or the directions ("none" within one).
SHARED = {
    Case(T=9, B=32, I=40, H=64, hx="tuple"): "rows",
    Case(
        T=9,
        B=33,
        I=5,
        H=97,
        layers=2,
        bidirectional=True,
        proj=31,
        hx="tuple",
        lengths=LENGTHS,
    ): "none",
    Case(T=30, B=3, I=70, H=200, dtype=torch.float64): "units",
    Case(T=6, B=160, I=33, H=48, dtype=torch.bfloat16): "rows",
    Case(T=90, B=9, I=20, H=64, lengths=(90, 80, 31, 30, 30, 9, 2, 0, 0), bidirectional=True): "none",
    # All rows of one thread end long before the other's.
    Case(T=70, B=12, I=30, H=72, lengths=(70, *[7] * 11)): "rows",
    # The last steps have one row, which one thread runs.
    Case(T=60, B=32, I=40, H=64, lengths=(60, *[30] * 31)): "rows",
    # Fewer rows of a projection than threads: units and features are split.
    Case(T=20, B=1, I=30, H=259, proj=140): "units",
    Case(
        T=20, B=3, I=30, H=259, proj=140, hx="tuple", lengths=(20, 3, 1), resets=((4, 0), (2, 1)), cells=True
    ): "units",
    Case(T=3, B=1, I=600, H=300, proj=90, hx="tuple"): "units",  # all weights are unpacked
    PRIVATE_PACK: "rows",
}
AVX512 = MACHINES["AVX-512, L2 2 MiB"]


@pytest.fixture
def threads():
    """Return torch.set_num_threads; restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def force_partition(threads):
    """Force the partition of every layer: threads per direction, row groups, split, concurrent directions."""

    def force(members: int, row_groups: int, split: str, concurrent: bool) -> None:
        threads(members * (2 if concurrent else 1))
        native.extension.force_cpu_partition(members, row_groups, split, concurrent)

    yield force
    native.extension.force_cpu_partition(0)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("case", "split"), SHARED.items(), ids=str)
def test_two_threads_split_the_work(case, split, backend):
    assert_path(case, "forward", at=2, on=AVX512, threads=2, split=split)


# Partitions of more than two threads, on any number of cores: case, number of threads, split.
RAGGED = {"lengths": (9, 9, 9, 9, 9, 9, 7, 1, 0), "resets": ((4, 0), (2, 1))}
CHOSEN = (
    (Case(T=20, B=48, I=64, H=128, bidirectional=True, hx="tuple"), 3, "rows"),  # sequential directions
    (Case(T=7, B=2, I=64, H=256, bidirectional=True, hx="tuple"), 3, "units"),
    (Case(T=20, B=24, I=64, H=64), 5, "rows"),
    (Case(T=7, B=1, I=70, H=259, hx="tuple"), 7, "units"),
    (Case(T=6, B=48, I=70, H=259, dtype=torch.bfloat16), 8, None),
)
# Grids of row groups by units: case, threads per direction, row groups, concurrent directions.
GRIDS = (
    (Case(T=6, B=16, I=70, H=259, hx="tuple"), 8, 2, False),
    (Case(T=4, B=16, I=70, H=259, bidirectional=True, cells=True), 6, 2, True),
    (Case(T=5, B=16, I=70, H=300, proj=250, hx="tuple"), 16, 4, False),
    (Case(T=9, B=9, I=30, H=131, **RAGGED), 8, 4, False),
    (Case(T=6, B=16, I=70, H=259, dtype=torch.bfloat16), 8, 4, False),
)


def check_twice(case: Case, backend: str) -> None:
    """Assert that results are correct and bitwise deterministic."""
    first = run_backend(case, backend)
    compare(case, first, precision(case.dtype, backend), backend)
    second = run_backend(case, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs from run to run"


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("case", "n", "split"), CHOSEN, ids=str)
def test_more_threads_in_one_call(case, n, split, backend, threads):
    if split:
        assert_path(case, "forward", at=n, on=AVX512, split=split)
    threads(n)
    check_twice(case, backend)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("case", "members", "row_groups", "concurrent"), GRIDS, ids=str)
def test_rows_and_units_in_one_call(case, members, row_groups, concurrent, backend, force_partition):
    force_partition(members, row_groups, "grid", concurrent)
    check_twice(case, backend)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_invalid_partition_is_refused(backend, force_partition):
    force_partition(5, 1, "rows", False)
    with pytest.raises(RuntimeError, match="the forced thread partition is no candidate"):
        run_backend(Case(T=3, B=4), backend)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_weights_packed_by_each_thread_over_several_chunks(backend):
    assert_path(PRIVATE_PACK, "backward", at=2, on=AVX512, copies=2, pack_hh=True, chunk_steps=128)


@pytest.mark.parametrize("backend", list(dispatch.BACKENDS), indirect=True)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_two_threads_in_one_call(case, backend, threads):
    require(backend, case)
    threads(2)
    check_twice(case, backend)


def divided(members: int, directions: int, kind: str) -> Case:
    """A layer with enough rows and unit blocks for this partition, and a tail block."""
    return Case(
        T=6,
        B=2 * members + 1,
        I=32,
        H=32 * members + 27,
        bidirectional=directions == 2,
        proj=70 if kind == "projection" else 0,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
        hx="tuple",
        lengths=tuple(6 - r * 6 // (4 * members) for r in range(2 * members + 1)) if kind == "ragged" else None,
    )


DIVIDED = [
    (threads, split, divided(threads // directions, directions, kind))
    for threads in range(3, 9)
    for directions in (1, 2)[: 2 - threads % 2]
    for split in ("rows", "units")
    for kind in ("ragged", "projection", "bfloat16")
]


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("count", "split", "case"), DIVIDED, ids=str)
def test_three_to_eight_threads_in_one_call(count, split, case, backend, force_partition):
    """Also more threads than cores. tests/cpu/test_partitions.py checks for races."""
    force_partition(count // case.directions, 1, split, case.bidirectional)
    check(case, backend)


# Gives one thread to half of the extension's parallel regions, as a runtime may do. A generator selects the half,
# because a fixed order would miss some sequences of regions and threads.
FEWER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
static int regions = 0;
static unsigned state = 1;
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
  void (*start)(void (*)(void *), void *, unsigned, unsigned) = dlsym(RTLD_NEXT, "GOMP_parallel");
  Dl_info from;
  int ours = dladdr(__builtin_return_address(0), &from) && strstr(from.dli_fname, "fastlstm/_C");
  if (ours && threads != 1) {
    ++regions;
    state = state * 1103515245 + 12345;
    if (state >> 30 & 1) threads = 1;
  }
  start(body, data, threads, flags);
}
__attribute__((destructor)) static void tell(void) { printf("%d regions\\n", regions); }
"""
PROGRAM = """
from tests.runners import run_backend
torch.set_num_threads(2)
save([[run_backend(case, "native") for _ in range(6)] for case in cases])
"""


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_fewer_threads_than_asked_for(backend, tmp_path):
    """Packing and barriers must not depend on the requested number of threads."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux, for a stand-in of GCC's OpenMP runtime")
    source, library = tmp_path / "fewer.c", tmp_path / "fewer.so"
    source.write_text(FEWER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    if check_elsewhere(SHARED, "native", PROGRAM, LD_PRELOAD=preload) == "0 regions\n":
        pytest.skip("this build does not start its threads by GOMP_parallel")


def together(count, work):
    """Run work(k) in `count` Python threads that start together; raise the error of any of them."""
    barrier, errors = threading.Barrier(count), []

    def run(k):
        try:
            barrier.wait()
            work(k)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_python_threads_at_once(backend):
    """Each thread trains a separate module; results equal those of running alone."""
    cases = [Case(T=6, B=3, I=4, H=17 + k, layers=2, bidirectional=True, hx="tuple", seed=k) for k in range(3)]
    for case in cases:
        require(backend, case)
    alone = [run_backend(case, backend) for case in cases]
    results = {}

    def work(k):
        for _ in range(5):
            results[k] = run(cases[k])

    with fastlstm.use_backend(backend):
        together(3, work)
    for k in range(3):
        for name, value in alone[k].items():
            torch.testing.assert_close(results[k][name], value, rtol=1e-5, atol=1e-6, msg=naming(f"{cases[k]}, {name}"))


def test_python_threads_share_a_module(backend):
    """As in a server: one module, concurrent requests."""
    lstm = fastlstm.LSTM(3, 16, 2).eval()
    inputs = [torch.randn(7, 2, 3) for _ in range(4)]
    with torch.no_grad():
        expected = [lstm(x)[0] for x in inputs]

    def work(k):
        with torch.no_grad():  # a setting per thread
            for _ in range(10):
                assert torch.equal(lstm(inputs[k])[0], expected[k])

    together(4, work)


FORKED = """
import os, sys, torch, fastlstm
torch.set_num_threads(2)
fastlstm.use_backend(sys.argv[1])
lstm, x = fastlstm.LSTM(20, 64, bidirectional=True), torch.randn(9, 32, 20)

def step():
    lstm.zero_grad()
    output, _ = lstm(x)
    output.sum().backward()
    return output.detach(), lstm.weight_hh_l0.grad.clone()

expected = step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(step(), expected))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
step()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("backend", list(dispatch.BACKENDS), indirect=True)
def test_fork_after_use(backend):
    """As in a DataLoader's workers. The child uses one thread, because OpenMP's pool does not survive a fork."""
    ran = subprocess.run([sys.executable, "-c", FORKED, backend], timeout=120, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_no_uninitialized_heap_memory_is_read(backend):
    """MALLOC_PERTURB_ makes glibc fill all allocations, those that bypass torch.empty included."""
    names = ("bidirectional", "two layers with projection", "two layers with lengths", "packed", "lengths and resets")
    cases = [OPTIONS[name] for name in names]
    program = """
from tests.runners import run_backend
torch.set_num_threads(1)
save([[run_backend(case, "native")] for case in cases])
"""
    check_elsewhere(cases, backend, program, MALLOC_PERTURB_="128")


def test_large_case_with_two_threads(backend, threads):
    case = Case(T=20, B=48, I=64, H=128, bidirectional=True)
    require(backend, case)
    if backend == "native":
        assert_path(case, "forward", at=2, on=AVX512, threads=2)
    threads(2)
    check(case, backend)
