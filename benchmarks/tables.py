"""Parts of the Markdown tables: `table`, and how numbers and rows are shown in its cells."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.load import MAX_BACKGROUND_LOAD
from benchmarks.results import Row


def geometric_mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(headings: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *lines])


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ms(row: Row) -> str:
    return number(row.p50_ms) if row.status == "ok" else row.status.split(":")[0]


def is_busy(row: Row) -> bool:
    return row.others_cpu is not None and row.others_cpu > MAX_BACKGROUND_LOAD
