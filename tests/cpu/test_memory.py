"""The native backend's caching allocator (csrc/cpu/memory.h): no aliasing, bounded memory."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import fastlstm

from ..cases import Case
from ..runners import require

X = torch.randn(64, 32, 64)  # y and the reserve are 2 MiB and 8 MiB at H = 256


@pytest.fixture(autouse=True)
def native():
    require("native", Case())


def model() -> fastlstm.LSTM:
    torch.manual_seed(0)
    return fastlstm.LSTM(64, 256)


def test_allocated_memory_is_never_reused():
    lstm = model()
    kept = [lstm(X * k)[0] for k in range(1, 5)]
    expected = [y.detach().clone() for y in kept]
    for k in range(5, 9):
        lstm(X * k)[0].sum().backward()
    assert all(torch.equal(y, y0) for y, y0 in zip(kept, expected, strict=True))
    gradients = []
    for y in kept:  # each has a separate reserve
        lstm.zero_grad()
        y.pow(2).sum().backward()
        gradients.append(lstm.weight_hh_l0.grad.clone())
    for k, gradient in enumerate(gradients, 1):
        lstm.zero_grad()
        lstm(X * k)[0].pow(2).sum().backward()
        assert torch.equal(lstm.weight_hh_l0.grad, gradient)


def test_results_are_ordinary_tensors():
    y = model()(X)[0].detach()
    copies = {
        "deepcopy": copy.deepcopy(y),
        "pickle": pickle.loads(pickle.dumps(y)),
        "shared memory": y.clone().share_memory_(),
    }
    for how, other in copies.items():
        assert torch.equal(other, y), how
    size, sum_ = y.numel(), y.sum()
    grown = y.resize_(2 * size)
    torch.testing.assert_close(grown[:size].sum(), sum_)


def test_threads_share_cached_memory():
    lstm, failures = model(), []
    with torch.no_grad():
        expected = lstm(X)[0]

    def work():
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(lstm(X)[0], expected):
                    failures.append("another result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


LIMITED = """
import contextlib, resource, sys, torch, fastlstm
lstm = fastlstm.LSTM(4, 64)  # T * 64 KiB for y and four times that for the reserve; little to compute
def train(T):
    lstm(torch.zeros(T, 256, 4))[0].sum().backward()
    lstm.zero_grad()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
@contextlib.contextmanager
def at_most(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def run_limited(program: str) -> list[int]:
    """Run `program` in a process that can limit its memory; return the numbers it prints."""
    if not sys.platform.startswith("linux"):
        pytest.skip("requires RLIMIT_AS as on Linux")
    # Otherwise malloc caches freed blocks of up to 32 MiB.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run([sys.executable, "-c", LIMITED + program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("failed", [False, True])
def test_cached_memory_is_bounded(failed):
    """After fifteen sizes, one of which did not fit, the cache holds no more than the largest one needs."""
    once, peak_of_many = run_limited(f"""
train(16)
train(256)
once = peak()
if {failed}:
    try:
        with at_most(1 << 30):
            lstm(torch.zeros(1, 256, 4).expand(10**6, 256, 4))
    except RuntimeError as error:
        assert "allocate memory" in str(error), error
    else:
        raise AssertionError("64 GiB were found")
for T in range(20, 256, 16):
    train(T)
print(once, peak())
""")
    assert peak_of_many < 1.1 * once, f"{peak_of_many} KiB after many sizes, {once} KiB after the largest"


def test_cached_memory_is_released_under_pressure():
    """No allocation fails because of cached memory."""
    run_limited("""
x = torch.zeros(700, 256, 4)
train(512)
with torch.no_grad(), at_most(4 << 20):
    lstm(x)  # y takes 44 MiB, and no cached block has about that size
""")


@pytest.mark.parametrize("kwargs", [{}, {"proj_size": 3}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("form", ["trainable", None, torch.bfloat16, torch.int8], ids=str)
def test_small_workspaces_show_nothing_of_earlier_calls(form, kwargs):
    """A thread keeps one block for them: a call that fills it with NaN changes no later result."""
    lstm, other, x = fastlstm.LSTM(5, 9, **kwargs), fastlstm.LSTM(33, 31, proj_size=17), X[:3, :2, :5]
    if form != "trainable":
        fastlstm.freeze(lstm, form)

    def results() -> list[torch.Tensor]:
        output, (h_n, c_n) = lstm(x)
        if form != "trainable":
            return [output, h_n, c_n]
        lstm.zero_grad()
        output.sum().backward()
        return [output.detach(), h_n.detach(), c_n.detach(), *(w.grad.clone() for w in lstm.parameters())]

    expected = results()
    assert other(torch.full((3, 4, 33), float("nan")))[0].isnan().all()
    for found, before in zip(results(), expected, strict=True):
        assert torch.equal(found, before), (form, kwargs)
