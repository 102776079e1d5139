"""python -m benchmarks calibrate: figures, plans, timed partitions, and that it changes no state."""

from __future__ import annotations

import csv
import os
import random

import pytest
import torch

from benchmarks import calibrate
from benchmarks.cases import Case
from fastlstm.backends import native

pytestmark = [
    pytest.mark.skipif(native.extension is None, reason=native.load_error),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="barriers of two threads require two cores"),
]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_figures_are_recovered_from_modelled_times(monkeypatch):
    """Times computed by the cost model from arbitrary figures give these figures."""
    lanes = native.extension.cpu_machine()["vector_bytes"] // 4
    true_figures = {"vector_fmas_per_us": 700.0, "gate_cost_macs": 30.0}
    true_figures |= {"l2_read_rows": 5.0, "l3_read_rows": 12.0, "l3_hidden_min_rows": 30.0}
    gate_rows = native.extension.cost_figures()["gate_cost_min_rows"]

    def forward_us(T: int, B: int, I: int, H: int) -> float:  # noqa: E741
        if B == 96:
            rows = B
        elif H == 128:
            rows = true_figures["l2_read_rows"]
        else:
            rows = B + true_figures["l3_read_rows"] * (1 - B / true_figures["l3_hidden_min_rows"])
        macs = rows * (I + H) + true_figures["gate_cost_macs"] * max(B, gate_rows)
        return T * 4 * H * macs / lanes / true_figures["vector_fmas_per_us"]

    monkeypatch.setattr(calibrate, "forward_us", forward_us)
    figures = calibrate.measure_figures(2)
    assert {name: figures[name] for name in true_figures} == pytest.approx(true_figures)
    assert figures.keys() <= native.extension.cost_figures().keys()
    assert figures["fork_join_us"] > 0
    assert torch.get_num_threads() == 2


def test_forward_time_is_positive():
    assert calibrate.forward_us(3, 2, 4, 8) > 0


def test_other_figures_change_plans():
    lines, count = calibrate.changes([2], {"fork_join_us": 1e6})
    assert 0 < len(lines) < count
    assert any("by rows -> 1" in line for line in lines), lines
    assert calibrate.changes([1, 2], {})[0] == []


def test_unknown_figure_is_refused():
    with pytest.raises(RuntimeError, match="there is no figure fork_us"):
        calibrate.plan(Case(2, 2, 2, 2), 2, {"fork_us": 1.0})


def test_layer_is_timed_on_every_kind_of_partition():
    case = Case(T=5, B=8, I=16, H=64, bidirectional=True)
    for row in calibrate.time_layer(case, 2, {}):
        assert row.measured.keys() == row.predicted.keys()
        kinds = {(split, concurrent) for _, _, split, concurrent in row.measured}
        assert kinds == {("none", False), ("none", True), ("rows", False), ("units", False)}, row
        assert all(us > 0 for us in row.measured.values())
        chosen = calibrate.key_of(calibrate.plan(case, 2, {})[row.pass_])
        assert row.predicted[chosen] <= min(row.predicted.values()) / 0.98
        assert min(map(row.regret, row.measured)) == 1


def test_partition_of_backward_only_is_timed():
    """For a single step, forward does not split rows and backward does."""
    case = Case(T=1, B=64, I=300, H=200)
    forward, backward = calibrate.time_layer(case, 2, {})
    assert (2, 1, "rows", False) in backward.measured.keys() - forward.measured.keys()


def test_random_layers_are_deterministic():
    assert calibrate.random_layer(random.Random(1)) == calibrate.random_layer(random.Random(1))


def test_command_writes_every_timed_partition(tmp_path, capsys):
    path = tmp_path / "out.csv"
    assert calibrate.main(["--threads", "2", "--seconds", "0.5", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "plans of the suites cpu, grid and random change" in printed
    assert "forward, figures of tuning.h:" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    chosen = [row for row in rows if row["chosen"] == "1"]
    assert len(chosen) == len({(row["case"], row["pass"]) for row in rows})
