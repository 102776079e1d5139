"""python -m benchmarks.report [CSV ...] [--readme FILE] [--no-plots]

Prints the Markdown tables of the CSVs (by default all under benchmarks/results) and draws a PNG next to each. With
--readme it writes each table between FILE's markers <!-- benchmarks:NAME --> and <!-- /benchmarks:NAME -->. NAME is the
CSV's path below benchmarks/results without ".csv" (elsewhere its file name), or a suite for all its CSVs. The
marker `headline` gets the table and figure of benchmarks/headline.py. README.md, docs/benchmarks.md, docs/deploying.md
and docs/numerics.md have markers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import headline, products_error, results
from benchmarks.inference import report as inference
from benchmarks.results import BASELINES, AccuracyRow, ErrorRow, ModelRow, Row
from benchmarks.tables import geometric_mean, is_busy, ms, number, table

HEADINGS = {
    "train": "Training step (forward and backward)",
    "forward": "Forward, no_grad",
    "memory": "Peak memory of a training step",
    "compile": "First compiled training step",
}
WORST = 10


def markdown(rows: list[Row]) -> str:
    """The tables of one CSV, with the line that says where it was measured."""
    body = {
        "grid": _summary,
        "random": _summary,
        "bf16_products": _bf16_products,
        "scaling": _scaling,
        "calls": _calls,
        "models": _models,
        "inference": inference.tables,
        "frozen_accuracy": _frozen_accuracy,
        "products_error": products_error.tables,
        "variants": _variants,
        "gpu_variants": _variants,
    }.get(rows[0].suite, _tables)
    return "\n\n".join([_provenance(rows), *body(rows)])


def _provenance(rows: list[Row]) -> str:
    one = rows[0]
    words = [one.device, f"{one.threads} threads" + (f" ({one.cpu_capability})" if one.cpu_capability else "")]
    words += [f"torch {one.torch}"] + ([f"cuDNN {one.cudnn}"] if one.cudnn else [])
    words += [f"driver {one.driver}"] if one.driver else []
    words += [f"commit {one.commit}", one.date[:10]]
    text = f"{', '.join(words)}."
    if isinstance(one, (AccuracyRow, ErrorRow)):
        return text
    text += " Medians of interleaved runs in one process."
    if any(is_busy(row) for row in rows):
        text += " Rows marked busy were measured while other processes used more than a tenth of the CPUs."
    return text


def _pairs(rows: list[Row], mode: str) -> list[tuple[Row, Row]]:
    """(nn.LSTM's row, another's row) for every case of a mode, in file order."""
    nn_rows = {row.case: row for row in rows if row.mode == mode and row.impl == "nn"}
    other_rows = [row for row in rows if row.mode == mode and row.impl not in BASELINES]
    return [(nn_rows[row.case], row) for row in other_rows if row.case in nn_rows]


def _tables(rows: list[Row]) -> list[str]:
    """One table per mode: case, nn.LSTM, each implementation, speedup, percentage of the peak.

    If nn.LSTM was also measured in a CUDA graph, that is a column, and speedups are relative to the faster of both.
    """
    several = len({row.impl for row in rows} - set(BASELINES)) > 1
    graphs = {(row.case, row.mode): row for row in rows if row.impl == "nn_graph"}
    parts = []
    for mode in dict.fromkeys(row.mode for row in rows):
        pairs = _pairs(rows, mode)
        if not pairs:  # a feature without nn.LSTM
            continue
        headings = [
            "case",
            "nn.LSTM ms",
            *(["in a graph ms"] if graphs else []),
            "ms" if several else "fastlstm ms",
            "speedup",
            "% of peak",
        ]
        lines = []
        for nn, row in pairs:
            name = f"{row.case} ({row.impl})" if several else row.case
            graph = graphs.get((row.case, mode))
            in_graph = [ms(graph) if graph else ""] if graphs else []
            lines.append([name, ms(nn), *in_graph, ms(row), _ratio(row), _percent(row.fraction)])
        parts += [f"**{HEADINGS[mode]}**", table(headings, lines)]
        ratios = [row.ratio for _, row in pairs if row.impl == "fastlstm" and row.ratio]
        if ratios:
            parts.append(f"Geometric mean {geometric_mean(ratios):.2f}x; min {min(ratios):.2f}x.")
    if graphs:
        parts.append("Speedups are relative to the faster of nn.LSTM as called and nn.LSTM in a CUDA graph.")
    peaks = dict.fromkeys(row.limit for row in rows if row.limit)
    if peaks:
        parts.append(
            f"Peak: the rate measured on the machine next to each case: {', '.join(peaks)}"
            + (", or a copy through memory." if any(row.limit_gbytes for row in rows) else ".")
        )
    return parts


def _summary(rows: list[Row]) -> list[str]:
    """Summarize a suite of many cases, and list the lowest speedups."""
    lines = []
    pairs = {mode: [row for _, row in _pairs(rows, mode) if row.impl == "fastlstm"] for mode in ("train", "forward")}
    for mode, measured in pairs.items():
        ratios = [row.ratio for row in measured if row.ratio]
        if not ratios:
            continue
        large = [row.fraction for row in measured if row.fraction and row.H >= 256 and row.B >= 32]
        below = sum(ratio < 1 for ratio in ratios)
        wrong = sum(row.status.startswith(("WRONG", "failed")) for row in measured)
        shown = [str(len(measured)), f"{geometric_mean(ratios):.2f}x", f"{min(ratios):.2f}x", str(below), str(wrong)]
        lines.append([HEADINGS[mode], *shown, _percent(min(large, default=None))])
    headings = [
        rows[0].suite,
        "cases",
        "geometric mean",
        "min",
        "below 1.0",
        "wrong",
        "min % of peak, H ≥ 256 and B ≥ 32",
    ]
    worst = sorted((row for measured in pairs.values() for row in measured if row.ratio), key=lambda row: row.ratio)[
        :WORST
    ]
    nn_rows = {(row.case, row.mode): row for row in rows if row.impl == "nn"}
    shown = [
        [
            f"{row.case}, {row.mode}",
            ms(nn_rows[row.case, row.mode]),
            ms(row),
            _ratio(row),
            _percent(row.fraction),
        ]
        for row in worst
    ]
    return [
        table(headings, lines),
        f"The {len(shown)} lowest speedups:",
        table(["case", "nn.LSTM ms", "fastlstm ms", "speedup", "% of peak"], shown),
    ]


def _bf16_products(rows: list[Row]) -> list[str]:
    """Two tables: ratios of float32's times to those with bfloat16 products, and the lowest of them.

    A single step keeps float32 products (csrc/cpu/plan.h), so that cases of T = 1 have a line of their own.
    """
    measured = {(row.case, row.mode, row.impl): row for row in rows if row.status == "ok" and row.p50_ms}
    compared: list[tuple[float, Row, Row]] = []  # the ratio to fastlstm's own float32, and both rows
    for row in rows:
        plain = measured.get((row.case.removesuffix(" bf16_products"), row.mode, "fastlstm"))
        if row.impl == "fastlstm" and row.dtype == "bf16_products" and plain and row.p50_ms and row.status == "ok":
            compared.append(((plain.p50_ms or 0) / row.p50_ms, plain, row))
    groups: dict[str, Callable[[Row], bool]] = {
        "H ≥ 256 and B ≥ 16": lambda row: row.T > 1 and row.H >= 256 and row.B >= 16,
        "smaller": lambda row: row.T > 1 and not (row.H >= 256 and row.B >= 16),
        "T = 1, float32 products": lambda row: row.T == 1,
    }
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
        for name, belongs in groups.items():
            group = [(ratio, row.ratio) for ratio, _, row in compared if row.mode == mode and belongs(row)]
            if group:
                own, nn = [ratio for ratio, _ in group], [ratio for _, ratio in group if ratio]
                figures = [f"{figure:.2f}x" for ratios in (own, nn) for figure in (geometric_mean(ratios), min(ratios))]
                lines.append([f"{HEADINGS[mode]}, {name}", str(len(group)), *figures])
    worst = [
        [
            f"{row.case}, {row.mode}",
            ms(plain),
            ms(row),
            f"{ratio:.2f}x" + (" (busy)" if is_busy(plain) else ""),
            _ratio(row),
        ]
        for ratio, plain, row in sorted(compared, key=lambda entry: entry[0])[:WORST]
    ]
    wrong = sum(row.status != "ok" for row in rows if row.impl == "fastlstm")
    over = ["over fastlstm in float32", "min", "over nn.LSTM with the flag", "min"]
    return [
        table([f"{rows[0].suite}, geometric means", "cases", *over], lines),
        f"Wrong or failed results of fastlstm: {wrong}. The {len(worst)} lowest ratios to its float32, which "
        "was measured next to it and not in turn with it:",
        table(["case", "float32 ms", "bfloat16 products ms", *over[::2]], worst),
    ]


def _scaling(rows: list[Row]) -> list[str]:
    """Time per step over T, time per row over raggedness, and peak memory, relative to the first case of each."""
    parts = []
    for kind, unit, cost in (
        ("sequence", "µs per step", lambda row: row.us_per_step),
        ("packed", "ns per row", lambda row: row.ns_per_row),
    ):
        for mode in ("train", "forward"):
            pairs = [(nn, row) for nn, row in _pairs(rows, mode) if row.kind == kind and row.impl == "fastlstm"]
            if pairs:
                parts += [f"**{HEADINGS[mode]}, {unit}**", _relative(pairs, unit, cost)]
    memory = [(nn, row) for nn, row in _pairs(rows, "memory") if row.impl == "fastlstm"]
    if memory:
        lines = [[row.case, number(nn.peak_mib), number(row.peak_mib), _ratio(row)] for nn, row in memory]
        parts += [f"**{HEADINGS['memory']}**", table(["case", "nn.LSTM MiB", "fastlstm MiB", "ratio"], lines)]
    return parts


def _models(rows: list[ModelRow]) -> list[str]:
    """One table per mode: model, package, the LSTMs' share of the time, whole-model times, speedup; then what is not
    in them."""
    parts = []
    for mode in ("train", "forward"):
        pairs = [(nn, row) for nn, row in _pairs(rows, mode) if row.ratio]
        if not pairs:
            continue
        pairs.sort(key=lambda pair: -(pair[0].lstm_share or 0.0))
        lines = [
            [
                row.case,
                row.package,
                _percent(nn.lstm_share),
                ms(nn),
                ms(row),
                _ratio(row),
                _percent(row.lstm_share),
            ]
            for nn, row in pairs
        ]
        headings = ["model", "package", "LSTM share", "nn.LSTM ms", "fastlstm ms", "speedup", "LSTM share after"]
        ratios = [row.ratio for _, row in pairs if row.ratio]
        parts += [f"**{HEADINGS[mode]}**", table(headings, lines)]
        parts.append(f"Geomean {geometric_mean(ratios):.2f}x; min {min(ratios):.2f}x; max {max(ratios):.2f}x.")
    absent = dict.fromkeys(f"{row.case}: {row.status}" for row in rows if row.status != "ok")
    return parts + (["Not measured: " + "; ".join(absent) + "."] if absent else [])


def _calls(rows: list[Row]) -> list[str]:
    """One table per mode: microseconds of each implementation, and the ratio of the own costs, above the view's."""
    parts = []
    for mode in ("train", "forward"):
        lines = []
        for case in dict.fromkeys(row.case for row in rows if row.mode == mode):
            us = {row.impl: 1e3 * row.p50_ms for row in rows if (row.case, row.mode) == (case, mode) and row.p50_ms}
            if {"view", "linear", "nn", "fastlstm"} <= us.keys():
                own = {impl: time - us["view"] for impl, time in us.items()}
                ratio = f"{own['nn'] / own['fastlstm']:.1f}x" if own["fastlstm"] > 0 else ""
                lines.append([case, *(number(us[impl]) for impl in ("view", "linear", "nn", "fastlstm")), ratio])
        headings = ["call", "view µs", "nn.Linear µs", "nn.LSTM µs", "fastlstm µs", "own cost, nn.LSTM / fastlstm"]
        parts += [f"**{HEADINGS[mode]}**", table(headings, lines)]
    return parts


def _variants(rows: list[Row]) -> list[str]:
    """One table: the loop of steps, the plain layer, the layer with the option, and its ratios to both."""
    impls = [impl for impl in dict.fromkeys(row.impl for row in rows) if impl not in ("plain", "fastlstm")]
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = {row.impl: row for row in rows if row.case == case and row.p50_ms}
        ours, plain = of_case.get("fastlstm"), of_case.get("plain")
        if ours is None or plain is None or not ours.p50_ms or not plain.p50_ms:
            continue
        loops = [ms(of_case[impl]) if impl in of_case else "" for impl in impls]
        cost = f"{ours.p50_ms / plain.p50_ms:.2f}x"
        lines.append([case, *loops, ms(plain), ms(ours), cost, _ratio(ours)])
    headings = ["case", *(f"{impl} ms" for impl in impls), "plain ms", "with the option ms", "its cost", "speedup"]
    ratios = [row.ratio for row in rows if row.impl == "fastlstm" and row.ratio]
    failed = dict.fromkeys(f"{row.case}, {row.impl}: {row.status}" for row in rows if row.status != "ok")
    parts = [f"**{HEADINGS['train']}**", table(headings, lines)]
    if ratios:
        parts.append(f"Speedup over the fastest loop: geomean {geometric_mean(ratios):.2f}x; min {min(ratios):.2f}x.")
    return parts + (["Not measured: " + "; ".join(failed) + "."] if failed else [])


def _frozen_accuracy(rows: list[AccuracyRow]) -> list[str]:
    """One table: figures of the trained and the frozen models, and what freezing changed."""
    from benchmarks import frozen_accuracy  # imports the tutorials

    headings, lines = frozen_accuracy.lines(rows)
    seeds = len({row.seed for row in rows})
    text = f"Means over {seeds} seeds; in parentheses the smallest and the largest change."
    failed = dict.fromkeys(f"{row.case}: {row.status}" for row in rows if row.status != "ok")
    return [table(headings, lines), text + (f" Not measured: {'; '.join(failed)}." if failed else "")]


def _relative(pairs: list[tuple[Row, Row]], unit: str, cost: Callable[[Row], float | None]) -> str:
    first = cost(pairs[0][1])
    lines = []
    for nn, row in pairs:
        value = cost(row)
        relative = f"{value / first:.2f}x" if value and first else ""
        lines.append([row.case, number(cost(nn)), number(value), relative, _ratio(row)])
    return table(["case", f"nn.LSTM {unit}", f"fastlstm {unit}", "relative to the first", "speedup"], lines)


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f}x" + (" (busy)" if is_busy(row) else "")


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return ""
    return f"{fraction:.0%}" if fraction >= 0.1 else f"{fraction:.1%}"


def marker_of(file: Path) -> str:
    """The name of a CSV's marker: its path below benchmarks/results, or its file name elsewhere, without ".csv"."""
    path = file.resolve().with_suffix("")
    return path.relative_to(results.RESULTS).as_posix() if path.is_relative_to(results.RESULTS) else path.name


def replace_section(document: Path, marker: str, text: str) -> bool:
    """Replace the text between the markers; return False if the file has none of that name."""
    start, end = f"<!-- benchmarks:{marker} -->", f"<!-- /benchmarks:{marker} -->"
    old = document.read_text()
    if start not in old or end not in old:
        return False
    head, rest = old.split(start, 1)
    tail = rest.split(end, 1)[1]
    document.write_text(f"{head}{start}\n{text}\n{end}{tail}")
    return True


def link(document: Path, image: Path, alt: str) -> str:
    """Markdown for an image, by a path relative to the document."""
    return f"![{alt}]({Path(os.path.relpath(image.resolve(), document.resolve().parent)).as_posix()})"


def sections(files: Iterable[Path], document: Path) -> dict[str, str]:
    """The text of each CSV, and of all CSVs of each suite, by marker; an image is linked if there is one."""
    by_marker: dict[str, str] = {}
    suites: dict[str, list[str]] = {}
    for file in files:
        rows = results.read(file)
        if rows:
            image, text = file.with_suffix(".png"), markdown(rows)
            by_marker[marker_of(file)] = f"{text}\n\n{link(document, image, _alt(rows[0]))}" if image.exists() else text
            suites.setdefault(rows[0].suite, []).append(by_marker[marker_of(file)])
    return {suite: "\n\n".join(texts) for suite, texts in suites.items()} | by_marker


def _alt(row: Row) -> str:
    """The text for a reader who does not see the plot of a CSV."""
    if row.suite == "products_error":
        return f"RMS error of a float32 layer over H and over T by the precision of its products, {row.device}"
    over = "the fastest other runtime" if row.suite == "inference" else "nn.LSTM"
    return f"Speedup of fastlstm over {over}, suite {row.suite}, {row.device}"


def headline_section(document: Path) -> str:
    """The headline table and figure."""
    alt = "Dot plot of the training and inference speedups of the table above, on a log axis"
    return f"{headline.markdown()}\n\n{link(document, headline.FIGURE, alt)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="CSVs into tables and plots.")
    parser.add_argument("csv", nargs="*", type=Path, help="by default every CSV under benchmarks/results")
    parser.add_argument("--readme", type=Path, help="a file with markers to write the tables into")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    files = options.csv or sorted(results.RESULTS.glob("*/*.csv"))
    if not files:
        print("no CSV to report: run python -m benchmarks first", file=sys.stderr)
        return 2
    for file in files:
        rows = results.read(file)
        if not rows:
            print(f"{file.name} has no rows", file=sys.stderr)
            continue
        print(markdown(rows) + "\n")
        if not options.no_plots and rows[0].suite not in ("features", "calls", "frozen_accuracy", "variants"):
            from benchmarks.plot import draw

            draw(rows, file.with_suffix(".png"))
    if options.readme:
        if "<!-- benchmarks:headline -->" in options.readme.read_text():
            if not options.no_plots:
                headline.draw()
            replace_section(options.readme, "headline", headline_section(options.readme))
        for marker, text in sections(files, options.readme).items():
            replace_section(options.readme, marker, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
