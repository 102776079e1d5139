"""python -m benchmarks --suite models, on a small model defined here instead of a public one."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

import fastlstm
from benchmarks import __main__ as command
from benchmarks import report, results
from benchmarks.measure import Plan
from benchmarks.models import gate, suite
from benchmarks.models.clock import LSTMClock, lstms_of
from benchmarks.models.zoo import MODELS, Model, Workload
from benchmarks.results import ModelRow

PLAN = Plan(budget=0.0, min_rounds=3, warm_up=0.0, min_sample=0.001)


class Tagger(nn.Module):
    """An LSTM between linear layers with dropout, and LSTMCells in a loop over its results."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(3, 8), nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.2)
        self.lstm, self.cell = nn.LSTM(8, 5, 2, bidirectional=True, dropout=0.3), nn.LSTMCell(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.lstm(input=self.dropout(self.embed(x)))
        state, scores = None, []
        for step in output:
            state = self.cell(step, state)
            scores.append(self.score(state[0]))
        return torch.stack(scores)


def small_workload(module: nn.Module | None = None) -> Workload:
    x = torch.randn(6, 4, 3)
    return Workload(
        module or Tagger(),
        {"x": x, "count": torch.tensor(2)},
        lambda model, data: model(data["x"]).pow(data["count"]).mean(),
        lambda model, data: {"scores": model(data["x"])},
    )


MODEL = Model("tagger", "4 x 6", "", small_workload)


def test_model_is_converted_checked_and_timed():
    rows = suite.measure_model(MODEL, PLAN)
    assert [(row.mode, row.impl) for row in rows] == [
        ("train", "nn"),
        ("train", "fastlstm"),
        ("forward", "nn"),
        ("forward", "fastlstm"),
    ]
    for row in rows:
        assert row.status == "ok"
        assert row.lstms == 2
        assert row.p50_ms > 0
        assert row.ratio > 0
        assert 0 < row.lstm_share < 1
    assert all(row.error <= row.error_allowed for row in rows if row.impl == "fastlstm")


def test_baseline_stays_unconverted():
    workload = small_workload()
    suite.measure_model(Model("tagger", "4 x 6", "", lambda: workload), PLAN)
    assert all(isinstance(lstm, (nn.LSTM, nn.LSTMCell)) for lstm in lstms_of(workload.module))
    assert all(weight.grad is None for weight in workload.module.parameters())


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_wrong_model_is_refused_without_a_time(monkeypatch, mode):
    def convert_wrongly(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            module.cell.weight_ih *= 1.001
        return fastlstm_convert(module)

    fastlstm_convert = fastlstm.convert
    monkeypatch.setattr(fastlstm, "convert", convert_wrongly)
    rows = {row.impl: row for row in suite.measure_model(MODEL, PLAN) if row.mode == mode}
    assert rows["fastlstm"].status.startswith("WRONG: ")
    assert rows["fastlstm"].error > rows["fastlstm"].error_allowed
    assert all(row.p50_ms is None and row.ratio is None for row in rows.values())


def test_nan_missing_and_misshapen_results_are_wrong():
    reference = {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    results = {name: value.float() for name, value in reference.items()}
    assert gate.check_accuracy(results, results, reference).ok
    assert not gate.check_accuracy({**results, "b": torch.tensor([1.0, math.nan])}, results, reference).ok
    assert not gate.check_accuracy({**results, "b": torch.ones(3)}, results, reference).ok
    with pytest.raises(ValueError, match=r"results differ: \['b'\]"):
        gate.check_accuracy({"a": results["a"]}, results, reference)


def test_inaccurate_baseline_is_refused():
    reference = {"a": torch.ones(3, dtype=torch.float64)}
    inaccurate = {"a": torch.full((3,), 1.01)}
    with pytest.raises(ValueError, match="unconverted model differs"):
        gate.check_accuracy(inaccurate, inaccurate, reference)


def test_unconverted_lstm_is_a_failure():
    class Derived(nn.LSTM):
        pass

    class Holder(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = Derived(8, 5, 2, bidirectional=True, dropout=0.3)

    with pytest.warns(UserWarning, match="leaves subclasses"):
        rows = suite.measure_model(Model("derived", "", "", lambda: small_workload(Holder())), PLAN)
    assert {row.status for row in rows if row.impl == "fastlstm"} == {
        "failed: ValueError: convert left 1 LSTMs as they were and converted 1"
    }


def missing() -> Workload:
    __import__("a_package_that_is_not_there")

    raise AssertionError


def broken() -> Workload:
    raise OSError("libsomething.so: cannot open shared object file\nmore")


@pytest.mark.parametrize(
    ("package", "build", "status"),
    [
        ("no-such-package", missing, "no-such-package is not installed (pip install 'fastlstm[models]')"),
        (
            "torch",
            missing,
            "torch cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        ),
        ("torch", broken, "torch cannot be imported: OSError: libsomething.so: cannot open shared object file"),
    ],
)
def test_absent_package_is_skipped_with_the_reason(package, build, status):
    rows = suite.measure_model(Model("absent", "", package, build), PLAN)
    assert {row.status for row in rows} == {f"skipped: {status}"}


def test_clock_times_forward_and_backward_of_lstms_only(monkeypatch):
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    now = [0.0]

    def slow_backward(grad: torch.Tensor) -> None:
        now[0] += 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    scale = torch.ones(1, requires_grad=True)
    with LSTMClock(model) as clock:
        h = x * scale
        h.register_hook(slow_backward)  # after the LSTM's backward
        model[0].register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0), prepend=True)
        model[0].weight_hh_l0.register_hook(lambda grad: now.__setitem__(0, now[0] + 10.0))
        output, _ = model(h)
        loss = output * scale
        loss.register_hook(slow_backward)  # before the LSTM's backward
        loss.sum().backward()
        assert clock.seconds == 11.0
    assert now[0] == 211.0


def test_clock_without_input_gradients_ends_with_the_weights(monkeypatch):
    model, now = nn.LSTM(3, 4), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with LSTMClock(model) as clock:
        model.weight_hh_l0.register_hook(lambda grad: now.__setitem__(0, now[0] + 10.0))
        model(torch.randn(5, 2, 3))[0].sum().backward()
    assert clock.seconds == 10.0
    before = clock.seconds
    model(torch.randn(5, 2, 3))[0].sum().backward()
    assert clock.seconds == before  # the hooks are gone


def test_command_writes_a_csv_and_report_a_table(monkeypatch, tmp_path, capsys):
    def in_this_process(matching, report_case, *settings):
        for model in (MODEL, Model("absent", "1", "no-such-package", missing)):
            rows = suite.measure_model(model, PLAN)
            report_case(model.case, rows)
        return rows

    monkeypatch.setattr(suite, "model_rows", in_this_process)
    assert command.main(["--suite", "models", "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "models.csv")
    assert all(isinstance(row, ModelRow) and row.device and row.commit and row.torch for row in rows)
    text = report.markdown(rows)
    assert "| tagger, 4 x 6 |" in text
    assert "Not measured: absent, 1: skipped: no-such-package is not installed" in text
    assert "LSTMs take" in capsys.readouterr().out


def test_public_model_names_are_unique_and_selectable():
    assert len({model.case for model in MODELS}) == len(MODELS) == len(suite.chosen())
    assert [model.package for model in suite.chosen("open-unmix")] == ["openunmix"]
    assert suite.chosen("", {model.case for model in MODELS}) == []
