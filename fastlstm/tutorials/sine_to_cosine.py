"""Sine to cosine: a recurrent state turns sin(t) into cos(t), which no function of sin(t) alone can do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial

POINTS = 200
BATCH = 5


def time_major(points: Tensor) -> Tensor:
    """points [n] -> [n / BATCH, BATCH, 1]: step t holds points BATCH t to BATCH t + 4, one for each batch row."""
    return points.reshape(-1, BATCH, 1)


class SineToCosineModel(nn.Module):
    """sin [T, B, 1] -> cos [T, B, 1]."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lstm = impl.LSTM(1, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, sine: Tensor) -> Tensor:
        output, _ = self.lstm(sine)
        return self.head(output)


class SineToCosine(Tutorial):
    name = "sine_to_cosine"
    title = "Sine to cosine"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bar = 5e-3 if self.quick else 1e-4
        self.updates = 1_000 if self.quick else 10_000
        self.t = torch.linspace(0, 12 * math.pi, POINTS, dtype=torch.float64)
        sine, cosine = (f(self.t).to(self.device, self.dtype) for f in (torch.sin, torch.cos))
        half = POINTS // 2
        self.training = time_major(sine[:half]), time_major(cosine[:half])
        self.test = time_major(sine[half:]), time_major(cosine[half:])

    def make_model(self, impl: Implementation) -> nn.Module:
        return SineToCosineModel(impl)

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        """One update per epoch, over the whole training half; stops at the first loss below the bar."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        sine, cosine = self.training
        for _ in range(self.updates):
            loss = F.mse_loss(model(sine), cosine)
            value = loss.item()
            if history is not None:
                history["training"].append(value)
            if value < self.bar:
                yield value
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield value

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        return [Check("training MSE", history["training"][-1], self.bar)]

    @torch.no_grad()
    def notes(self, model: nn.Module, impl: Implementation) -> list[str]:
        sine, cosine = self.test
        return [f"MSE on the second half, never trained on: {F.mse_loss(model(sine), cosine).item():.3g}"]

    @torch.no_grad()
    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        t = self.t.tolist()
        figure, (axes,) = plots.new_figure(size=(9, 3.8))
        axes.plot(t, self.t.sin().tolist(), color=plots.BLUE, label="input: sin t")
        axes.plot(t, self.t.cos().tolist(), color=plots.ORANGE, label="target: cos t")
        axes.set(xlabel="t", title="The data")
        axes.legend(loc="upper right", ncols=2)
        axes.set_ylim(-1.2, 1.5)
        data = plots.save(figure, folder / f"{self.name}_data.png")

        figure, (series, losses) = plots.new_figure(2, 1, size=(9, 6.5), height_ratios=[3, 2])
        half = POINTS // 2
        series.plot(t, self.t.cos().tolist(), color=plots.GREY, linewidth=5, alpha=0.4, label="cos t")
        for part, (sine, _), colour, label in [
            (slice(0, half), self.training, plots.BLUE, "prediction, trained half"),
            (slice(half, POINTS), self.test, plots.ORANGE, "prediction, unseen half"),
        ]:
            series.plot(
                t[part], model(sine).flatten().tolist(), ".-", markersize=5, linewidth=1, color=colour, label=label
            )
        series.axvline((t[half - 1] + t[half]) / 2, ymax=0.87, color="black", linestyle="--", linewidth=1)
        series.set(xlabel="t", title="Predictions on both halves", ylim=(-1.2, 1.6))
        series.legend(loc="upper right", ncols=3)
        losses.plot(history["training"], color=plots.BLUE, linewidth=1)
        losses.axhline(self.bar, color=plots.GREY, linestyle="--", linewidth=1)
        losses.set(yscale="log", xlabel="epoch", ylabel="training MSE", title=f"Loss until it falls below {self.bar:g}")
        return [data, plots.save(figure, folder / f"{self.name}.png")]
