"""The README's table and figure: selected rows of the committed CSVs, slowdowns included. `rows`, `markdown`, `draw`.

python -m benchmarks.report --readme README.md writes both.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.results import RESULTS, Row

CPU = "intel-r-xeon-r-processor-avx512-2-threads/cpu"
GPU = "nvidia-h100-80gb-hbm3/gpu"
# us per step by CUDA kernel variant; a table with other columns.
KERNELS = "nvidia-h100-80gb-hbm3/kernels/tiers"
FIGURE = RESULTS / "headline.png"

# (device as shown, workload as shown, CSV, case). A case of KERNELS is (dtype, T, B, H).
SELECTED: list[tuple[str, str, str, str | tuple[str, int, int, int]]] = [
    ("CPU", "small: T=20 B=8 I=10 H=32 L=2", CPU, "T=20 B=8 I=10 H=32 L=2"),
    ("CPU", "one streaming step: B=1 I=64 H=64", CPU, "T=1 B=1 I=64 H=64 streaming"),
    ("CPU", "packed, variable lengths: T=500 B=16 I=64 H=64", CPU, "T=500 B=16 I=64 H=64 packed (random)"),
    ("CPU", "medium: T=200 B=64 I=50 H=100 L=2", CPU, "T=200 B=64 I=50 H=100 L=2"),
    ("CPU", "large: T=100 B=64 I=512 H=512", CPU, "T=100 B=64 I=512 H=512"),
    ("CPU", "bfloat16: T=100 B=32 I=256 H=256", CPU, "T=100 B=32 I=256 H=256 bfloat16"),
    ("H100 (no CUDA graph)", "bfloat16: T=512 B=64 I=256 H=256", GPU, "T=512 B=64 I=256 H=256 bfloat16"),
    ("H100 (no CUDA graph)", "bfloat16: T=512 B=64 I=2048 H=2048", GPU, "T=512 B=64 I=2048 H=2048 bfloat16"),
    ("H100 (no CUDA graph)", "float16: T=512 B=16 I=128 H=128", GPU, "T=512 B=16 I=128 H=128 float16"),
    ("H100 (no CUDA graph)", "float16: T=512 B=16 I=1024 H=1024", KERNELS, ("float16", 512, 16, 1024)),
]


@dataclass(frozen=True)
class Headline:
    """One row: times of a training step in ms, and nn.LSTM's time / fastlstm's for both modes."""

    device: str
    workload: str
    nn_ms: float
    ms: float
    train: float
    forward: float


def path_of(name: str) -> Path:
    return RESULTS / f"{name}.csv"


def rows() -> list[Headline]:
    """The selected rows, read from the CSVs. Raises LookupError if a CSV lacks a case."""
    read = {name: results.read(path_of(name)) for name in (CPU, GPU)}
    selected = []
    for device, workload, name, case in SELECTED:
        if isinstance(case, tuple):
            nn_ms, ms, forward_nn_ms, forward_ms = _of_kernels(path_of(name), *case)
        else:
            (nn_ms, ms), (forward_nn_ms, forward_ms) = (_times(read[name], case, mode) for mode in ("train", "forward"))
        selected.append(Headline(device, workload, nn_ms, ms, nn_ms / ms, forward_nn_ms / forward_ms))
    return selected


def _times(rows: list[Row], case: str, mode: str) -> tuple[float, float]:
    """nn.LSTM's and fastlstm's median in ms."""
    times = {row.impl: row.p50_ms for row in rows if (row.case, row.mode) == (case, mode)}
    nn, ours = times.get("nn"), times.get("fastlstm")
    if not nn or not ours:
        raise LookupError(f"no times of {case}, {mode}")
    return nn, ours


def _of_kernels(path: Path, dtype: str, T: int, B: int, H: int) -> tuple[float, float, float, float]:
    """ms of nn.LSTM's and fastlstm's training step, then of forward, at the last commit of the table."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    key = (lines[-1]["commit"], dtype, str(T), str(B), str(H))
    by_mode = {
        line["mode"]: line for line in lines if (line["commit"], line["dtype"], line["T"], line["B"], line["H"]) == key
    }
    if set(by_mode) != {"train", "forward"}:
        raise LookupError(f"no times of {key}")
    columns = ("nn_us_per_step", "planned_us_per_step")
    nn, ours, forward_nn, forward = (
        float(by_mode[mode][column]) * T / 1000 for mode in ("train", "forward") for column in columns
    )
    return nn, ours, forward_nn, forward


def markdown() -> str:
    """The table, and what was measured where and how."""
    lines = ["| workload | nn.LSTM ms | fastlstm ms | training | inference |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows():
        times = [f"{row.nn_ms:.3g}", f"{row.ms:.3g}", f"{row.train:.2f}x", f"{row.forward:.2f}x"]
        lines.append(f"| {row.device}, {row.workload} | {' | '.join(times)} |")
    cpu, gpu = (results.read(path_of(name))[0] for name in (CPU, GPU))
    cudnn = ".".join(str(part) for part in _cudnn_version(gpu.cudnn))
    text = [
        f"CPU: {cpu.threads} cores of an {cpu.device} with AVX-512 and AMX, torch {cpu.torch}, {cpu.date[:10]}; "
        "float32 unless stated.",
        f"GPU: {gpu.device}, torch {gpu.torch}, cuDNN {cudnn}, {gpu.date[:10]}; nn.LSTM was **not** in a CUDA graph.",
        "Times are of a training step: medians of interleaved runs in one process, checked against float64.",
        "Expect 10-20 % variation. Later changes of the code are not measured. The last row is a median of two",
        f"samples, compared with nn.LSTM's results, not float64 (`benchmarks/results/{KERNELS}.csv`).",
    ]
    return "\n".join([*lines, "", "\n".join(text)])


def _cudnn_version(number: str) -> tuple[int, int, int]:
    """91900 is 9.19.0."""
    value = int(number)
    return value // 10000, value // 100 % 100, value % 100


def draw(path: Path = FIGURE) -> Path:
    """Dot plot of the table's speedups on a log axis, with the line of equal speed."""
    from benchmarks import plot

    selected = rows()
    figure, axes = plot.plt.subplots(figsize=(8.6, 0.9 + 0.33 * len(selected)), layout="constrained")
    heights = list(range(len(selected) - 1, -1, -1))
    for mode, offset in (("train", 0.13), ("forward", -0.13)):
        values = [row.train if mode == "train" else row.forward for row in selected]
        at = [height + offset for height in heights]
        axes.hlines(at, 1, values, color=plot.COLOURS[mode], alpha=0.35, linewidth=2)
        axes.plot(values, at, "o", color=plot.COLOURS[mode], markersize=6, label=plot.LABELS[mode])
    axes.set_yticks(heights, [f"{row.device}, {row.workload}" for row in selected], fontsize=9)
    axes.set_ylim(-0.6, len(selected) - 0.4)
    plot.ratio_axis(axes, [value for row in selected for value in (row.train, row.forward)], vertical=False)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plot.plt.close(figure)
    return path
