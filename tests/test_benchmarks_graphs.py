"""nn.LSTM and fastlstm in CUDA graphs as baseline and contender, with a capture on the CPU in the place of CUDA's."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

for package in ("rich", "numpy"):
    pytest.importorskip(package)

from benchmarks import graphs, peers, report, run
from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.measure import Contender, Plan
from benchmarks.programs import build_program
from benchmarks.results import BASELINES, Row

CASE = Case(5, 3, 4, 6)
HASTY = Plan(budget=0, min_rounds=3, slow_rounds=3, min_sample=1e-6, warm_up=1e-6)


def recorded(run, replays=True):
    """A graph as CUDA's behaves: a capture leaves no numbers, a replay writes into the memory that was captured."""
    captured = tuple(t.detach() for t in run())
    leaves: list[torch.Tensor] = []

    def replay():
        if not replays:
            return captured
        before = [(leaf, leaf.grad) for leaf in leaves]
        for kept, made in zip(captured, run(), strict=True):
            kept.copy_(made.detach())
        for leaf, grad in before:  # in the memory of the capture, as backward in a graph writes them
            leaf.grad = grad.copy_(leaf.grad)
        return captured

    owner = getattr(run, "__self__", None)
    leaves += [leaf for leaf in getattr(owner, "leaves", ()) if leaf.grad is not None]
    return graphs.Graph(torch.enable_grad()(replay) if leaves else replay, captured)


@pytest.fixture
def captures(monkeypatch):
    """How often a program was captured."""
    calls: list[object] = []
    monkeypatch.setattr(graphs, "capture", lambda run: calls.append(run) or recorded(run))
    return calls


def program(case: Case = CASE) -> graphs.GraphProgram:
    return graphs.GraphProgram(build_program(case, make_inputs(case, "cpu"), nn.LSTM, nn.LSTMCell))


@pytest.mark.parametrize("kind", ["sequence", "stream", "cells"])
def test_a_replay_gives_the_programs_results(kind, captures):
    case = replace(CASE, kind=kind)
    plain = build_program(case, make_inputs(case, "cpu"), nn.LSTM, nn.LSTMCell)
    in_graphs = program(case)
    for mode in (*MODES, *MODES):
        expected, found = plain.results(mode), in_graphs.results(mode)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert len(captures) == len(MODES)  # each mode once


def test_timing_runs_replays_and_nothing_else(captures):
    in_graphs = program()
    for _ in range(3):
        with in_graphs.mode("forward") as run_once:
            assert run_once() is in_graphs.graphs["forward"].outputs
    assert len(captures) == 1


def test_numbers_left_by_the_capture_do_not_pass_the_gate(monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda run: recorded(run, replays=False))
    idle = peers.Peer(lambda case, inputs: program(case), ours=True)
    for found in run.judge_all(CASE, "cpu", {"idle": idle}).values():
        assert all(found.status(mode).startswith("WRONG") for mode in MODES)


@pytest.mark.parametrize("faster", BASELINES)
def test_ratios_are_to_the_faster_baseline(faster, captures, monkeypatch):
    times = {"nn": 3.0, "nn_graph": 3.0, "fastlstm": 1.0, "fastlstm_graph": 1.0} | {faster: 2.0}

    def alternate(contenders, timer, plan):
        for name, contender in contenders.items():
            contender.samples[:] = [times[name]] * 3
        return 3

    monkeypatch.setattr(run, "alternate", alternate)
    suite = run.Suite("test", [CASE], plan=HASTY, attempts=1)
    rows = run.run_suite(suite, {name: peers.PEERS[name] for name in times})
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        assert row.ratio == row.ratio_rounds == 2.0 / times[row.impl]


def test_without_a_graph_the_baseline_is_nn():
    timing = run.Timing({"fastlstm": Contender.of(None), "nn": Contender.of(None)})
    for contender in timing.contenders.values():
        contender.samples.append(1.0)
    assert run.fastest_baseline(timing) is timing.contenders["nn"]


def test_graphs_are_for_cuda(monkeypatch):
    assert "CUDA" in peers.PEERS["nn_graph"].missing("cpu")
    assert peers.PEERS["nn_graph"].refuses(replace(CASE, kind="packed", ragged="random"))
    assert list(peers.chosen([], "cpu")) == ["nn", "fastlstm"]
    names = list(peers.chosen(["native"], "cuda"))
    assert names == ["nn", "nn_graph", "native"]
    assert list(peers.chosen([], "cuda"))[:4] == ["nn", "nn_graph", "fastlstm", "fastlstm_graph"]


def test_the_report_shows_both_baselines():
    about = {"suite": "gpu", "case": "a", "mode": "train", "device": "Testing GPU", "threads": 1, "date": "2026-01-02"}
    rows = [
        Row(impl=impl, p50_ms=ms, ratio=2.0 / ms, **about)
        for impl, ms in (("nn", 4.0), ("nn_graph", 2.0), ("fastlstm", 1.0))
    ]
    text = report.markdown(rows)
    assert "| case | nn.LSTM ms | in a graph ms | fastlstm ms | ratio | goal | of the limit |" in text
    assert "| a | 4 | 2 | 1 | 2.00x |  |  |" in text
    assert "faster of nn.LSTM as called and nn.LSTM in a CUDA graph" in text
