"""The suite `calls`: what is timed, when it has no time, and its table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls, report
from benchmarks.measure import Plan
from benchmarks.results import Row

SHORT = Plan(budget=0.01, min_rounds=1, slow_rounds=1, min_sample=0.0, warm_up=0.0)


@pytest.mark.parametrize("mode", calls.MODES)
@pytest.mark.parametrize("call", calls.CALLS, ids=lambda call: call.name)
def test_fastlstm_and_nn_lstm_do_the_same_work(call, mode):
    body = calls.steps(call, mode)
    assert tuple(body) == calls.IMPLEMENTATIONS
    for ours, theirs in zip(body["fastlstm"](), body["nn"](), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(body["fastlstm"]()) == (4 if mode == "train" else 1)
    if mode == "forward":
        assert body["view"]()[0].shape == body["linear"]()[0].shape == body["nn"]()[0].shape


def test_wrong_result_has_no_time(monkeypatch):
    right = calls.steps

    def wrong(call, mode):
        body = right(call, mode)
        return body | {"fastlstm": lambda: [t * 1.01 for t in body["nn"]()]}

    monkeypatch.setattr(calls, "steps", wrong)
    rows = {row.impl: row for row in calls._measure(calls.Call("sequence", 1), "forward", SHORT)}
    assert rows["fastlstm"].status.startswith("WRONG")
    assert rows["fastlstm"].p50_ms is None
    assert rows["nn"].p50_ms > 0


def test_table_shows_own_costs():
    """The time above that of the view: (350 - 50) / (110 - 50)."""
    times = {"view": 0.05, "linear": 0.086, "nn": 0.35, "fastlstm": 0.11}
    rows = [Row("calls", "tiny", "train", impl, p50_ms=time, threads=1) for impl, time in times.items()]
    assert "| tiny | 50 | 86 | 350 | 110 | 5.0x |" in report.markdown(rows)
