"""Families of cases: a grid, random cases, bfloat16 products, few rows, and scaling over T and raggedness."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.cases import CPU, RAGGED, SEED, Case

GRID_T = (1, 7, 50, 300, 2000)
GRID_B = (1, 3, 16, 64, 256)
GRID_H = (1, 16, 51, 128, 400, 1024, 2048)
# Forward flops of the largest case: about a quarter of a second's training step on two cores.
GRID_FLOPS = 1e10


def grid() -> list[Case]:
    """Every T x B x H whose forward pass stays within GRID_FLOPS; one float32 layer with I = H."""
    cases = [Case(T, B, H, H) for H in GRID_H for B in GRID_B for T in GRID_T]
    return [case for case in cases if case.flops("forward") <= GRID_FLOPS]


def grid_size() -> tuple[int, int]:
    """(cases within the budget, all cases)."""
    return len(grid()), len(GRID_T) * len(GRID_B) * len(GRID_H)


def bf16_products() -> list[Case]:
    """The float32 layers of the suites cpu and grid from 64 units on, each beside itself with torch's flag."""
    layers = {case.name: case for case in (*CPU, *grid()) if case.H >= 64 and case.dtype == "float32"}
    plain = [replace(case, target_train=None, target_forward=None) for case in layers.values()]
    return [case for layer in plain for case in (layer, replace(layer, dtype="bf16_products"))]


@contextmanager
def products(case: Case) -> Iterator[None]:
    """Set torch's flag for a case of bfloat16 products, for nn.LSTM and fastlstm, and float32 for others."""
    rnn = torch.backends.mkldnn.rnn  # type: ignore[attr-defined]
    before = rnn.fp32_precision
    rnn.fp32_precision = "bf16" if case.dtype == "bf16_products" else "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = before


RANDOM_CASES = 100


def random_cases() -> list[Case]:
    """Layers of many kinds, at sizes between those of the grid: drawn on a log scale, within the grid's budget.

    Drawn from a fixed seed, so that runs can be compared.
    """
    draw = random.Random(SEED)

    def size(high: int, low: int = 1) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    cases: dict[str, Case] = {}
    while len(cases) < RANDOM_CASES:
        H = size(1200, low=8)
        case = Case(
            T=size(300),
            B=size(128),
            I=draw.choice([H, size(600)]),
            H=H,
            L=draw.choice([1, 1, 2]),
            dtype=draw.choices(["float32", "float64", "bfloat16"], weights=[8, 1, 1])[0],
            bidirectional=draw.random() < 0.2,
            proj=size(H - 1) if draw.random() < 0.1 else 0,
            **({"kind": "packed", "ragged": draw.choice(list(RAGGED))} if draw.random() < 0.15 else {}),
        )
        if case.flops("forward") <= GRID_FLOPS:
            cases[case.name] = case
    return list(cases.values())


# One to four rows per step, in float32 and bfloat16, and a layer whose rows, inputs and units fill no register tile.
FEW_ROWS: list[Case] = [
    *(
        Case(T, B, H, H, dtype=dtype)
        for H in (64, 256, 1024)
        for B in (1, 2, 4)
        for T in (1, 50)
        for dtype in ("float32", "bfloat16")
    ),
    Case(77, 13, 61, 203),
]

# One shape at growing T: the time per step should not change.
SCALING_T: list[Case] = [Case(T, 8, 64, 64) for T in (100, 1_000, 10_000, 100_000)]

# One padded shape, increasingly ragged: the time should be proportional to the sum of the lengths.
SCALING_PACKED: list[Case] = [Case(500, 16, 64, 64, kind="packed", ragged=ragged) for ragged in RAGGED]

# Peak memory of a training step is measured for cases large enough to exceed the allocator's noise.
MEMORY: list[Case] = [case for case in CPU if case.kind != "cells" and case.rows * case.H * case.L >= 200_000]
