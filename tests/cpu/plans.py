"""Plans of the CPU kernels (csrc/cpu/plan.h), for tests of a specific path.

`python -m tests.cpu.plans` writes tests/data/cpu_plans.csv: the plans of the benchmark suites at 1 to 64 threads.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import sweeps
from benchmarks.cases import CPU
from benchmarks.cases import Case as BenchmarkCase
from fastlstm.backends import native
from fastlstm.ops.schema import LayerCall, LayerShape

from ..cases import Case

Plan = dict[str, dict[str, Any]]


def plan_of(case: Case, threads: int | None = None, frozen: str = "no", **machine: Any) -> Plan:
    """The plan of a case's first layer, "forward" and "backward", of which a frozen layer has none.

    frozen: the form of weights packed before the call. `machine` overrides this machine's properties.
    """
    shape = LayerShape(case.H, case.proj or case.H, case.directions, case.bias)
    call = LayerCall(torch.device("cpu"), case.dtype, case.I, shape, case.lengths is not None, case.resets is not None)
    if threads is not None:
        machine["threads"] = threads
    h0 = case.hx != "none"
    return native.cpu_plan(call, case.T, case.B, case.lengths, case.packed, h0, frozen=frozen, **machine)


def candidates_of(
    case: Case, threads: int, frozen: str = "no", **machine: Any
) -> dict[str, list[tuple[int, int, str, bool, float]]]:
    """Candidate partitions of plan_of, by pass: threads per direction, row groups, split, concurrent, predicted us."""
    assert native.extension is not None
    return native.extension.cpu_plan_candidates(
        str(case.dtype).removeprefix("torch."), case.T, case.B, case.I, case.H, case.proj or case.H, case.directions,
        lengths=None if case.lengths is None else list(case.lengths), packed=case.packed,
        resets=case.resets is not None, h0=case.hx != "none", frozen=frozen, threads=threads, **machine,
    )  # fmt: skip


def assert_path(
    case: Case, phase: str, at: int | None = None, on: dict[str, Any] | None = None, **expected: Any
) -> None:
    """Assert that the plan takes the path under test.

    Args:
        phase: "forward" or "backward".
        at: the number of threads; torch's if None.
        on: properties that replace this machine's.
        expected: values by the names of csrc/python_plan.cpp.
    """
    plan = plan_of(case, at, **(on or {}))[phase]
    got = {name: plan[name] for name in expected}
    assert got == expected, f"{phase} of {case} takes another path than the one under test: {plan['text']}"


# ---- The golden file.

GOLDEN = Path(__file__).parents[1] / "data" / "cpu_plans.csv"
THREADS = (1, 2, 4, 8, 16, 32, 64)
MACHINES = {
    name: dict(
        zip(("l2_bytes", "vector_bytes", "bf16_kernels", "blas_is_slow_at_unaligned_rows"), machine, strict=True)
    )
    for name, machine in {
        "AVX-512, L2 2 MiB": (2 << 20, 64, True, False),
        "AVX2, L2 1 MiB": (1 << 20, 32, False, False),
        "AMD with AVX2, L2 512 KiB": (1 << 19, 32, False, True),
    }.items()
}
KEY = ("case", "machine", "pass")
COLUMNS = (*KEY, "at any number of threads", *map(str, THREADS))


def layers_of(case: BenchmarkCase) -> Iterator[tuple[str, LayerCall]]:
    """The distinct layers of a benchmark case, with their names."""
    for layer in range(min(case.L, 2)):
        I = case.I if layer == 0 else case.D * case.P  # noqa: E741
        if layer == 0 or case.I != I:
            shape = LayerShape(case.H, case.P, case.D, True)
            call = LayerCall(torch.device("cpu"), case.torch_dtype, I, shape, case.kind == "packed", False)
            yield case.name + (f", layer {layer + 1}" if layer else ""), call


def at_each_number(pass_: str, plan: dict[str, Any]) -> str:
    """The parts of a plan that depend on the number of threads.

    4r is 4 threads by rows, 2x3u two directions by 3 units each, 2r4u two groups of rows by 4 units each.
    """
    groups, members = plan["row_groups"], plan["members"]
    grid = f"{groups}r{members // groups}u"
    split = {"rows": f"{members}r", "units": f"{members}u", "none": "1", "grid": grid}[plan["split"]]
    words = [("2x" if plan["concurrent"] else "") + split]
    if plan["copies"] > 1:
        words.append("copies")
    if plan.get("engine", "float_panels") != "float_panels":
        words.append(plan["engine"])
    if pass_ == "backward":
        words.append("packed" if plan["pack_hh"] else "unpacked")
    if plan.get("hoisted_steps"):
        words.append(f"hoisted {plan['hoisted_steps']}")
    if plan.get("alternate_block_order"):
        words.append("alternating")
    if plan.get("private_pack"):
        words.append("private")
    return " ".join(words)


def at_any_number(pass_: str, plan: dict[str, Any]) -> str:
    def wgrad(p: dict[str, Any]) -> str:
        flags = [name for name in ("at_once", "transposed", "float64") if p[name]]
        return " ".join([p["gemm"], *flags])

    if "weights" in plan or "layer" in plan:
        return "cell, " + (plan["weights"] if pass_ == "forward" else f"layer {plan['layer']}")
    if pass_ == "forward":
        return ", ".join(f"{w} {plan[w]}" for w in ("w_ih", "w_hh", "w_hr") if w in plan)
    products = [f"{w} {wgrad(plan[w])}" for w in ("dw_ih", "dw_hh", "dw_hr") if w in plan]
    return ", ".join([f"chunk {plan['chunk_steps']}", f"dx {plan['dx']}", *products])


def golden_rows() -> dict[tuple[str, ...], dict[str, str]]:
    """The plans of the suites cpu, grid and random, by case, machine and pass."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for case in [*CPU, *sweeps.grid(), *sweeps.random_cases()]:
        lengths = case.lengths()
        options = {
            "lengths": None if lengths is None else lengths.tolist(),
            "packed": lengths is not None,
            "h0": case.kind == "stream",
            "cell": case.kind == "cells",
        }
        T = 1 if case.kind == "cells" else case.T
        for name, call in layers_of(case):
            for machine, description in MACHINES.items():
                plans = [native.cpu_plan(call, T, case.B, **options, threads=n, **description) for n in THREADS]
                for pass_ in ("forward", "backward"):
                    general = {at_any_number(pass_, p[pass_]) for p in plans}
                    assert len(general) == 1, f"{name}, {machine}, {pass_} depends on the threads: {general}"
                    cells = [at_each_number(pass_, p[pass_]) for p in plans]
                    key = (name, machine, pass_)
                    rows[key] = dict(zip(COLUMNS, (*key, general.pop(), *cells), strict=True))
    return rows


def read_golden() -> dict[tuple[str, ...], dict[str, str]]:
    with GOLDEN.open(newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write_golden() -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(golden_rows().values())
    GOLDEN.write_text(text.getvalue())


if __name__ == "__main__":
    write_golden()
