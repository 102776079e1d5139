"""The error of a float32 layer by the precision of its products' factors, over H and over T: `error_rows`.

Errors are those of the output and of the gradient of weight_hh, relative to a float64 run of torch.nn.LSTM. float32
and bfloat16 products are fastlstm's native kernels. No CPU has TF32: its products are emulated, by fastlstm.reference
in float32 with the factors of every product rounded, in the forward and in the backward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from benchmarks.cases import Case
from benchmarks.results import ErrorRow
from benchmarks.tables import table
from fastlstm import dispatch, reference
from fastlstm.accuracy import Accuracy, Precision, compare, error_bounds
from fastlstm.backends import native

SEEDS = (0, 1, 2)
SWEEPS = {
    "over H": [Case(T=50, B=16, I=H, H=H) for H in (32, 64, 128, 256, 512, 1024)],
    "over T": [Case(T=T, B=4, I=128, H=128) for T in (10, 30, 100, 300, 1000, 3000)],
}
# Factors of products by torch's names of fp32_precision, and as tables and figures show them.
PRODUCTS = {"ieee": "float32", "tf32": "TF32 (emulated)", "bf16": "bfloat16"}
TENSORS = {"output": "output", "d_weight_hh": "gradient of weight_hh"}
TF32_DROPPED_BITS = 13  # of float32's 23 bits of mantissa

aten = torch.ops.aten
_PRODUCT_OPS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot)


def round_to_tf32(value: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa: to nearest, ties away from zero, as the GPU's cvt.rna.tf32 does."""
    half = 1 << (TF32_DROPPED_BITS - 1)
    rounded = ((value.view(torch.int32) + half) & -(1 << TF32_DROPPED_BITS)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)


class Tf32Products(TorchDispatchMode):
    """Round both factors of every float32 product, of autograd's too, because the mode is below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCT_OPS:
            args = (*args[:-2], round_to_tf32(args[-2]), round_to_tf32(args[-1]))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Inputs:
    """A layer with default initialization, x [T, B, I] and the gradient of the output [T, B, H], both normal."""

    layer: fastlstm.LSTM
    x: Tensor
    grad_output: Tensor

    @classmethod
    def of(cls, case: Case, seed: int) -> Inputs:
        torch.manual_seed(seed)
        layer = fastlstm.LSTM(case.I, case.H)
        return cls(layer, torch.randn(case.T, case.B, case.I), torch.randn(case.T, case.B, case.H))


def results_of(inputs: Inputs, products: str) -> dict[str, Tensor]:
    """The output and the gradient of weight_hh in float32, with products of that precision."""
    if products == "tf32":
        weights = list(inputs.layer.parameters())
        with Tf32Products():
            output = reference.layer(inputs.x, None, None, weights)[0]
            return _with_gradient(output, inputs.layer.weight_hh_l0, inputs.grad_output)
    with _products(products), fastlstm.use_backend("native"):
        output = inputs.layer(inputs.x)[0]
        return _with_gradient(output, inputs.layer.weight_hh_l0, inputs.grad_output)


def _with_gradient(output: Tensor, weight_hh: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    (gradient,) = torch.autograd.grad(output, weight_hh, grad_output)
    return {"output": output.detach(), "d_weight_hh": gradient}


@contextmanager
def _products(products: str) -> Iterator[None]:
    """Set torch's flag of float32 products on a CPU, as for nn.LSTM."""
    rnn = torch.backends.mkldnn.rnn  # type: ignore[attr-defined]
    before, rnn.fp32_precision = rnn.fp32_precision, products
    try:
        yield
    finally:
        rnn.fp32_precision = before


def unavailable_reason(inputs: Inputs, products: str) -> str:
    """Why this process does not run native kernels with these products; "" if it does or if they are emulated."""
    if products == "tf32":
        return ""
    if native.extension is None:
        return f"the native backend is not available: {native.load_error}"
    call = dispatch.describe(inputs.x, list(inputs.layer.parameters()))
    with _products(products):
        plan = native.cpu_plan(call, *inputs.x.shape[:2])
    if products == "ieee" or all(phase["engine"] == "bf16_products" for phase in plan.values()):
        return ""
    text = next(phase["text"] for phase in plan.values() if phase["engine"] != "bf16_products")
    reason = text.partition("not used (")[2].partition(")")[0] or text
    return (
        f"bfloat16 products are not available: {reason}; "
        "on a CPU with AVX512_BF16 the environment variable ATEN_CPU_CAPABILITY=avx512 selects them"
    )


def chosen(matching: str = "", done: Set[str] = frozenset()) -> list[tuple[str, Case, int]]:
    """Sweeps, sizes and seeds whose case name contains `matching`, without those in `done`."""
    cases = [(sweep, case, seed) for sweep, sizes in SWEEPS.items() for case in sizes for seed in SEEDS]
    return [
        (sweep, case, seed)
        for sweep, case, seed in cases
        if matching in (name := case_name(case, seed)) and name not in done
    ]


def case_name(case: Case, seed: int) -> str:
    return f"{case.name} seed {seed}"


def error_rows(
    matching: str,
    report: Callable[[str, list[ErrorRow]], None],
    done: Set[str] = frozenset(),
    until: float = float("inf"),
) -> list[ErrorRow]:
    """Rows by products and tensor for each size and seed; no case starts later than `until` (time.monotonic)."""
    rows = []
    for sweep, case, seed in chosen(matching, done):
        if time.monotonic() > until:
            break
        new_rows = measured(sweep, case, seed)
        rows += new_rows
        report(case_name(case, seed), new_rows)
    return rows


def measured(sweep: str, case: Case, seed: int) -> list[ErrorRow]:
    """The rows of one layer. An error that rounding does not explain makes its row wrong."""
    inputs = Inputs.of(case, seed)
    rows = []
    for products in PRODUCTS:
        reason = unavailable_reason(inputs, products)
        new_rows = [_row(sweep, case, seed, products, tensor) for tensor in TENSORS]
        if reason:
            for row in new_rows:
                row.status = f"skipped: {reason}"
        else:
            _measure(inputs, products, {row.tensor: row for row in new_rows})
        rows += new_rows
    return rows


def _measure(inputs: Inputs, products: str, rows: Mapping[str, ErrorRow]) -> None:
    wide = nn.LSTM(inputs.layer.input_size, inputs.layer.hidden_size, dtype=torch.float64)
    wide.load_state_dict(inputs.layer.state_dict())
    x, grad_output = inputs.x.double(), inputs.grad_output.double()
    evaluations = []

    def run() -> dict[str, Tensor]:
        evaluations.append(_with_gradient(wide(x)[0], wide.weight_hh_l0, grad_output))
        return evaluations[-1]

    terms = {"d_weight_hh": x.shape[0] * x.shape[1]}
    truth, bounds = error_bounds(run, Precision.of(torch.float32, products), terms)
    results = results_of(inputs, products)
    accuracies = {accuracy.name: accuracy for accuracy in compare(results, truth, bounds)}
    for name, row in rows.items():
        _fill(row, accuracies[name], results[name], truth[name], [perturbed[name] for perturbed in evaluations[1:]])


def _fill(row: ErrorRow, accuracy: Accuracy, result: Tensor, truth: Tensor, perturbed: list[Tensor]) -> None:
    row.error, row.error_allowed = accuracy.error, accuracy.allowed
    row.max_error = accuracy.error / accuracy.scale
    row.rms_error = relative_rms(result.double() - truth, truth)
    row.rms_predicted = relative_rms(torch.stack(perturbed) - truth, truth)
    if not accuracy.ok:
        row.status = f"WRONG: {accuracy}"


def relative_rms(error: Tensor, truth: Tensor) -> float:
    return float(error.square().mean().sqrt() / truth.square().mean().sqrt())


def _row(sweep: str, case: Case, seed: int, products: str, tensor: str) -> ErrorRow:
    emulated = products == "tf32"
    isa = "" if native.extension is None else native.extension.isa()
    if native.extension is not None and products == "bf16":
        isa = native.extension.bfloat16_isa()
    return ErrorRow(
        suite="products_error",
        case=case_name(case, seed),
        mode="forward" if tensor == "output" else "train",
        impl="emulated" if emulated else "fastlstm",
        backend="reference" if emulated else isa,
        **{name: getattr(case, name) for name in ("T", "B", "I", "H", "L", "D", "P", "rows", "dtype")},
        kind=sweep,
        seed=seed,
        products=products,
        tensor=tensor,
    )


def median_error(rows: list[ErrorRow], column: str, **key: object) -> float | None:
    """The median over the seeds of a column, of the rows with the values of `key`; None if none was measured."""
    values = [
        getattr(row, column)
        for row in rows
        if row.rms_error is not None and all(getattr(row, name) == value for name, value in key.items())
    ]
    return statistics.median(values) if values else None


def sizes(rows: list[ErrorRow], sweep: str) -> list[int]:
    """The values of H or T of a sweep."""
    return sorted({getattr(row, sweep[-1]) for row in rows if row.kind == sweep})


def tables(rows: list[ErrorRow]) -> list[str]:
    """One table per sweep: median RMS errors; then one that compares the precisions with each other and the rule."""
    parts = []
    for sweep in SWEEPS:
        of_sweep = [row for row in rows if row.kind == sweep]
        if not of_sweep:
            continue
        name, one = sweep[-1], of_sweep[0]
        fixed = f"T = {one.T}, B = {one.B}" if name == "H" else f"H = {one.H}, B = {one.B}"
        headings = [f"{name} ({fixed})", *(f"{tensor}, {text}" for tensor in TENSORS for text in PRODUCTS.values())]
        lines = []
        for size in sizes(rows, sweep):
            keys = [{name: size, "tensor": tensor, "products": products} for tensor in TENSORS for products in PRODUCTS]
            lines.append([str(size), *(_shown(median_error(of_sweep, "rms_error", **key)) for key in keys)])
        parts.append(table(headings, lines))
    seeds = len({row.seed for row in rows})
    parts.append(
        f"RMS error, relative to the RMS of the float64 result; medians of {seeds} seeds. Ranges over all sizes and "
        "seeds, where predicted is the RMS error of the accuracy rule's perturbed evaluations, and bound the rule's:"
    )
    parts.append(_comparison(rows))
    failed = dict.fromkeys(f"{row.case}, {row.products}: {row.status}" for row in rows if row.status != "ok")
    return parts + (["Not measured: " + "; ".join(failed) + "."] if failed else [])


def _comparison(rows: list[ErrorRow]) -> str:
    """Ranges of RMS errors relative to other products' and to the rule's prediction; largest share of the bound."""
    measured = [row for row in rows if row.rms_error and row.rms_predicted and row.error_allowed]
    lines = []
    for products, text in PRODUCTS.items():
        for tensor, shown in TENSORS.items():
            of_both = [row for row in measured if (row.products, row.tensor) == (products, tensor)]
            if of_both:
                times = [_range(_ratios(of_both, measured, other)) for other in PRODUCTS if other != "bf16"]
                predicted = _range([row.rms_error / row.rms_predicted for row in of_both])
                share = max(row.error / row.error_allowed for row in of_both)
                lines.append([f"{text}, {shown}", *times, predicted, f"{share:.0%}"])
    others = [f"RMS error / {text}'s" for text in ("float32", "TF32")]
    return table(["products, result", *others, "RMS error / predicted", "max error / bound"], lines)


def _ratios(rows: list[ErrorRow], measured: list[ErrorRow], products: str) -> list[float]:
    """RMS errors relative to those of other, more exact products; none if `products` are not more exact."""
    others = {(row.case, row.tensor): row.rms_error for row in measured if row.products == products}
    order = list(PRODUCTS)
    return [
        row.rms_error / others[row.case, row.tensor]
        for row in rows
        if (row.case, row.tensor) in others and order.index(row.products) > order.index(products)
    ]


def _range(values: list[float]) -> str:
    """The smallest and the largest value, in two digits; large ones without an exponent."""
    if not values:
        return ""
    low, high = (float(f"{value:.2g}") for value in (min(values), max(values)))
    return f"{low:,.0f} to {high:,.0f}" if high >= 100 else f"{low:.2g} to {high:.2g}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}".replace("e-0", "e-")
