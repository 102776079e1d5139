"""Weights of a frozen layer as no machine's kernels read them: what state_dict and pickles hold, and `pack` takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import native


class Portable(NamedTuple):
    """A layer's weights as no machine's kernels read them, in the order of ops/schema.py.

    Attributes:
        weights: matrices of the module's dtype, bfloat16 or int8; biases of the module's dtype.
        scales: of int8 matrices, one [rows] float32 for each: a row is its integers times its scale.
    """

    weights: list[Tensor]
    scales: list[Tensor]


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(integers in [-127, 127] as int8 [rows, K], scales [rows] float32) of a matrix, symmetric, by row."""
    scale = weight.abs().amax(1).float() / 127 if weight.shape[1] else weight.new_zeros(len(weight)).float()
    rows = weight.float() / scale.where(scale != 0, 1)[:, None]
    return rows.round().clamp(-127, 127).to(torch.int8), scale  # clamp: a denormal scale is far from weight / 127


def is_int8(value: Any) -> bool:
    """Return True for an int8 matrix of a state_dict."""
    return isinstance(value, Tensor) and value.dtype == torch.int8 and value.dim() == 2


def in_form(weights: list[Tensor], form: str) -> Portable:
    """Float weights as the form has them."""
    if form == "stored":
        return Portable([w.detach() for w in weights], [])
    if form == "bfloat16":
        return Portable([w.detach().bfloat16() if w.dim() == 2 else w.detach() for w in weights], [])
    pairs = [quantized(w.detach()) if w.dim() == 2 else (w.detach(), None) for w in weights]
    return Portable([w for w, _ in pairs], [scale for _, scale in pairs if scale is not None])


def as_float(portable: Portable, dtype: torch.dtype) -> list[Tensor]:
    """The weights of a trainable module."""
    scales = iter(portable.scales)
    return [w.to(dtype) * next(scales)[:, None] if w.dtype == torch.int8 else w.to(dtype) for w in portable.weights]


def pack(dtype: torch.dtype, form: str, portable: Portable) -> Tensor:
    return native.extension.pack_layer(dtype, form, *portable)  # type: ignore[union-attr]
