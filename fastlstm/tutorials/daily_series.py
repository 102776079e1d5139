"""Regression on a real daily series: seven days of Seattle's maximum temperature predict the eighth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial

DAYS = 7
HELD_OUT = 365  # the last year of the four
BATCH = 16


def daily_maximum() -> Tensor:
    """Seattle's daily maximum temperature in degrees Celsius, 2012 to 2015: [1461] float64.

    The file comes inside vega_datasets; nothing is downloaded.
    """
    from vega_datasets import local_data

    return torch.tensor(local_data.seattle_weather()["temp_max"].tolist(), dtype=torch.float64)


class NextDayModel(nn.Module):
    """Standardised days [B, DAYS, 1] -> the next day [B]."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lstm = impl.LSTM(1, 100, num_layers=2, batch_first=True)
        self.head = nn.Linear(100, 1)

    def forward(self, days: Tensor) -> Tensor:
        output, _ = self.lstm(days)
        return self.head(output[:, -1]).squeeze(-1)


class DailySeries(Tutorial):
    name = "daily_series"
    title = "Daily temperatures"
    needs = ("vega_datasets",)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.epochs = 5 if self.quick else 20
        self.celsius = daily_maximum()
        known = self.celsius[:-HELD_OUT]
        self.mean, self.scale = known.mean().item(), known.std().item()  # of the training years alone
        days = ((self.celsius - self.mean) / self.scale).to(self.device, self.dtype)
        windows, following = days.unfold(0, DAYS, 1)[:-1].unsqueeze(-1), days[DAYS:]
        self.training = windows[:-HELD_OUT], following[:-HELD_OUT]
        self.held_out = windows[-HELD_OUT:], following[-HELD_OUT:]
        self.updates = self.epochs * -(-len(self.training[1]) // BATCH)

    def make_model(self, impl: Implementation) -> nn.Module:
        return NextDayModel(impl)

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        # Without the decay the last epochs jump about by more than the margin over persistence.
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        generator = self.generator()
        windows, following = self.training
        for _ in range(self.epochs):
            for rows in torch.randperm(len(following), generator=generator).split(BATCH):
                rows = rows.to(self.device)
                loss = F.mse_loss(model(windows[rows]), following[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                yield loss.item()
            if history is not None:
                history["training"].append(self.mse(model, *self.training))
                history["held out"].append(self.mse(model, *self.held_out))

    @torch.no_grad()
    def mse(self, model: nn.Module, windows: Tensor, following: Tensor) -> float:
        """In squared degrees Celsius."""
        return F.mse_loss(model(windows), following).item() * self.scale**2

    def persistence(self) -> float:
        """MSE on the held-out days of the forecast that tomorrow is like today, in squared degrees Celsius."""
        windows, following = self.held_out
        return F.mse_loss(windows[:, -1, 0], following).item() * self.scale**2

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        slack = 1.1 if self.quick else 1.0
        return [Check("MSE in °C² against persistence", history["held out"][-1], slack * self.persistence())]

    @torch.no_grad()
    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        figure, (series, losses) = plots.new_figure(2, 1, size=(11, 6.5), height_ratios=[3, 2])
        forecast = model(self.held_out[0]).cpu().double() * self.scale + self.mean
        days = range(1, HELD_OUT + 1)
        series.plot(days, self.celsius[-HELD_OUT:].tolist(), color=plots.GREY, linewidth=1.2, label="measured")
        series.plot(
            days, forecast.tolist(), color=plots.ORANGE, linewidth=1.2, label="forecast from the seven days before"
        )
        series.set(xlabel="day of 2015", ylabel="maximum, °C", title="Seattle's held-out year")
        series.legend(loc="upper left")
        epochs = range(1, len(history["held out"]) + 1)
        losses.plot(epochs, history["training"], color=plots.BLUE, label="training years")
        losses.plot(epochs, history["held out"], color=plots.ORANGE, label="held-out year")
        losses.axhline(self.persistence(), color=plots.GREY, linestyle="--", linewidth=1, label="tomorrow = today")
        plots.count_epochs(losses)
        losses.set(ylabel="MSE, °C²", title="Loss")
        losses.legend()
        return [plots.save(figure, folder / f"{self.name}.png")]
