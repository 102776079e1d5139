"""The plot of a CSV: `draw`.

Ratios nn.LSTM / fastlstm on a log scale with the line of equal speed; of the suite products_error, errors over sizes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.inference.report import speedups
from benchmarks.products_error import PRODUCTS, SWEEPS, TENSORS, median_error, sizes
from benchmarks.results import BASELINES, ErrorRow, Row

COLOURS = {"train": "#1f5fa8", "forward": "#e08214"}
LABELS = {"train": "training step", "forward": "forward, no_grad"}
SERIES_COLOURS = ("#1f5fa8", "#4d9221", "#e08214")  # of series that are not modes
PRODUCT_COLOURS = ("#1f5fa8", "#4d9221", "#e08214")  # of PRODUCTS
# Up to this many cases are named; more are a scatter plot over their flops.
NAMED_CASES = 45
BANDS = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, 1 << 30))  # of H, one colour each
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 12, 20, 40, 80, 160)


def draw(rows: list[Row], path: Path) -> Path | None:
    """Write the PNG; return None if no row has what it shows: a time and a ratio, or an error."""
    if rows and rows[0].suite == "products_error":
        return _errors([row for row in rows if isinstance(row, ErrorRow)], path)
    if rows and rows[0].suite == "inference":
        series, what = speedups(rows), "time of the fastest other runtime / time of fastlstm"
        if not series:
            return None
        cases = list(dict.fromkeys(row.case for row in rows if row.mode == "forward"))
        figure = _named(series, cases, "speedup (right of 1: faster than the fastest other runtime)")
        return _save(figure, rows[0], what, path)
    timed = [row for row in rows if row.ratio and row.impl not in BASELINES and row.mode in COLOURS]
    if not timed:
        return None
    # One implementation per plot: fastlstm if it was measured.
    impl = "fastlstm" if any(row.impl == "fastlstm" for row in timed) else timed[0].impl
    timed = [row for row in timed if row.impl == impl]
    cases = list(dict.fromkeys(row.case for row in timed))
    if len(cases) <= NAMED_CASES:
        series = {mode: {row.case: row.ratio for row in timed if row.mode == mode} for mode in COLOURS}
        figure = _named({mode: ratios for mode, ratios in series.items() if ratios}, cases)
    else:
        figure = _scattered(timed)
    return _save(figure, rows[0], f"time of nn.LSTM / time of {impl}", path)


def _save(figure: plt.Figure, one: Row, what: str, path: Path) -> Path:
    return _write(figure, f"Speedup, {what}: {one.device}, {one.threads} threads, torch {one.torch}", path)


def _write(figure: plt.Figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def _errors(rows: list[ErrorRow], path: Path) -> Path | None:
    """RMS errors over H and over T: a colour per precision, a line per result, crosses for predictions."""
    rows = [row for row in rows if row.rms_error is not None]
    if not rows:
        return None
    sweeps = [sweep for sweep in SWEEPS if any(row.kind == sweep for row in rows)]
    figure, panels = plt.subplots(1, len(sweeps), figsize=(11, 4.8), sharey=True, squeeze=False, layout="constrained")
    for axes, sweep in zip(panels[0], sweeps, strict=True):
        of_sweep = [row for row in rows if row.kind == sweep]
        for colour, products in zip(PRODUCT_COLOURS, PRODUCTS, strict=True):
            for (line, marker, cross), tensor in zip((("-", "o", "x"), ("--", "s", "+")), TENSORS, strict=True):
                at = sizes([row for row in of_sweep if row.products == products], sweep)
                if not at:  # these products are not available
                    continue
                key = {"products": products, "tensor": tensor}
                measured, predicted = (
                    [median_error(of_sweep, column, **key, **{sweep[-1]: size}) for size in at]
                    for column in ("rms_error", "rms_predicted")
                )
                style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": line, "linewidth": 1.5}
                filled = colour if tensor == "output" else "white"
                axes.plot(at, measured, label=f"{PRODUCTS[products]}, {TENSORS[tensor]}", mfc=filled, **style)
                axes.plot(at, predicted, cross, color=colour, markersize=6, zorder=3)
        _size_axis(axes, of_sweep, sweep)
    first = panels[0][0]
    first.set_yscale("log")
    first.set_ylabel("RMS error / RMS of the float64 result")
    for cross, text in (("x", "output"), ("+", "gradient")):
        first.plot([], [], cross, color="0.3", label=f"prediction of the accuracy rule, {text}")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    one = rows[0]
    return _write(figure, f"Error of a float32 layer by its products: {one.device}, torch {one.torch}", path)


def _size_axis(axes: Axes, rows: list[ErrorRow], sweep: str) -> None:
    """A log axis of H or T with a tick per size; the title has the other sizes."""
    name, one = sweep[-1], rows[0]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes(rows, sweep)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.set_xlabel("H (units)" if name == "H" else "T (steps)")
    fixed = f"T = {one.T}, B = {one.B}, I = H" if name == "H" else f"H = I = {one.H}, B = {one.B}"
    axes.set_title(f"{sweep}: {fixed}", fontsize=10)
    axes.grid(color="0.88")
    axes.set_axisbelow(True)


def _named(series: dict[str, dict[str, float]], cases: list[str], label: str = "") -> plt.Figure:
    """A line per case with a dot per series, which are ratios by case; `label` replaces that of the axis."""
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.36 * len(cases)), layout="constrained")
    height = {case: len(cases) - 1 - k for k, case in enumerate(cases)}
    for k, (name, ratios) in enumerate(series.items()):
        colour = COLOURS.get(name) or SERIES_COLOURS[k]
        offset = 0.14 * (len(series) - 1 - 2 * k) if len(series) > 1 else 0.14 if name == "train" else -0.14
        at = [height[case] + offset for case in ratios]
        values = list(ratios.values())
        axes.hlines(at, 1, values, color=colour, alpha=0.35, linewidth=2)
        axes.plot(values, at, "o", color=colour, markersize=6, label=LABELS.get(name, name))
    axes.set_yticks(list(height.values()), list(height), fontsize=9)
    axes.set_ylim(-0.7, len(cases) - 0.3)
    ratio_axis(axes, [ratio for ratios in series.values() for ratio in ratios.values()], vertical=False)
    if label:
        axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _scattered(rows: list[Row]) -> plt.Figure:
    """Ratio over the case's flops, coloured by bands of the hidden size; one panel per mode."""
    modes = [mode for mode in COLOURS if any(row.mode == mode for row in rows)]
    figure, panels = plt.subplots(
        1, len(modes), figsize=(5.5 * len(modes), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    shades = plt.get_cmap("viridis", len(BANDS))
    for axes, mode in zip(panels[0], modes, strict=True):
        for k, (low, high) in enumerate(BANDS):
            in_band = [row for row in rows if row.mode == mode and low <= row.H <= high]
            axes.plot(
                [row.flops for row in in_band],
                [row.ratio for row in in_band],
                "o",
                markersize=5,
                alpha=0.8,
                color=shades(k),
                label=f"H = {low} to {high}" if high < 1 << 30 else f"H ≥ {low}",
            )
        axes.set_xscale("log")
        axes.set_xlabel("flops of the case")
        axes.set_title(LABELS[mode], fontsize=10)
        ratio_axis(axes, [row.ratio for row in rows], vertical=True)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    return figure


def ratio_axis(axes: Axes, values: list[float], vertical: bool) -> None:
    """Set a log scale with plain labels over the span of `values`, and draw the line at 1."""
    low, high = min([0.8, *(0.8 * value for value in values)]), max([2.0, *(1.3 * value for value in values)])
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    (axes.set_ylim if vertical else axes.set_xlim)(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}x"))
    (axes.axhline if vertical else axes.axvline)(1, color="0.2", linewidth=1)
    axes.grid(axis="y" if vertical else "x", color="0.88")
    axes.set_axisbelow(True)
    (axes.set_ylabel if vertical else axes.set_xlabel)(
        "speedup (right of 1: faster than nn.LSTM)" if not vertical else "speedup (above 1: faster than nn.LSTM)"
    )
