"""The GPU suite: its cases, one precision for all implementations, and nn.LSTM's cuDNN algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.cases import Case

DTYPES = ("bfloat16", "float16", "tf32", "float32")
TS = (64, 512, 1024)
BS = (1, 16, 64, 128, 256)
HS = (128, 256, 512, 768, 1024, 2048)
# Target ratios: in general, and for cases that cuDNN does not accelerate.
TARGET, TARGET_SLOW_BASELINE = 0.7, 3.0


def cases() -> list[Case]:
    """The whole grid for one layer; two layers, both directions, packed and LSTMCell at one T and B for every H."""
    targets = {"target_train": TARGET, "target_forward": TARGET}
    slow = {"target_train": TARGET_SLOW_BASELINE, "target_forward": TARGET_SLOW_BASELINE}
    grid = []
    for dtype in DTYPES:
        grid += [Case(T, B, H, H, dtype=dtype, **targets) for H in HS for B in BS for T in TS]
        for H in HS:
            grid += [
                Case(512, 64, H, H, 2, dtype=dtype, **targets),
                Case(512, 64, H, H, dtype=dtype, bidirectional=True, **targets),
                Case(512, 64, H, H, dtype=dtype, kind="packed", ragged="random", **slow),
                Case(64, 64, H, H, dtype=dtype, kind="cells", **slow),
            ]
    return grid


def points() -> list[Case]:
    """A few minutes of the suite: sizes of docs/gpu-kernels.md, "Time per step", short sequences, large batches."""
    selected = [
        Case(512, B, H, H, dtype=dtype)
        for dtype in ("float16", "bfloat16")
        for H, B in ((128, 16), (512, 64), (768, 16), (1024, 16), (1024, 64), (2048, 64))
    ]
    selected += [Case(T, 64, H, H, dtype="bfloat16") for H in (128, 512) for T in (4, 8, 16, 32)]
    selected += [Case(64, B, H, H, dtype="bfloat16") for H in (512, 1024) for B in (256, 1024, 4096)]
    return [*selected, Case(512, 64, 512, 512, dtype="tf32"), Case(512, 64, 1024, 1024, dtype="tf32")]


def unavailable_reason() -> str | None:
    """Return None if the suite can run here, otherwise the reason, for the user."""
    if not torch.cuda.is_available():
        return "the gpu suite needs a CUDA device and a CUDA build of torch; " + (
            f"this torch is {torch.__version__}" if torch.version.cuda is None else "torch.cuda finds no device"
        )
    return None


@contextmanager
def precision(case: Case) -> Iterator[None]:
    """Set TF32 for "tf32" cases and IEEE for others, in cuDNN's RNN and in GEMMs, for all implementations."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision
    rnn.fp32_precision = matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision, matmul.fp32_precision = before


def cudnn_algorithm(case: Case, mode: str, version: int | None = None) -> str:
    """The algorithm of nn.LSTM on CUDA by the rules of ATen's cudnn/RNN.cpp; not observed.

    `version` is cuDNN's as torch.backends.cudnn.version() gives it (9.13.0 is 91300), by default this torch's.
    """
    version = torch.backends.cudnn.version() if version is None else version
    if case.kind == "cells":
        return "ATen fused cell"  # nn.LSTMCell never reaches cuDNN
    if version is None:
        return "ATen"
    if case.dtype == "bfloat16" and version < 91300:
        return "ATen"
    algorithm = "STANDARD"
    if case.proj == 0 and case.kind != "packed":
        max_hidden = 192 if mode == "forward" else 128
        hidden = case.H
        # ATen requests the same algorithm in bfloat16, but cuDNN 9.19 took 18 to 21 us per step on an H100, as in
        # STANDARD, where float16 took 1.6 (benchmarks/results/nvidia-h100-80gb-hbm3/gpu.csv, tiers.csv).
        if hidden <= max_hidden and case.dtype not in ("float64", "bfloat16"):
            algorithm = "PERSIST_STATIC_SMALL_H"
        elif (
            case.dtype == "float16"
            and (case.L, case.D) == (1, 1)
            and hidden <= 1024
            and hidden % 128 == 0
            and case.I % 128 == 0
            and case.B % 8 == 0
            and case.B <= 128
        ):
            algorithm = "PERSIST_STATIC"
    return f"cuDNN {algorithm}"
