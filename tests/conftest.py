"""Fixtures: one run per backend, and poisoned memory that reveals reads of uninitialized values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastlstm
from fastlstm import accuracy, dispatch
from fastlstm.backends import native

from .cases import Case
from .runners import require

# Small shapes are slower with threads, tenfold under background load. tests/cpu/test_threads.py tests more threads.
torch.set_num_threads(1)
COARSE = os.environ.get("FASTLSTM_COARSE_BOUNDS") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--steps", action="store_true", help="without the persistent CUDA kernels (docs/gpu-kernels.md)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--steps"):
        native.set_persistent(False)
    if COARSE:
        accuracy.Bounds._from = coarse_bounds


def pytest_report_header() -> str | None:
    return "coarse bounds of errors (FASTLSTM_COARSE_BOUNDS=1)" if COARSE else None


def coarse_bounds(bounds: accuracy.Bounds, samples: int) -> dict[str, float]:
    """A tenth of each result's scale, for scripts/sanitize.sh: it judges accesses, and what is read out of place shows.

    The evaluations that bounds otherwise come from take more than half of its time.
    """
    tiny = bounds._precision.tiny
    return {name: 0.1 * accuracy._scale(truth) + 64 * tiny for name, truth in bounds._truth.items()}


@pytest.fixture(params=[*dispatch.BACKENDS, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run once per backend, selected by name; skip with the reason if it cannot run on this machine."""
    require(request.param, Case())
    with fastlstm.use_backend(request.param):
        yield request.param


@pytest.fixture
def inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own: the key lacks ATEN_CPU_CAPABILITY, so kernels of different levels would mix (torch 2.13)."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill uninitialized tensors, those of C++ code included, with NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
