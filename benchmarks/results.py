"""One measurement as one CSV row: `Row`, and reading and writing files of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, overload

R = TypeVar("R")
BASELINES = ("nn", "nn_graph")  # nn.LSTM as called and in a CUDA graph: ratios are to the faster
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """Columns in file order. Times are milliseconds per call; an empty field was not measured."""

    suite: str
    case: str
    mode: str  # train, forward, or memory
    impl: str
    backend: str = ""  # fastlstm's backend, or cuDNN's algorithm
    status: str = "ok"  # ok; WRONG: the numbers; failed: the exception; skipped: why
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None  # baseline p50 / this p50; the baseline is nn, or nn_graph if that is faster
    ratio_rounds: float | None = None  # median of the rounds' own ratios baseline / this
    target: float | None = None  # the ratio aimed at
    fraction: float | None = None  # of the machine's peak: floor_ms / p50_ms
    floor_ms: float | None = None  # lower bound by the peaks (machine.py)
    us_per_step: float | None = None
    ns_per_row: float | None = None  # a row is one time step of one sequence; padding does not count
    peak_mib: float | None = None  # memory rows: peak resident memory minus that before the step
    rounds: int | None = None
    calls: int | None = None  # per sample
    others_cpu: float | None = None  # background load: share of the CPUs that other processes used (load.py)
    gate_T: int | None = None  # T of the accuracy gate
    error: float | None = None  # of the gate's worst tensor, max norm against float64
    error_allowed: float | None = None
    T: int | None = None
    B: int | None = None
    I: int | None = None  # noqa: E741
    H: int | None = None
    L: int | None = None
    D: int | None = None
    P: int | None = None
    kind: str = ""
    rows: int | None = None  # T * B, or the sum of the lengths
    dtype: str = ""
    flops: int | None = None
    limit: str = ""  # the peak: size and dtype of the GEMM
    limit_gflops: float | None = None
    limit_gbytes: float | None = None
    device: str = ""
    cpu: str = ""
    cpu_capability: str = ""
    cores: int | None = None
    threads: int | None = None
    torch: str = ""
    cuda: str = ""
    cudnn: str = ""
    driver: str = ""
    python: str = ""
    fastlstm: str = ""
    commit: str = ""
    date: str = ""


@dataclass
class ModelRow(Row):
    """A row of the suite models: a whole model, unconverted (nn) or converted (fastlstm)."""

    package: str = ""  # name and version
    lstms: int | None = None  # LSTM and LSTMCell modules converted
    lstm_share: float | None = None  # the LSTMs' part of the time, 0 to 1, timed by hooks in separate runs


@dataclass
class AccuracyRow(Row):
    """A row of the suite frozen_accuracy: a figure of a tutorial's model, as trained or frozen."""

    tutorial: str = ""
    seed: int | None = None  # of the initial weights and the data
    weights: str = ""  # "trained": not frozen; otherwise the dtype of the frozen weights
    measure: str = ""
    value: float | None = None
    change: float | None = None  # value minus the trained model's, in `unit`
    unit: str = ""  # points (of a share, in percent), % (of the trained model's value); empty: as the value


@dataclass
class ErrorRow(Row):
    """A row of the suite products_error: the error of one result of a float32 layer against float64.

    `kind` is the sweep, `error` and `error_allowed` belong to `tensor`, `impl` "emulated" means that no kernel ran.
    """

    seed: int | None = None  # of the weights, the input and the gradient of the output
    products: str = ""  # precision of the factors by torch's names: ieee, tf32, bf16
    tensor: str = ""  # output or d_weight_hh
    rms_error: float | None = None  # relative to the RMS of the float64 result
    rms_predicted: float | None = None  # the same of the accuracy rule's perturbed evaluations
    max_error: float | None = None  # `error` relative to the largest value of the float64 result


@dataclass
class InferenceRow(Row):
    """A row of the suite inference: a layer with fixed weights in one engine; mode forward, or steps with its state.

    `stream` rows have the latency of single steps, on one torch thread per Python thread, instead of p20_ms to p80_ms.
    """

    package: str = ""  # name and version of the engine's package
    weights: str = ""  # dtype of the weights: float32, bfloat16 or int8
    setting: str = ""  # of the engine: the fastest one of those tried
    weight_bytes: int | None = None  # in memory: parameters and buffers of a module, constants of an ONNX model
    max_error: float | None = None  # of the output against float64, with the weights as given
    rms_error: float | None = None
    rms_output: float | None = None  # of the float64 output
    compared_with: str = ""  # the fastest of ONNX Runtime, OpenVINO and torch.ao; int8 with int8
    speedup: float | None = None  # its p50 / this p50; stream rows: this steps_per_s / its steps_per_s
    python_threads: int | None = None  # stream rows: threads that step, each with a state of its own
    steps: int | None = None  # of all threads together
    steps_per_s: float | None = None  # of all threads together
    p50_us: float | None = None  # percentiles of the latency over these steps
    p99_us: float | None = None
    p999_us: float | None = None


COLUMNS = [field.name for field in fields(Row)]
# Suites whose rows have more columns.
SUITE_ROWS: dict[str, type[Row]] = {
    "models": ModelRow,
    "inference": InferenceRow,
    "frozen_accuracy": AccuracyRow,
    "products_error": ErrorRow,
}


def row_type(suite: str) -> type[Row]:
    """The rows of a suite, by the name of its CSV."""
    return SUITE_ROWS.get(suite, Row)


def columns(kind: type) -> dict[str, str]:
    """Column names of a dataclass of rows, in file order, with the text of each type."""
    return {field.name: str(field.type) for field in fields(kind)}


def write(rows: Iterable[object], path: Path, kind: type | None = None) -> None:
    """Write the CSV through a temporary file next to it, so that an interrupted run leaves the old file complete.

    kind: the dataclass of the rows; by default the one of the suite that the file is named after.
    """
    names = list(columns(kind or row_type(path.stem)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(names)
        out.writerows([_shown(getattr(row, name)) for name in names] for row in rows)
    part.replace(path)


@overload
def read(path: Path) -> list[Row]: ...


@overload
def read(path: Path, kind: type[R]) -> list[R]: ...


def read(path: Path, kind: type | None = None) -> list:
    """The rows of a CSV that `write` new_rows. Raises ValueError if a column is missing or unknown."""
    kind = kind or row_type(path.stem)
    types = columns(kind)
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        if table.fieldnames is None or set(table.fieldnames) != set(types):
            different = set(table.fieldnames or []) ^ set(types)
            raise ValueError(
                f"{path.name} does not have the columns of {kind.__module__}.{kind.__name__}: {sorted(different)}"
            )
        return [kind(**{name: _parsed(types[name], text) for name, text in line.items()}) for line in table]


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parsed(kind: str, text: str) -> object:
    if kind == "str":
        return text
    if text == "":
        return None
    return int(text) if kind.startswith("int") else float(text)
