"""What the rows of whole calls and of steps have in common: `new_row`, `checked`, `compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inference.engines import COMPARED_WITH, ENGINES
from benchmarks.inference.gate import References
from benchmarks.results import InferenceRow


def new_row(case: Case, mode: str, impl: str, name: str = "") -> InferenceRow:
    """A row without measurements; `name` is that of the case by default."""
    engine = ENGINES[impl]
    row = InferenceRow("inference", name or case.name, mode, impl, kind=case.kind, dtype=case.dtype)
    row.T, row.B, row.I, row.H, row.L, row.D, row.P = case.T, case.B, case.I, case.H, case.L, case.D, case.P
    row.rows, row.flops = case.rows, case.flops("forward")
    row.weights, row.package = engine.weights, engine.version()
    return row


def checked(row: InferenceRow, references: References, results: Callable[[], Mapping[str, Tensor]]) -> bool:
    """Apply the gate to an engine's results, which `results` computes; fill the row; return True if they are right.

    An engine that raises must not end the suite; `failures` in benchmarks/run.py counts it if it is ours.
    """
    try:
        errors = references.check(results(), row.weights)
    except Exception as error:
        lines = str(error).splitlines()
        row.status = f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
        return False
    row.status, row.gate_T = errors.status, references.case.T
    row.max_error, row.rms_error, row.rms_output = errors.max_error, errors.rms_error, errors.rms_output
    if errors.accuracy:
        row.error, row.error_allowed = errors.accuracy.error, errors.accuracy.allowed
    return row.status == "ok"


def compare(rows: Mapping[str, InferenceRow], times: Mapping[str, float]) -> None:
    """Fill compared_with and speedup of our engines; `times` has the engines that were timed."""
    for name, row in rows.items():
        others = [other for other in COMPARED_WITH[row.weights] if other in times]
        if ENGINES[name].ours and others and name in times:
            row.compared_with = min(others, key=lambda other: times[other])
            row.speedup = times[row.compared_with] / times[name]
