"""Benchmarks in CUDA graphs, baseline and fastlstm, with a simulated capture on the CPU."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

for package in ("rich", "numpy"):
    pytest.importorskip(package)

from benchmarks import graphs, implementations, report, run
from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.measure import Measurement, Plan
from benchmarks.programs import build_program
from benchmarks.results import BASELINES, Row

CASE = Case(5, 3, 4, 6)
MINIMAL_PLAN = Plan(budget=0, min_rounds=3, slow_rounds=3, min_sample=1e-6, warm_up=1e-6)


def simulated_graph(run, replays=True):
    """A graph that behaves as CUDA's: a replay writes into the memory of the capture."""
    captured = tuple(t.detach() for t in run())
    leaves: list[torch.Tensor] = []
    # As at the capture: the kernels that nn.LSTM takes without gradients round differently.
    records = torch.is_grad_enabled()

    def replay():
        if not replays:
            return captured
        grads_before = [(leaf, leaf.grad) for leaf in leaves]
        with torch.set_grad_enabled(records):
            outputs = run()
        for output, computed in zip(captured, outputs, strict=True):
            output.copy_(computed.detach())
        for leaf, grad in grads_before:  # backward in a graph writes into the memory of the capture
            leaf.grad = grad.copy_(leaf.grad)
        return captured

    owner = getattr(run, "__self__", None)
    leaves += [leaf for leaf in getattr(owner, "leaves", ()) if leaf.grad is not None]
    return graphs.Graph(replay, captured)


@pytest.fixture
def captures(monkeypatch):
    """The list of captured functions."""
    calls: list[object] = []
    monkeypatch.setattr(graphs, "capture", lambda run: calls.append(run) or simulated_graph(run))
    return calls


def program(case: Case = CASE) -> graphs.GraphProgram:
    return graphs.GraphProgram(build_program(case, make_inputs(case, "cpu"), nn.LSTM, nn.LSTMCell))


@pytest.mark.parametrize("kind", ["sequence", "stream", "cells"])
def test_replay_equals_the_eager_program(kind, captures):
    case = replace(CASE, kind=kind)
    eager = build_program(case, make_inputs(case, "cpu"), nn.LSTM, nn.LSTMCell)
    in_graphs = program(case)
    for mode in (*MODES, *MODES):
        expected, found = eager.results(mode), in_graphs.results(mode)
        assert found.keys() == expected.keys(), mode
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{mode}, {name}"
    assert len(captures) == len(MODES)  # each mode once


def test_timing_runs_replays_only(captures):
    in_graphs = program()
    for _ in range(3):
        with in_graphs.mode("forward") as run_once:
            assert run_once() is in_graphs.graphs["forward"].outputs
    assert len(captures) == 1


def test_gate_refuses_a_graph_that_computes_nothing(monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda run: simulated_graph(run, replays=False))
    no_op = implementations.Implementation(lambda case, inputs: program(case), ours=True)
    for result in run.check_all(CASE, "cpu", {"no_op": no_op}).values():
        assert all(result.status(mode).startswith("WRONG") for mode in MODES)


@pytest.mark.parametrize("faster", BASELINES)
def test_ratio_is_to_the_faster_baseline(faster, captures, monkeypatch):
    times = {"nn": 3.0, "nn_graph": 3.0, "fastlstm": 1.0, "fastlstm_graph": 1.0} | {faster: 2.0}

    def alternate(measurements, timer, plan):
        for name, measurement in measurements.items():
            measurement.samples[:] = [times[name]] * 3
        return 3

    monkeypatch.setattr(run, "alternate", alternate)
    suite = run.Suite("test", [CASE], plan=MINIMAL_PLAN, attempts=1)
    rows = run.run_suite(suite, {name: implementations.IMPLEMENTATIONS[name] for name in times})
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        assert row.ratio == row.ratio_rounds == 2.0 / times[row.impl]


def test_baseline_without_graphs_is_nn():
    timing = run.Timing({"fastlstm": Measurement.of(None), "nn": Measurement.of(None)})
    for measurement in timing.measurements.values():
        measurement.samples.append(1.0)
    assert run.fastest_baseline(timing) is timing.measurements["nn"]


def test_graphs_require_cuda(monkeypatch):
    assert "CUDA" in implementations.IMPLEMENTATIONS["nn_graph"].missing("cpu")
    assert implementations.IMPLEMENTATIONS["nn_graph"].refuses(replace(CASE, kind="packed", ragged="random"))
    assert list(implementations.select([], "cpu")) == ["nn", "fastlstm"]
    names = list(implementations.select(["native"], "cuda"))
    assert names == ["nn", "nn_graph", "native"]
    assert list(implementations.select([], "cuda"))[:4] == ["nn", "nn_graph", "fastlstm", "fastlstm_graph"]


def test_report_shows_both_baselines():
    about = {"suite": "gpu", "case": "a", "mode": "train", "device": "Testing GPU", "threads": 1, "date": "2026-01-02"}
    rows = [
        Row(impl=impl, p50_ms=ms, ratio=2.0 / ms, **about)
        for impl, ms in (("nn", 4.0), ("nn_graph", 2.0), ("fastlstm", 1.0))
    ]
    text = report.markdown(rows)
    assert "| case | nn.LSTM ms | in a graph ms | fastlstm ms | speedup | % of peak |" in text
    assert "| a | 4 | 2 | 1 | 2.00x |  |" in text
    assert "faster of nn.LSTM as called and nn.LSTM in a CUDA graph" in text
