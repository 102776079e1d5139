"""Checks of the arguments of fastlstm/ops/schema.py's ops. csrc/contract.h does the same for the native ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import MASK_KINDS, LayerInputs, LayerShape, OutputGradients, lacks_output, split_weights

# Of a direction's layer normalization, in the order of the weights.
_NORM_NAMES = [
    ("weight_ln_ih", "[4H]"), ("bias_ln_ih", "[4H]"), ("weight_ln_hh", "[4H]"), ("bias_ln_hh", "[4H]"),
    ("weight_ln_c", "[H]"), ("bias_ln_c", "[H]"),
]  # fmt: skip


def check(inputs: LayerInputs, may_be_packed: bool = False) -> None:
    """Raise RuntimeError unless forward's inputs fit together. csrc/contract.h does the same for the native ops."""
    x, h0, c0, weights, lengths, *masks = inputs
    packed = may_be_packed and x.dim() == 2 and lengths is not None and lengths.dim() == 1
    packed = packed and all(mask is None for mask in masks)
    if x.dim() != 3 and not packed:
        raise RuntimeError(f"x must be [T, B, I], got {list(x.shape)}")
    shape = LayerShape.of(weights)
    if shape.D not in (1, 2) or len(weights) != shape.D * shape.per_direction:
        raise RuntimeError(
            f"weights must be {shape.per_direction} tensors for each of 1 or 2 directions, got {len(weights)}"
        )
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for w in weights:
        if w.device != x.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {w.device}"
            )
        if w.dtype != x.dtype:
            raise RuntimeError(f"Input and parameter tensors must have the same dtype, got {x.dtype} and {w.dtype}")
    H, P, D, B, features = shape.H, shape.P, shape.D, inputs.B, x.shape[-1]
    for direction in split_weights(weights):
        check_tensor("weight_ih", "[4H, I]", direction.ih, (4 * H, features))
        check_tensor("weight_hh", "[4H, P]", direction.hh, (4 * H, P))
        check_tensor("bias_ih", "[4H]", direction.bias_ih, (4 * H,))
        check_tensor("bias_hh", "[4H]", direction.bias_hh, (4 * H,))
        for k, vector in enumerate(direction.norm or ()):
            name, sizes, n = (*_NORM_NAMES[k], H if k >= 4 else 4 * H)
            check_tensor(name, sizes, vector, (n,))
        check_tensor("weight_hr", "[P, H]", direction.hr, (P, H))
    check_tensor("h0", "[D, B, P]", h0, (D, B, P), x.dtype, x.device)
    check_tensor("c0", "[D, B, H]", c0, (D, B, H), x.dtype, x.device)
    check_tensor("lengths", "[B]", lengths, (B,), torch.int64, x.device)
    check_tensor("reset_mask", "[T, B]", inputs.reset_mask, x.shape[:-1], torch.bool, x.device)
    for mask, (name, (features_of, may_be_bool)) in zip(inputs.masks, MASK_KINDS.items(), strict=True):
        dtype = torch.bool if may_be_bool and mask is not None and mask.dtype == torch.bool else x.dtype
        expected = (D, *x.shape[:-1], P if features_of == "P" else H)
        check_tensor(name, f"[D, T, B, {features_of}]", mask, expected, dtype, x.device)


def check_range(lengths: Tensor | None, T: int) -> None:
    """Raise ValueError unless lengths on the CPU lie in [0, T]; elsewhere reading them would wait for the device."""
    if lengths is None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    low, high = torch.aminmax(lengths)
    if low < 0 or high > T:
        row = int(lengths.argmin() if low < 0 else lengths.argmax())
        raise ValueError(f"lengths must lie in [0, T={T}], got {int(lengths.flatten()[row])} in row {row}")


def check_backward(
    grads: OutputGradients,
    inputs: LayerInputs,
    y: Tensor,
    cells: Tensor,
    reserve: Tensor,
    needs: list[bool],
    may_be_packed: bool = False,
) -> None:
    """The same for backward's arguments."""
    check(inputs, may_be_packed)
    x, s = inputs.x, LayerShape.of(inputs.weights)
    rows = x.shape[:-1]
    saved = "[D, T, B, 12H]" if s.norm else "[D, T, B, 4H]"
    check_tensor("reserve", saved, reserve, (s.D, *rows, s.reserved), x.dtype, x.device)
    if not lacks_output(y):
        check_tensor("y", "[T, B, D*P]", y, (*rows, s.D * s.P), x.dtype, x.device)
    check_tensor("cells", "[T, B, D*H]", cells, (*rows, s.D * s.H), x.dtype, x.device)
    check_gradients(grads, inputs, needs[:-1] if len(needs) == 4 + len(inputs.weights) else needs)  # wants_dgates


def check_gradients(grads: OutputGradients, inputs: LayerInputs, needs: list[bool]) -> None:
    """Raise RuntimeError unless the gradients that arrive, and `needs`, fit inputs that `check` has passed."""
    x, s, B = inputs.x, LayerShape.of(inputs.weights), inputs.B
    rows = x.shape[:-1]
    dy, dh_n, dc_n, dcells = grads
    check_tensor("dy", "[T, B, D*P]", dy, (*rows, s.D * s.P), x.dtype, x.device)
    check_tensor("dh_n", "[D, B, P]", dh_n, (s.D, B, s.P), x.dtype, x.device)
    check_tensor("dc_n", "[D, B, H]", dc_n, (s.D, B, s.H), x.dtype, x.device)
    check_tensor("dcells", "[T, B, D*H]", dcells, (*rows, s.D * s.H), x.dtype, x.device)
    if len(needs) != 3 + len(inputs.weights):
        n = 3 + len(inputs.weights)
        raise RuntimeError(f"needs must have {n} or {n + 1} flags, got {len(needs)}")


def check_tensor(
    name: str,
    sizes: str,
    tensor: Tensor | None,
    expected: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    if tensor is None:
        return
    if tensor.shape != expected:
        raise RuntimeError(f"{name} must be {sizes} = {list(expected)}, got {list(tensor.shape)}")
    if (dtype and tensor.dtype != dtype) or (device and tensor.device != device):
        raise RuntimeError(f"{name} must be {dtype} on {device}, got {tensor.dtype} on {tensor.device}")
