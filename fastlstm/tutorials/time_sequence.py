"""Time-sequence prediction: two stacked LSTMCells learn a hundred sine waves and then go on drawing them alone.

The same model is also written as one two-layer LSTM over the whole sequence (`WholeSequence`): the same numbers from
the same weights, in one call where the cells take one call per point.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial
from fastlstm.tutorials.sine import SineFit, fit_sine

PERIOD = 20  # waves are sin(x / PERIOD): 2 pi PERIOD = 126 points to a wave
HIDDEN = 51
TEST_WAVES = 3


def sine_waves(count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length] float64, each wave with an integer phase shift drawn from [-4 PERIOD, 4 PERIOD)."""
    shifts = torch.randint(-4 * PERIOD, 4 * PERIOD, (count, 1), generator=generator)
    return ((torch.arange(length) + shifts).double() / PERIOD).sin()


class StackedCells(nn.Module):
    """Points [B, L] -> the point after each of them, [B, L + future]; the last `future` are fed by the model itself."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lower = impl.LSTMCell(1, HIDDEN)
        self.upper = impl.LSTMCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, points: Tensor, future: int = 0) -> Tensor:
        lower = upper = None  # (h, c) of each cell; None starts at zero
        outputs = []
        for point in points.split(1, dim=1):
            lower = self.lower(point, lower)
            upper = self.upper(lower[0], upper)
            outputs.append(self.head(upper[0]))
        for _ in range(future):
            lower = self.lower(outputs[-1], lower)
            upper = self.upper(lower[0], upper)
            outputs.append(self.head(upper[0]))
        return torch.cat(outputs, dim=1)


class WholeSequence(nn.Module):
    """Points [B, L] -> the point after each of them, [B, L]: `StackedCells` as one LSTM of two layers."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lstm = impl.LSTM(1, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    @classmethod
    def from_cells(cls, cells: StackedCells, impl: Implementation) -> WholeSequence:
        """The model with the weights of `cells`: layer k of an LSTM stores what an LSTMCell does, suffixed `_l{k}`."""
        weight = cells.head.weight
        model = cls(impl).to(weight.device, weight.dtype)
        lower, upper = cells.lower.state_dict(), cells.upper.state_dict()
        model.lstm.load_state_dict(
            {f"{name}_l0": value for name, value in lower.items()}
            | {f"{name}_l1": value for name, value in upper.items()}
        )
        model.head.load_state_dict(cells.head.state_dict())
        return model

    def forward(self, points: Tensor) -> Tensor:
        output, _ = self.lstm(points.unsqueeze(-1))
        return self.head(output).squeeze(-1)


def shape_exercise(impl: Implementation) -> list[tuple[int, ...]]:
    """Shapes of (output, h_n, c_n) of LSTM(10, 20, 2) over an input of [T, B, I] = [5, 3, 10]."""
    output, (h_n, c_n) = impl.LSTM(10, 20, 2)(torch.randn(5, 3, 10), (torch.randn(2, 3, 20), torch.randn(2, 3, 20)))
    return [tuple(tensor.shape) for tensor in (output, h_n, c_n)]


class TimeSequence(Tutorial):
    name = "time_sequence"
    title = "Time-sequence prediction"
    train_dtype = torch.float64

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        count, length, self.outer_steps, self.future = (10, 60, 3, 100) if self.quick else (100, 1000, 15, 1000)
        waves = sine_waves(count, length, self.generator()).to(self.device, self.dtype)
        self.training = waves[TEST_WAVES:, :-1], waves[TEST_WAVES:, 1:]
        self.test = waves[:TEST_WAVES, :-1], waves[:TEST_WAVES, 1:]
        self.updates = 20 * self.outer_steps  # LBFGS evaluates the closure up to 20 times in an outer step

    def make_model(self, impl: Implementation) -> nn.Module:
        return StackedCells(impl)

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        """One loss per evaluation of the closure over the full batch, which is one update of the weights."""
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8)
        points, following = self.training
        losses: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(points), following)
            loss.backward()
            losses.append(loss.item())
            return loss

        for _ in range(self.outer_steps):
            losses.clear()
            optimizer.step(closure)
            yield from losses
            if history is not None:
                history["training"].append(losses[-1])
                self.look_ahead(model, history)

    @torch.no_grad()
    def look_ahead(self, model: nn.Module, history: History) -> None:
        """Notes the loss on the test waves and the `future` points that the model draws after them, fed by itself."""
        points, following = self.test
        prediction = model(points, self.future)
        known = following.shape[1]
        history["test"].append(F.mse_loss(prediction[:, :known], following).item())
        history["prediction"].append(prediction.cpu())

    def free_run(self, history: History, step: int = -1) -> list[SineFit]:
        """Sine fits of the self-fed points of every test wave after outer step `step`."""
        return [fit_sine(wave[-self.future :], 1 / PERIOD) for wave in history["prediction"][step]]

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        if self.quick:  # a few outer steps on short waves teach the next point, not yet the whole wave
            return [Check("test MSE", history["test"][-1], 5e-3)]
        fits = self.free_run(history)
        return [
            Check("test MSE", history["test"][-1], 2e-4),
            Check("R2 of a sine through the self-fed points", min(fit.r_squared for fit in fits), 0.9, below=False),
            Check("amplitude of that sine", min(fit.amplitude for fit in fits), 0.5, below=False),
        ]

    def notes(self, model: nn.Module, impl: Implementation) -> list[str]:
        assert isinstance(model, StackedCells)
        sequence = WholeSequence.from_cells(model, impl)
        points, following = self.training
        outputs, seconds = [], []
        for form in (model, sequence):
            start = time.perf_counter()
            outputs.append(form(points))
            F.mse_loss(outputs[-1], following).backward()
            seconds.append(time.perf_counter() - start)
        difference = (outputs[0] - outputs[1]).abs().max().item()
        return [
            f"one LSTM of two layers, weights copied: largest difference from the cells {difference:.1e}, "
            f"{seconds[0]:.2f} s forward and backward for the cells, {seconds[1]:.2f} s for the whole sequence",
            "LSTM(10, 20, 2) on (5, 3, 10) gives " + ", ".join(map(str, shape_exercise(impl))),
        ]

    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        predictions = history["prediction"]
        known = self.test[0].shape[1]
        colours = (plots.BLUE, plots.ORANGE, plots.GREEN)

        figure, axes = plots.new_figure(TEST_WAVES, 1, size=(11, 6), sharex=True)
        axes[0].set_title(f"Test waves (solid) and the next {self.future} points, each fed back (dashed)")
        for axis, wave, prediction, colour in zip(axes, self.test[1].cpu(), predictions[-1], colours, strict=True):
            self.draw(axis, wave, prediction, colour)
            axis.set_ylabel("value")
        axes[-1].set_xlabel("point")
        final = plots.save(figure, folder / f"{self.name}.png")

        rows = -(-len(predictions) // 3)
        figure, axes = plots.new_figure(rows, 3, size=(12, 1.7 * rows + 0.5), sharex=True, sharey=True)
        for step, (axis, prediction) in enumerate(zip(axes, predictions, strict=False), 1):
            self.draw(axis, self.test[1][0].cpu(), prediction[0], plots.BLUE)
            axis.axvline(known, color=plots.GREY, linewidth=0.8)
            axis.set_title(f"outer step {step}: test MSE {history['test'][step - 1]:.1e}", fontsize=9)
        for axis in axes[len(predictions) :]:
            axis.set_visible(False)
        return [final, plots.save(figure, folder / f"{self.name}_steps.png")]

    @staticmethod
    def draw(axis, wave: Tensor, prediction: Tensor, colour: str) -> None:
        known = len(wave)
        axis.plot(range(known), wave.tolist(), color=colour, linewidth=1.2)
        axis.plot(range(known, len(prediction)), prediction[known:].tolist(), "--", color=colour, linewidth=1.2)
        axis.set_ylim(-1.6, 1.6)
