"""Gradient regression: read the slope of a line off a sequence of windows of its points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial

POINTS = 100  # x = 0, 0.01, ..., 0.99
WINDOW = 10  # points in one step of the sequence
STRIDE = WINDOW // 2
BATCH = 8


def slope_windows(slopes: Tensor) -> Tensor:
    """slopes [n] -> the lines y = slope * x, cut into overlapping windows: [n, 19, WINDOW]."""
    x = torch.arange(POINTS, dtype=slopes.dtype) / POINTS
    return (slopes[:, None] * x).unfold(1, WINDOW, STRIDE)


class SlopeModel(nn.Module):
    """Windows [B, T, WINDOW] -> slope [B]."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lstm = impl.LSTM(WINDOW, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, windows: Tensor) -> Tensor:
        output, _ = self.lstm(windows)  # no state given: it starts at zero for every batch
        return self.head(output[:, -1]).squeeze(-1)


class GradientRegression(Tutorial):
    name = "gradient_regression"
    title = "Gradient regression"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.epochs = 40 if self.quick else 100
        slopes = 2 * torch.rand(40, generator=self.generator()) - 1  # U(-1, 1)
        windows = slope_windows(slopes).to(self.device, self.dtype)
        slopes = slopes.to(self.device, self.dtype)
        self.training, self.validation = (windows[:30], slopes[:30]), (windows[30:], slopes[30:])
        self.updates = self.epochs * -(-30 // BATCH)

    def make_model(self, impl: Implementation) -> nn.Module:
        return SlopeModel(impl)

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
        generator = self.generator()
        windows, slopes = self.training
        for _ in range(self.epochs):
            for rows in torch.randperm(len(slopes), generator=generator).split(BATCH):
                rows = rows.to(self.device)
                loss = F.mse_loss(model(windows[rows]), slopes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()
            if history is not None:
                history["training"].append(self.mse(model, *self.training))
                history["validation"].append(self.mse(model, *self.validation))

    @staticmethod
    @torch.no_grad()
    def mse(model: nn.Module, windows: Tensor, slopes: Tensor) -> float:
        return F.mse_loss(model(windows), slopes).item()

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        return [Check("validation MSE", history["validation"][-1], 0.05 if self.quick else 0.01)]

    @torch.no_grad()
    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        figure, (losses, slopes) = plots.new_figure(1, 2, size=(10, 4.5))
        epochs = range(1, len(history["training"]) + 1)
        losses.plot(epochs, history["training"], color=plots.BLUE, label="training")
        losses.plot(epochs, history["validation"], color=plots.ORANGE, label="validation")
        plots.count_epochs(losses)
        losses.set(yscale="log", ylabel="MSE", title="Loss")
        losses.legend()
        slopes.axline((0, 0), slope=1, color=plots.GREY, linestyle="--", linewidth=1, label="exact")
        for name, (windows, truth), colour in [
            ("training", self.training, plots.BLUE),
            ("validation", self.validation, plots.ORANGE),
        ]:
            slopes.scatter(truth.tolist(), model(windows).tolist(), color=colour, s=24, label=name, zorder=3)
        slopes.set(xlabel="slope", ylabel="prediction", title="Slope against prediction", aspect="equal")
        slopes.legend()
        return [plots.save(figure, folder / f"{self.name}.png")]
