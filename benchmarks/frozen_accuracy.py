"""What freezing costs in accuracy: tutorials trained by fastlstm, frozen in each form, on data held out of training."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import fastlstm
from benchmarks.results import AccuracyRow
from fastlstm.backends import native
from fastlstm.tutorials.char_model import CharacterModel
from fastlstm.tutorials.common import History, Tutorial, implementation, missing_packages
from fastlstm.tutorials.daily_series import DailySeries
from fastlstm.tutorials.sine_to_cosine import SineToCosine
from fastlstm.tutorials.time_sequence import PERIOD, TimeSequence

SEEDS = (0, 1, 2)
FORMS = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}  # argument `weights` of fastlstm.freeze
TRAINED = "trained"  # the model as trained, not frozen


@dataclass(frozen=True)
class Measure:
    """A figure of a model."""

    name: str
    unit: str  # of a change: points (of a share, in percent), % (of the trained model's value) or as the value itself
    text: str  # format of a value


@dataclass(frozen=True)
class Subject:
    """A tutorial and what is measured of its model: `evaluate` returns a value for each measure."""

    tutorial: type[Tutorial]
    measures: tuple[Measure, ...]
    evaluate: Callable[[Tutorial, nn.Module], Iterable[float]]


def _characters(task: Tutorial, model: nn.Module) -> Iterable[float]:
    assert isinstance(task, CharacterModel)
    entropy, right = task.evaluate(model)
    return right, entropy


def _days(task: Tutorial, model: nn.Module) -> Iterable[float]:
    assert isinstance(task, DailySeries)
    return (task.mse(model, *task.held_out),)


@torch.no_grad()
def _cosine(task: Tutorial, model: nn.Module) -> Iterable[float]:
    assert isinstance(task, SineToCosine)
    sine, cosine = task.test
    return (F.mse_loss(model(sine), cosine).item(),)


def _waves(task: Tutorial, model: nn.Module) -> Iterable[float]:
    """The worst of the test waves; a model that feeds itself drifts in phase, so it is judged by the sine it draws."""
    assert isinstance(task, TimeSequence)
    history: History = defaultdict(list)
    task.look_ahead(model, history)
    fits = task.free_run(history)
    return (
        history["test"][-1],
        min(fit.r_squared for fit in fits),
        max(abs(fit.omega * PERIOD - 1) for fit in fits),
    )


SUBJECTS = (
    Subject(CharacterModel, (Measure("accuracy", "points", ".2%"), Measure("nats", "%", ".4f")), _characters),
    Subject(DailySeries, (Measure("MSE", "%", ".3f"),), _days),
    Subject(
        TimeSequence,
        (
            Measure("MSE of the next point", "%", ".1e"),
            Measure("R2 of a sine through 1,000 points ahead", "", ".3f"),
            Measure("error of its frequency", "", ".1%"),
        ),
        _waves,
    ),
    Subject(SineToCosine, (Measure("MSE", "%", ".2e"),), _cosine),
)


def chosen(matching: str = "", done: Set[str] = frozenset()) -> list[tuple[Subject, int]]:
    """Tutorials and seeds whose case name contains `matching`, without those in `done`."""
    pairs = [(subject, seed) for subject in SUBJECTS for seed in SEEDS]
    return [pair for pair in pairs if matching in case_name(*pair) and case_name(*pair) not in done]


def case_name(subject: Subject, seed: int) -> str:
    return f"{subject.tutorial.name} seed {seed}"


def accuracy_rows(
    matching: str,
    report: Callable[[str, list[AccuracyRow]], None],
    done: Set[str] = frozenset(),
    until: float = float("inf"),
    quick: bool = False,
) -> list[AccuracyRow]:
    """Rows by measure and form for each tutorial and seed; no training starts later than `until` (time.monotonic).

    quick: train the tutorials' quick forms.
    """
    rows = []
    for subject, seed in chosen(matching, done):
        if time.monotonic() > until:
            break
        new_rows = _measured(subject, seed, quick)
        rows += new_rows
        report(case_name(subject, seed), new_rows)
    return rows


def _measured(subject: Subject, seed: int, quick: bool) -> list[AccuracyRow]:
    """Train, check the tutorial's targets, freeze copies of the model and evaluate all.

    Frozen copies run in float32, the trained model in the dtype of its training.
    """
    names = {"tutorial": subject.tutorial.name, "seed": seed, "case": case_name(subject, seed)}
    absent = missing_packages([subject.tutorial])
    if absent:
        return [_row(names, subject.measures[0], TRAINED, status=f"skipped: needs {', '.join(absent)}")]
    task = subject.tutorial(quick, seed=seed)
    model, history = task.build(implementation("fastlstm")), defaultdict(list)
    for _ in task.train(model, history):
        pass
    missed = [str(check) for check in task.checks(model, history) if not check.passed]
    status = f"failed: the trained model misses its target: {'; '.join(missed)}" if missed else "ok"
    trained = list(subject.evaluate(task, model))
    values = {TRAINED: trained}
    in_float32 = subject.tutorial(quick, torch.float32, seed=seed)
    for form, weights in FORMS.items():
        frozen = fastlstm.freeze(copy.deepcopy(model).float(), weights=weights)
        values[form] = list(subject.evaluate(in_float32, frozen))
    rows = []
    for k, measure in enumerate(subject.measures):
        for form, of_form in values.items():
            row = _row(names, measure, form, status=status, dtype=str(task.dtype).removeprefix("torch."))
            row.value, row.change = of_form[k], change(measure, trained[k], of_form[k])
            if form == "int8":
                row.backend = native.extension.int8_isa()
            rows.append(row)
    return rows


def _row(names: dict, measure: Measure, form: str, **columns: str) -> AccuracyRow:
    kind = {"suite": "frozen_accuracy", "mode": "forward", "impl": "fastlstm", "kind": "tutorial"}
    return AccuracyRow(**kind, **names, measure=measure.name, unit=measure.unit, weights=form, **columns)


def change(measure: Measure, trained: float, value: float) -> float:
    """`value` minus the trained model's, in the measure's unit."""
    difference = value - trained
    return {"points": 100 * difference, "%": 100 * difference / trained, "": difference}[measure.unit]


def lines(rows: list[AccuracyRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table: means over the seeds, and the range of the changes."""
    headings = ["model, figure", TRAINED, *FORMS, "bfloat16, change", "int8, change"]
    shown = []
    for subject in SUBJECTS:
        for measure in subject.measures:
            of_measure = [
                row
                for row in rows
                if (row.tutorial, row.measure) == (subject.tutorial.name, measure.name) and row.value is not None
            ]
            if not of_measure:
                continue
            by_form = {form: [row for row in of_measure if row.weights == form] for form in (TRAINED, *FORMS)}
            means = [format(_mean(row.value for row in of_form), measure.text) for of_form in by_form.values()]
            changes = [_range([row.change for row in by_form[form]], measure) for form in ("bfloat16", "int8")]
            shown.append([f"{subject.tutorial.name}, {measure.name}", *means, *changes])
    return headings, shown


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _range(changes: list[float], measure: Measure) -> str:
    if not measure.unit:
        return ""
    unit = measure.unit if measure.unit == "%" else f" {measure.unit}"
    mean, least, most = (round(value, 2) + 0.0 for value in (_mean(changes), min(changes), max(changes)))  # no -0.00
    return f"{mean:+.2f}{unit} ({least:+.2f} to {most:+.2f})"
