"""python -m benchmarks --suite frozen_accuracy: rows, changes, table; and what the committed CSVs must keep."""

from __future__ import annotations

import pytest

from benchmarks import frozen_accuracy, report, results, suites
from benchmarks.frozen_accuracy import FORMS, SUBJECTS, TRAINED, Measure
from benchmarks.results import AccuracyRow
from fastlstm.backends import native
from fastlstm.tutorials import common
from fastlstm.tutorials.sine_to_cosine import SineToCosine

from .fresh import ROOT

COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/frozen_accuracy.csv"))
needs_packages = pytest.mark.skipif(
    native.extension is None or bool(common.missing_packages([SineToCosine])), reason="needs the extension, matplotlib"
)


def names(rows: list[AccuracyRow]) -> list[str]:
    return [row.weights for row in rows]


@needs_packages
def test_every_form_of_a_trained_tutorial_is_measured():
    seen = []
    rows = frozen_accuracy.accuracy_rows("sine_to_cosine seed 0", lambda name, _: seen.append(name), quick=True)
    assert seen == ["sine_to_cosine seed 0"]
    assert names(rows) == [TRAINED, *FORMS]
    trained, float32, bfloat16, int8 = (row.value for row in rows)
    assert float32 == pytest.approx(trained, rel=1e-4)
    assert bfloat16 != float32
    assert int8 != float32
    assert int8 == pytest.approx(trained, rel=0.5)
    assert all(row.status == "ok" for row in rows)


@needs_packages
def test_training_that_misses_its_target_is_a_failure(monkeypatch):
    monkeypatch.setattr(SineToCosine, "checks", lambda *_: [common.Check("training MSE", 1.0, 1e-4)])
    rows = frozen_accuracy.accuracy_rows("sine_to_cosine seed 1", lambda *_: None, quick=True)
    assert {row.status for row in rows} == {"failed: the trained model misses its target: training MSE 1 (< 0.0001)"}


def test_cases_that_are_done_are_left_out():
    all_cases = suites.size_of("frozen_accuracy")
    assert all_cases == len(SUBJECTS) * len(frozen_accuracy.SEEDS)
    assert suites.size_of("frozen_accuracy", "char_model", {"char_model seed 0"}) == len(frozen_accuracy.SEEDS) - 1


@pytest.mark.parametrize(
    ("unit", "trained", "value", "expected"),
    [("points", 0.62, 0.617, -0.3), ("%", 8.0, 8.04, 0.5), ("", 0.9, 0.8, -0.1)],
)
def test_changes_are_in_the_unit_of_the_measure(unit, trained, value, expected):
    assert frozen_accuracy.change(Measure("", unit, ""), trained, value) == pytest.approx(expected)


def test_table_shows_means_and_ranges(tmp_path):
    rows = [
        AccuracyRow(
            suite="frozen_accuracy", case=f"char_model seed {seed}", mode="forward", impl="fastlstm", device="CPU",
            threads=1, torch="2", commit="abc", date="2026-11-30", tutorial="char_model", seed=seed, weights=form,
            measure="accuracy", unit="points", value=0.6 + value, change=100 * value,
        )
        for seed in (0, 1)
        for form, value in ((TRAINED, 0.0), ("float32", 0.0), ("bfloat16", 0.001 * seed), ("int8", -0.002 * seed))
    ]  # fmt: skip
    file = tmp_path / "frozen_accuracy.csv"
    results.write(rows, file)
    text = report.markdown(results.read(file))
    assert text.startswith("CPU, 1 threads, torch 2, commit abc, 2026-11-30.\n\n|")
    assert (
        "| char_model, accuracy | 60.00% | 60.00% | 60.05% | 59.90% | +0.05 points (+0.00 to +0.10) | "
        "-0.10 points (-0.20 to +0.00) |"
    ) in text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_int8_models_keep_their_accuracy(path):
    """Of every seed: the character model loses at most 0.3 points, the daily series 1 % of its MSE."""
    rows = {(row.case, row.measure): row for row in results.read(path) if row.weights == "int8"}
    for seed in frozen_accuracy.SEEDS:
        assert rows[f"char_model seed {seed}", "accuracy"].change >= -0.3
        assert rows[f"daily_series seed {seed}", "MSE"].change <= 1
