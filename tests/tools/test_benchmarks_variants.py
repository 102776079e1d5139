"""The suite variants: its rows, its gate with given masks, its table. Nothing is compiled, no test depends on times."""

from __future__ import annotations

import math

import pytest
import torch

import fastlstm
from benchmarks import report, variants


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(variants, "T", 4)
    monkeypatch.setattr(variants, "B", 3)
    monkeypatch.setattr(variants, "HS", (5,))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def rows_of(matching=""):
    return list(variants.variant_rows("variants", matching, lambda *_: None, 0.01, 0.0, set(), math.inf))


@pytest.mark.parametrize("option", list(variants.OPTIONS))
def test_rows(option):
    rows = {row.impl: row for row in rows_of(option)}
    assert list(rows) == ["loop", "compiled loop", "plain", "fastlstm"]
    assert all(row.status == "ok" and row.p50_ms and row.ratio for row in rows.values())
    loops = [rows[name].p50_ms for name in ("loop", "compiled loop")]
    assert rows["fastlstm"].ratio == min(loops) / rows["fastlstm"].p50_ms
    assert rows["fastlstm"].error <= rows["fastlstm"].error_allowed
    assert rows["plain"].error is None  # another function
    table = "\n".join(report._variants(list(rows.values())))
    assert f"| {option} T=4 B=3 I=H=5 |" in table


@pytest.mark.parametrize("option", list(variants.OPTIONS))
def test_wrong_gradients_get_no_time(option, monkeypatch):
    """A layer that ignores its option."""
    plain = fastlstm.functional.lstm
    names = ("recurrent_dropout", "zoneout")

    def ignoring(*args, layer_norm=False, **kwargs):
        if layer_norm:
            args = (args[0], args[1], [w * (1.01 if k == 4 else 1) for k, w in enumerate(args[2])], *args[3:])
        return plain(*args, layer_norm=layer_norm, **{key: v for key, v in kwargs.items() if key not in names})

    monkeypatch.setattr(fastlstm.functional, "lstm", ignoring)
    row = next(row for row in rows_of(option) if row.impl == "fastlstm")
    assert row.status.startswith("WRONG: gradient")
    assert row.p50_ms is None
