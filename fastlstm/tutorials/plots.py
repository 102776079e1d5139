"""Figures: one look for all tutorials, and the plot of the two training trajectories that each of them gets.

matplotlib is imported on first use, so that the tutorials import without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlstm.tutorials.common import TRAJECTORY_BAR, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: colour-blind readers can distinguish it, and so can grey print.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6E6E6E"

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def style() -> AbstractContextManager[None]:
    """The tutorials' look, for the figures drawn inside this context."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5), **subplots
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its axes, row by row. Drawn off screen: no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, list(axes.flat)


def count_epochs(axes: Axes) -> None:
    """Labels the x axis for epochs: whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Figure, path: Path) -> Path:
    """Writes `figure` as a PNG and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def plot_trajectory(trajectory: Trajectory, title: str, path: Path) -> Path:
    """Both implementations' losses on top of each other, and their relative difference below."""
    figure, (losses, gap) = new_figure(2, 1, size=(8, 5.5), sharex=True, height_ratios=[2, 1])
    updates = range(1, len(trajectory.torch) + 1)
    losses.plot(updates, trajectory.torch, color=GREY, linewidth=5, alpha=0.45, label="nn.LSTM")
    losses.plot(updates, trajectory.fastlstm, color=BLUE, label="fastlstm")
    losses.set(yscale="log", ylabel="loss", title=f"{title}: the first {len(updates)} updates in float64")
    losses.legend()
    # A difference of exactly zero has no place on a log axis: draw it at the bottom, below one ulp.
    gap.plot(
        updates, [max(difference, 1e-17) for difference in trajectory.differences], ".-", color=ORANGE, linewidth=1
    )
    gap.axhline(TRAJECTORY_BAR, color=GREY, linestyle="--", linewidth=1)
    gap.text(1, TRAJECTORY_BAR, "bar", color=GREY, va="bottom")
    gap.set(yscale="log", ylim=(5e-18, 1e-4), xlabel="update", ylabel="relative difference")
    return save(figure, path)
