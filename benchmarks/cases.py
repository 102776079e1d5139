"""The cases: `Case`, its flops, and the CPU and quick suites.

Sizes are named as everywhere in the project: T, B, I, H, P, D, L for time, batch, input_size, hidden_size,
proj_size, directions, layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

SEED = 20240229

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,  # float32 tensors, TF32 products
    "bf16_products": torch.float32,  # float32 tensors, on a CPU with torch's flag for bfloat16 products
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

KINDS = ("sequence", "stream", "cells", "packed")
MODES = ("train", "forward")

# How the lengths of a packed batch are drawn from T and uniform numbers u [B] in [0, 1).
RAGGED: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
    "full": lambda T, u: torch.full_like(u, T),
    "half": lambda T, u: T // 2 + (u * (T - T // 2 + 1)).floor(),  # T/2 .. T
    "random": lambda T, u: 1 + (u * T).floor(),  # 1 .. T
    "skewed": lambda T, u: 1 + (u.pow(3) * T).floor(),  # 1 .. T, mean about T/4
    "one long": lambda T, u: torch.where(torch.arange(len(u)) == len(u) // 2, T, max(1, T // 10)).to(u),
}


@dataclass(frozen=True)
class Case:
    """One LSTM problem; `kind` says how it is called.

    sequence: module(x) over [T, B, I].  stream: the same with (h0, c0) given, as one step of a served model.
    cells: a Python loop over T of L stacked LSTMCells.  packed: module(PackedSequence) with `ragged` lengths.
    The targets are the min ratio nn.LSTM / fastlstm that the project aims at; None if it has none.
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int = 1
    dtype: str = "float32"
    bidirectional: bool = False
    proj: int = 0
    kind: str = "sequence"
    ragged: str = ""
    target_train: float | None = None
    target_forward: float | None = None

    def __post_init__(self) -> None:
        if min(self.T, self.B, self.I, self.H, self.L) < 1:
            raise ValueError(f"sizes must be at least 1, got {self}")
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype must be one of {sorted(TORCH_DTYPES)}, got {self.dtype!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if (self.kind == "packed") != (self.ragged in RAGGED):
            raise ValueError(f"packed cases, and no others, need ragged in {sorted(RAGGED)}, got {self.ragged!r}")
        if self.kind == "cells" and (self.bidirectional or self.proj):
            raise ValueError("LSTMCell has neither directions nor projections")
        if not 0 <= self.proj < self.H:
            raise ValueError(f"proj must lie in [0, H={self.H}), got {self.proj}")

    @property
    def D(self) -> int:
        """Directions, 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        """Features of h in one direction: proj, or H without a projection."""
        return self.proj or self.H

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """The name that tables show; unique within a suite."""
        words = [f"T={self.T} B={self.B} I={self.I} H={self.H}"]
        words += [f"L={self.L}"] if self.L > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        words += [f"proj={self.proj}"] if self.proj else []
        words += (
            [{"stream": "streaming", "cells": "LSTMCell loop"}[self.kind]] if self.kind in ("stream", "cells") else []
        )
        words += [f"packed ({self.ragged})"] if self.kind == "packed" else []
        words += [self.dtype] if self.dtype != "float32" else []
        return " ".join(words)

    def target(self, mode: str) -> float | None:
        return self.target_train if mode == "train" else self.target_forward

    def lengths(self) -> torch.Tensor | None:
        """[B] int64 lengths of a packed case, the longest set to T; None for other cases."""
        if self.kind != "packed":
            return None
        u = torch.rand(self.B, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        lengths = RAGGED[self.ragged](self.T, u).long().clamp_(1, self.T)
        lengths[lengths.argmax()] = self.T
        return lengths

    @property
    def rows(self) -> int:
        """Input rows without padding: T * B, or the sum of the lengths."""
        lengths = self.lengths()
        return self.T * self.B if lengths is None else int(lengths.sum())

    def flops(self, mode: str) -> int:
        """Floating point operations of the matrix products.

        Forward, per layer and direction: 2 * 4H * (I_l + P) per row, and 2 * H * P more with a projection, where I_l
        is the layer's own input size (I, then D * P). Training is three times that: backward multiplies each matrix
        twice, once for the gradient of what it multiplied and once for its own. The cell's elementwise work is not
        counted.
        """
        forward = 0
        for layer in range(self.L):
            inputs = self.I if layer == 0 else self.D * self.P
            forward += self.D * self.rows * (8 * self.H * (inputs + self.P) + (2 * self.H * self.P if self.proj else 0))
        return forward * (3 if mode == "train" else 1)

    def shortened(self, budget: float) -> Case:
        """The case with T cut so that its training flops stay within `budget`, and T within 1000 steps.

        For the accuracy gate, whose float64 reference would otherwise run for minutes.
        """
        per_step = self.flops("train") / self.T
        return replace(self, T=max(1, min(self.T, 1000, int(budget / per_step))))


def _table(targets: tuple[float, float], *cases: Case) -> list[Case]:
    return [replace(case, target_train=targets[0], target_forward=targets[1]) for case in cases]


CPU: list[Case] = [
    *_table((8, 8), Case(10, 1, 1, 100), Case(20, 8, 10, 32, 2), Case(5, 20, 1, 16)),
    *_table((8, 12), Case(1, 1, 64, 64, kind="stream")),
    *_table((4, 4), Case(999, 97, 1, 51, 2, dtype="float64"), Case(999, 97, 1, 51, 2, dtype="float64", kind="cells")),
    *_table((2, 1.3), Case(200, 64, 50, 100, 2), Case(50, 32, 256, 256, 2, bidirectional=True)),
    *_table((1.7, 1.2), Case(100, 32, 128, 128)),
    *_table((1.3, 1.1), Case(100, 64, 512, 512), Case(100, 16, 1024, 1024), Case(35, 20, 650, 650, 2)),
    *_table((8, 8), Case(500, 16, 64, 64, kind="packed", ragged="random")),
    *_table((3, 3), Case(100, 32, 256, 256, proj=64)),
    *_table((2, 2), Case(100, 32, 256, 256, dtype="bfloat16")),
]

# One small case of each kind: takes seconds, for development and for regression tracking with pytest-benchmark.
QUICK: list[Case] = [
    Case(10, 1, 1, 100),
    Case(1, 1, 64, 64, kind="stream"),
    Case(50, 8, 16, 32, 2, dtype="float64"),
    Case(20, 8, 16, 32, 2, kind="cells"),
    Case(60, 8, 32, 32, kind="packed", ragged="random"),
    Case(20, 16, 64, 64, bidirectional=True),
    Case(50, 32, 128, 128),
]
