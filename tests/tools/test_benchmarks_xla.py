"""The suite xla: its cases, its threads, the gate on XLA's loop where jax is installed. No test depends on times."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import implementations, run, suites, xla
from benchmarks.__main__ import main
from benchmarks.cases import CPU, Case

STREAM = Case(1, 2, 4, 8, kind="stream")
DEEP = Case(6, 3, 4, 8, 2, bidirectional=True)


def test_cases():
    """They are layers of the suite cpu that the baseline runs."""
    of_cpu = {case.name for case in CPU}
    suite = suites.suite_of("xla")
    assert suite.isolated  # XLA's number of threads is fixed in a process
    for case in suite.cases:
        assert case.name in of_cpu
        assert xla.refuses(case) is None
    for changes in ({"kind": "packed", "ragged": "random"}, {"proj": 3}, {"dtype": "float64"}):
        assert "padded float32" in xla.refuses(replace(Case(6, 3, 4, 8), **changes)), changes


def test_missing_package(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--suite", "xla"]) == 2
    assert "xla cannot be measured: jax is not installed: pip install 'fastlstm[xla]'" in capsys.readouterr().out
    assert "CPUs" in xla.missing("cuda")


def test_threads_of_another_pool(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", str(torch.get_num_threads() + 1))
    with pytest.raises(RuntimeError, match=r"XLA's pool has PJRT_NPROC=\d+ threads in this process, torch has"):
        xla.limit_threads()
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(RuntimeError, match="before jax is imported"):
        xla.limit_threads()


@pytest.mark.skipif(xla.missing("cpu") is not None, reason=str(xla.missing("cpu")))
def test_gate(monkeypatch):
    """Outputs and all gradients are right by the accuracy rule; a wrong weight is refused."""
    monkeypatch.setenv("PJRT_NPROC", str(torch.get_num_threads()))
    both = {name: implementations.IMPLEMENTATIONS[name] for name in ("nn", "xla")}
    for case in (STREAM, DEEP):
        checked = run.check_all(case, "cpu", both)["xla"]
        assert [checked.status(mode) for mode in ("train", "forward")] == ["ok", "ok"], (case, checked)
    pool = [Path(f"/proc/self/task/{task.name}/comm").read_text() for task in Path("/proc/self/task").glob("*")]
    if pool:  # on Linux
        assert 0 < sum(name.startswith("tf_XLAEigen") for name in pool) <= torch.get_num_threads()

    def wrong(weights, *arguments):
        return right({**weights, "bias_hh_l0": weights["bias_hh_l0"] * 1.01}, *arguments)

    right = xla.lstm
    monkeypatch.setattr(xla, "lstm", wrong)
    checked = run.check_all(DEEP, "cpu", both)["xla"]
    assert all(checked.status(mode).startswith("WRONG") for mode in ("train", "forward"))
