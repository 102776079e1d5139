"""The gates from scratch, then a forecast: an LSTM cell made of four Linear layers, and a sine that continues itself.

`ScratchCell` is the cell as the textbooks draw it; `to_cell` and `from_cell` convert between its weights and those of
an LSTMCell. The forecast trains one window of ten points at a time, where the cost of a call is everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlstm.tutorials import plots
from fastlstm.tutorials.common import Check, History, Implementation, Tutorial
from fastlstm.tutorials.sine import fit_sine

POINTS = 1000
SPAN = 100.0  # the series is sin on [0, SPAN]
WINDOW = 10
AHEAD = 100


class ScratchCell(nn.Module):
    """One LSTM step. Each gate is one Linear over [x, h] side by side, so it has one bias where LSTMCell has two."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.input_gate = nn.Linear(input_size + hidden_size, hidden_size)
        self.forget_gate = nn.Linear(input_size + hidden_size, hidden_size)
        self.cell_gate = nn.Linear(input_size + hidden_size, hidden_size)
        self.output_gate = nn.Linear(input_size + hidden_size, hidden_size)

    def gates(self) -> tuple[nn.Linear, ...]:
        """In the order i, f, g, o in which LSTMCell stacks its rows."""
        return self.input_gate, self.forget_gate, self.cell_gate, self.output_gate

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x [B, I], state (h [B, H], c [B, H]) or None for zeros -> the next (h, c)."""
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            state = zeros, zeros
        h, c = state
        xh = torch.cat([x, h], dim=1)
        i = self.input_gate(xh).sigmoid()
        f = self.forget_gate(xh).sigmoid()
        g = self.cell_gate(xh).tanh()
        o = self.output_gate(xh).sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c


@torch.no_grad()
def to_cell(scratch: ScratchCell, impl: Implementation) -> nn.RNNCellBase:
    """An LSTMCell that computes what `scratch` does.

    weight_ih [4H, I] and weight_hh [4H, H] are the left I and the right H columns of the gates' weights [H, I + H],
    stacked in the order i, f, g, o. The gates' biases go to bias_ih, and bias_hh becomes zero: only their sum counts.
    """
    weight = torch.cat([gate.weight for gate in scratch.gates()])  # [4H, I + H]
    bias = torch.cat([gate.bias for gate in scratch.gates()])  # [4H]
    cell = impl.LSTMCell(scratch.input_size, scratch.hidden_size).to(weight.device, weight.dtype)
    cell.weight_ih.copy_(weight[:, : scratch.input_size])
    cell.weight_hh.copy_(weight[:, scratch.input_size :])
    cell.get_parameter("bias_ih").copy_(bias)
    cell.get_parameter("bias_hh").zero_()
    return cell


@torch.no_grad()
def from_cell(cell: nn.RNNCellBase) -> ScratchCell:
    """A ScratchCell that computes what `cell`, an LSTMCell, does: `to_cell` read backwards, the two biases added."""
    scratch = ScratchCell(cell.input_size, cell.hidden_size).to(cell.weight_ih.device, cell.weight_ih.dtype)
    weights = torch.cat([cell.weight_ih, cell.weight_hh], dim=1).chunk(4)
    biases = (cell.get_parameter("bias_ih") + cell.get_parameter("bias_hh")).chunk(4)
    for gate, weight, bias in zip(scratch.gates(), weights, biases, strict=True):
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    return scratch


def scratch_difference(impl: Implementation, steps: int = 50) -> float:
    """Largest difference of h, c over `steps` steps and of the gradient of x between ScratchCell and `impl`'s LSTMCell.

    Measured in float64 and in both directions: scratch -> cell and cell -> scratch.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, 4, 3, generator=generator, dtype=torch.float64)  # [T, B, I]
    cell = impl.LSTMCell(3, 8, dtype=torch.float64)
    scratch = ScratchCell(3, 8).double()
    worst = 0.0
    for pair in ((scratch, to_cell(scratch, impl)), (from_cell(cell), cell)):
        results = []
        for module in pair:
            points, state, states = x.clone().requires_grad_(), None, []
            for point in points:
                state = module(point, state)
                states += state
            (gradient,) = torch.autograd.grad(sum(s.square().sum() for s in states), points)
            results.append([*states, gradient])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results, strict=True)))
    return worst


class ForecastModel(nn.Module):
    """A window of points [T, B, 1] -> the next point [B, 1]."""

    def __init__(self, impl: Implementation) -> None:
        super().__init__()
        self.lstm = impl.LSTM(1, 100)
        self.head = nn.Linear(100, 1)

    def forward(self, window: Tensor) -> Tensor:
        output, _ = self.lstm(window)
        return self.head(output[-1])


class GatesFromScratch(Tutorial):
    name = "gates_from_scratch"
    title = "Gates from scratch, sine forecast"
    timing_block = 200

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.epochs = 2 if self.quick else 150
        self.points = torch.linspace(0, SPAN, POINTS, dtype=torch.float64).sin().to(self.device, self.dtype)
        self.windows = self.points.unfold(0, WINDOW, 1)[:-1]  # [990, WINDOW]
        self.following = self.points[WINDOW:]  # [990]
        self.updates = self.epochs * len(self.following)

    def make_model(self, impl: Implementation) -> nn.Module:
        return ForecastModel(impl)

    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        """One window per update, T = WINDOW and B = 1, in a new order every epoch; the rate fades in the last fifth."""
        # Fused: one call for all six parameters. Adam parameter by parameter takes longer than the LSTM does.
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        generator = self.generator()
        left = self.updates
        windows = self.windows[:, :, None, None].unbind()  # each [T, 1, 1]
        following = self.following[:, None, None].unbind()  # each [1, 1]
        for _ in range(self.epochs):
            for row in torch.randperm(len(windows), generator=generator).tolist():
                # At a constant rate single windows keep the weights jittering: the loss stays low, but the forecast's
                # fit to a sine jumps between R2 = 0.5 and 1 from one epoch to the next.
                optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, left / (0.2 * self.updates))
                left -= 1
                loss = F.mse_loss(model(windows[row]), following[row])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()
            if history is not None:
                history["mse"].append(self.mse(model))

    @torch.no_grad()
    def mse(self, model: nn.Module) -> float:
        """Over all windows of the series."""
        prediction = model(self.windows.t().unsqueeze(-1)).squeeze(-1)
        return F.mse_loss(prediction, self.following).item()

    @torch.no_grad()
    def forecast(self, model: nn.Module, ahead: int = AHEAD) -> Tensor:
        """The next `ahead` points after the series, each fed back: [ahead]."""
        window = self.points[-WINDOW:].view(WINDOW, 1, 1)
        for _ in range(ahead):
            window = torch.cat([window, model(window[-WINDOW:]).unsqueeze(0)])
        return window[WINDOW:].flatten()

    def checks(self, model: nn.Module, history: History) -> list[Check]:
        fit = fit_sine(self.forecast(model), SPAN / (POINTS - 1))
        return [
            Check("MSE", history["mse"][-1], 1e-3),
            Check("R2 of a sine through the forecast", fit.r_squared, 0.9, below=False),
            Check("amplitude of that sine", fit.amplitude, 0.5, below=False),
        ]

    def notes(self, model: nn.Module, impl: Implementation) -> list[str]:
        return [
            f"gates from scratch and {impl.name}'s LSTMCell, weights copied: "
            f"largest difference {scratch_difference(impl):.1e}"
        ]

    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        figure, (series, losses) = plots.new_figure(2, 1, size=(10, 6), height_ratios=[3, 2])
        shown = 200
        step = SPAN / (POINTS - 1)
        times = [step * n for n in range(POINTS - shown, POINTS + AHEAD)]
        truth = [torch.tensor(t).sin().item() for t in times[shown:]]
        series.plot(times[:shown], self.points[-shown:].tolist(), color=plots.BLUE, label="series")
        series.plot(times[shown:], truth, color=plots.GREY, linewidth=5, alpha=0.4, label="sin t")
        series.plot(
            times[shown:],
            self.forecast(model).tolist(),
            "--",
            color=plots.ORANGE,
            label="forecast, each value fed back",
        )
        series.axvline(SPAN, color="black", linestyle="--", linewidth=1)
        series.set(xlabel="t", ylim=(-1.3, 1.6), title=f"{AHEAD} values ahead")
        series.legend(loc="upper left", ncols=3)
        losses.plot(range(1, len(history["mse"]) + 1), history["mse"], ".-", color=plots.BLUE, linewidth=1)
        losses.axhline(self.checks(model, history)[0].bar, color=plots.GREY, linestyle="--", linewidth=1)
        plots.count_epochs(losses)
        losses.set(yscale="log", ylabel="MSE", title="Loss over all windows")
        return [plots.save(figure, folder / f"{self.name}.png")]
