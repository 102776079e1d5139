"""The quick forms of the tutorials: each meets its target and follows nn.LSTM's training trajectory."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastlstm.backends import native
from fastlstm.tutorials import __main__ as command
from fastlstm.tutorials import common, regularized
from fastlstm.tutorials.common import Check, Trajectory, compare_trajectories, implementation
from fastlstm.tutorials.gates_from_scratch import scratch_difference
from fastlstm.tutorials.gradient_regression import GradientRegression
from fastlstm.tutorials.sine import fit_sine
from fastlstm.tutorials.time_sequence import StackedCells, WholeSequence, shape_exercise, sine_waves

from ..cpu.test_bf16_products import run_on_avx512_bf16

IMPLS = ("fastlstm", "torch")
MISSING = common.missing_packages(list(command.TUTORIALS.values()))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install {' '.join(MISSING)}")


@pytest.fixture(scope="module", params=list(command.TUTORIALS))
def trained(request):
    """A tutorial's quick form, trained with fastlstm."""
    task = command.TUTORIALS[request.param](quick=True)
    impl = implementation("fastlstm")
    model, history = task.build(impl), defaultdict(list)
    losses = list(task.train(model, history))
    return SimpleNamespace(task=task, impl=impl, model=model, history=history, losses=losses)


def test_quick_form_meets_its_bar(trained):
    checks = trained.task.checks(trained.model, trained.history)
    assert checks
    missed = [str(check) for check in checks if not check.passed]
    assert not missed, missed


@pytest.mark.skipif(native.extension is None, reason=native.load_error)
def test_quick_forms_meet_their_bars_with_bfloat16_products():
    """A regression and, with a smaller model of fewer updates, a classification: layers that follow torch's flag."""
    run_on_avx512_bf16("""
from collections import defaultdict
from itertools import islice
from fastlstm.tutorials.char_model import CharacterModel
from fastlstm.tutorials.common import implementation
from fastlstm.tutorials.gradient_regression import GradientRegression
torch.set_num_threads(1)
def build(tutorial):
    task = tutorial(quick=True)
    model = task.build(implementation("fastlstm"))
    if tutorial is CharacterModel:
        task.batches, characters = 100, len(task.characters)
        torch.manual_seed(0)
        model.lstm, model.head = fastlstm.LSTM(characters, 64, batch_first=True), torch.nn.Linear(64, characters)
    return task, model
for tutorial in (GradientRegression, CharacterModel):
    history = defaultdict(list)
    rnn.fp32_precision = "none"
    task, model = build(tutorial)
    float32 = list(islice(task.train(model), 5))
    rnn.fp32_precision = "bf16"
    task, model = build(tutorial)
    losses = list(task.train(model, history))
    missed = [str(check) for check in task.checks(model, history) if not check.passed]
    assert not missed, (tutorial, missed)
    assert losses[:5] != float32, tutorial
""")


def test_number_of_updates_stays_within_the_bound_of_the_progress_bar(trained):
    assert 0 < len(trained.losses) <= trained.task.updates


def test_plots_are_written_and_notes_are_text(trained, tmp_path):
    written = trained.task.plot(trained.model, trained.history, tmp_path)
    assert written
    for path in written:
        assert path.parent == tmp_path
        assert path.read_bytes().startswith(b"\x89PNG")
    assert all(isinstance(note, str) and note for note in trained.task.notes(trained.model, trained.impl))


@pytest.mark.parametrize("name", list(command.TUTORIALS))
def test_first_50_updates_equal_those_of_nn_lstm(name):
    trajectory = compare_trajectories(command.TUTORIALS[name], quick=True)
    assert len(trajectory.torch) == 50
    assert trajectory.torch[-1] != trajectory.torch[0]
    assert trajectory.check().value <= 1e-6  # float64, relative


@pytest.mark.parametrize("impl", IMPLS)
def test_loop_of_cells_equals_one_call(impl):
    impl = implementation(impl)
    torch.manual_seed(0)
    cells = StackedCells(impl).double()
    sequence = WholeSequence.from_cells(cells, impl)
    points = sine_waves(4, 30, torch.Generator().manual_seed(0))
    gradients = []
    for model in (cells, sequence):
        output = model(points)
        gradients.append(torch.autograd.grad(output.square().sum(), model.head.weight)[0])
    torch.testing.assert_close(sequence(points), cells(points), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_shape_exercise(impl):
    assert shape_exercise(implementation(impl)) == [(5, 3, 20), (2, 3, 20), (2, 3, 20)]


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_from_scratch_equal_the_cell(impl):
    assert scratch_difference(implementation(impl)) < 1e-13  # float64, states of order one, gradients of order ten


def test_one_seed_gives_both_implementations_the_same_weights():
    task = GradientRegression(quick=True)
    theirs, ours = (
        task.build(implementation(name), torch.float64, seed=3).state_dict() for name in ("torch", "fastlstm")
    )
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


def test_sine_metric_separates_sines_from_other_signals():
    n = torch.arange(300)
    fit = fit_sine(0.7 * torch.sin(0.05 * 1.1 * n + 1) + 0.2, 0.05)
    assert fit.r_squared > 0.999
    assert fit.amplitude == pytest.approx(0.7, rel=1e-2)
    assert fit.omega == pytest.approx(0.055, rel=1e-2)
    assert fit_sine(torch.randn(300, generator=torch.Generator().manual_seed(0)), 0.05).r_squared < 0.2
    assert fit_sine(torch.zeros(300), 0.05).amplitude < 1e-6
    assert fit_sine(torch.exp(-n / 10.0), 0.05).amplitude < 0.5


def test_diverged_run_fails_the_check():
    nan = float("nan")
    assert not Check("loss", nan, 1.0).passed
    assert not Check("accuracy", nan, 0.5, below=False).passed
    assert not Trajectory([1.0, 1.0, 1.0], [1.0, nan, 1.0]).check().passed


class Short(GradientRegression):
    """Eight updates: enough to run the command, too few to learn."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.epochs = 2


class ShortAndSatisfied(Short):
    def checks(self, model, history):
        return [Check("validation MSE", history["validation"][-1], 10.0)]


@pytest.mark.parametrize(("tutorial", "status", "word"), [(Short, 1, "MISS"), (ShortAndSatisfied, 0, "pass")])
def test_command_prints_the_table_and_exits_by_the_bar(tutorial, status, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "TUTORIALS", {"gradient_regression": tutorial})
    arguments = ["gradient_regression", "--quick", "--impl", "both", "--plots", str(tmp_path)]
    assert command.main(arguments) == status
    printed = capsys.readouterr().out
    assert word in printed
    assert "largest" in printed
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert names == {
        "torch/gradient_regression.png",
        "fastlstm/gradient_regression.png",
        "gradient_regression_trajectory.png",
    }


def test_missing_packages_are_named_with_what_to_install(monkeypatch, capsys):
    installed = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == "vega_datasets" else installed(name)
    )
    assert command.main(["daily_series", "--quick"]) == 2
    assert "the tutorials need vega_datasets: pip install vega_datasets" in capsys.readouterr().err


def test_unknown_tutorials_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["no_such_tutorial"])
    assert "no tutorial named no_such_tutorial" in capsys.readouterr().err


def test_regularized_layers_learn_more_of_the_language_and_less_by_heart(tmp_path):
    """Held-out loss against the plain layer's: lower at the end with both masks, lower at its best with layer norm."""
    texts = regularized.Texts()
    epochs = regularized.QUICK_EPOCHS
    curves = {option: list(regularized.train(texts, option, epochs))[-1] for option in regularized.OPTIONS}
    assert all(len(own.training) == len(own.held_out) == epochs for own in curves.values())
    missed = [str(check) for check in regularized.checks(curves) if not check.passed]
    assert not missed, missed
    assert regularized.plot(curves, tmp_path).read_bytes().startswith(b"\x89PNG")
