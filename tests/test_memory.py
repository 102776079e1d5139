"""Large buffers that the native backend keeps for its next call (csrc/cpu/memory.h): never shared, never hoarded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import fastlstm

from .cases import Case
from .runners import require

X = torch.randn(64, 32, 64)  # y and the reserve are 2 MiB and 8 MiB at H = 256


@pytest.fixture(autouse=True)
def native():
    require("native", Case())


def model() -> fastlstm.LSTM:
    torch.manual_seed(0)
    return fastlstm.LSTM(64, 256)


def test_memory_in_use_is_never_handed_out():
    lstm = model()
    kept = [lstm(X * k)[0] for k in range(1, 5)]
    expected = [y.detach().clone() for y in kept]
    for k in range(5, 9):
        lstm(X * k)[0].sum().backward()
    assert all(torch.equal(y, y0) for y, y0 in zip(kept, expected, strict=True))
    gradients = []
    for y in kept:  # each has a reserve of its own
        lstm.zero_grad()
        y.pow(2).sum().backward()
        gradients.append(lstm.weight_hh_l0.grad.clone())
    for k, gradient in enumerate(gradients, 1):
        lstm.zero_grad()
        lstm(X * k)[0].pow(2).sum().backward()
        assert torch.equal(lstm.weight_hh_l0.grad, gradient)


def test_results_are_tensors_like_any_other():
    y = model()(X)[0].detach()
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone().share_memory_()):
        assert torch.equal(other, y)
    size, sum_ = y.numel(), y.sum()
    grown = y.resize_(2 * size)
    torch.testing.assert_close(grown[:size].sum(), sum_)


def test_threads_share_the_kept_memory():
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


def test_kept_memory_does_not_pile_up():
    """Sixty different sizes leave no more behind than the largest of them takes."""
    program = """
import resource, torch, fastlstm
lstm = fastlstm.LSTM(64, 256)
def train(T):
    lstm(torch.zeros(T, 64, 64))[0].sum().backward()
train(16)
train(256)
once = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for T in range(20, 256, 4):
    train(T)
    lstm.zero_grad()
print(once, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    once, peak = map(int, done.stdout.split())
    assert peak < 1.25 * once, f"{peak} KiB after many sizes, {once} KiB after the largest"
