"""The op of frozen layers, `fastlstm::frozen_layer`: one layer whose weights are packed, on CPU, without gradient.

It takes x, h0, c0, lengths and reset_mask as the layer ops do (schema.py), in the place of the weights one tensor of
bytes (csrc/cpu/packed.h), and [H, P, D]; it returns y, h_n, c_n and cells. Its kernels are C++ (csrc/frozen.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .register import LIBRARY

LIBRARY.define(
    "frozen_layer(Tensor x, Tensor? h0, Tensor? c0, Tensor packed, int[] sizes, Tensor? lengths, Tensor? reset_mask, "
    "bool keep_cells) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(
    x: Tensor, h0: Any, c0: Any, packed: Tensor, sizes: list[int], lengths: Any, reset_mask: Any, keep_cells: bool
) -> tuple[Tensor, ...]:
    H, P, D = sizes
    rows = x.shape[:-1]
    B = rows[1] if x.dim() == 3 else lengths.shape[0]
    return (
        x.new_empty(*rows, D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((*rows, D * H) if keep_cells else (0,)),
    )


torch.library.register_fake("fastlstm::frozen_layer", _fake, lib=LIBRARY)
