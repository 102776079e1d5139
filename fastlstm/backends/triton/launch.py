"""The two ops of the `triton` backend: buffers, the GEMMs outside the time loop, and the launches within it."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.schema import (
    LayerInputs,
    LayerShape,
    backward_outputs,
    forward_outputs,
    lacks_output,
    split_weights,
    wants_dgates,
)
from ...ops.steps import output_again
from . import resident, tiled
from .plan import Row, Tiles, alignment, choose


def forward(inputs: LayerInputs, keep_cells: bool, keep_reserve: bool) -> tuple[Tensor, ...]:
    """Kernel of fastlstm::triton_layer (fastlstm/ops/schema.py)."""
    x, h0, c0, weights, *_ = inputs
    s = LayerShape.of(weights)
    T, B = x.shape[:2]
    y, h_n, c_n, cells, reserve = forward_outputs(inputs, keep_cells, keep_reserve)
    if B == 0:
        return y, h_n, c_n, cells, reserve
    gates = reserve if keep_reserve else x.new_empty(s.D, T, B, 4 * s.H)
    rows = x.flatten(0, 1)
    for d, w in enumerate(split_weights(weights)):
        out = gates[d].view(T * B, 4 * s.H)
        _multiply(out, rows, w.ih.t(), None if w.bias_ih is None or w.bias_hh is None else w.bias_ih + w.bias_hh)
    layer = _Layer(inputs)
    c_out = cells if keep_cells or keep_reserve else None
    with layer.device_guard():
        if layer.row.kernel == "resident":
            layer.launch_resident(
                resident.layer_resident_fwd,
                layer.row.forward,
                (gates, layer.w_hh, _aligned(h0), _aligned(c0), layer.lengths, layer.reset_mask, y, h_n, c_n, c_out),
                (keep_reserve,),
            )
        else:
            h_state = x.new_empty(2, s.D, B, s.H)
            h_state[0] = 0 if h0 is None else h0
            c_state = _state(c0, x, s)
            layer.launch_tiled(
                (tiled.layer_streamed_fwd, tiled.step_tiled_fwd),
                layer.row.forward,
                (gates, layer.w_hh, h_state, c_state, layer.lengths, layer.reset_mask, y, c_out),
                (keep_reserve,),
                steps=T,
            )
            h_n.copy_(h_state[T % 2])
            c_n.copy_(c_state)
    return y, h_n, c_n, cells, reserve


def backward(grads, inputs, y, cells, reserve, needs):
    """Kernel of fastlstm::triton_layer_backward."""
    x, c0, (dy, dh_n, dc_n, dcells) = inputs.x, inputs.c0, grads
    s = LayerShape.of(inputs.weights)
    T, B = x.shape[:2]
    dx, dh0, dc0, dweights = backward_outputs(inputs, needs)
    if lacks_output(y):
        y = output_again(inputs, reserve, cells)
    dgates = torch.empty_like(reserve)
    if B > 0:
        layer = _Layer(inputs)
        with layer.device_guard():
            if layer.row.kernel == "resident":
                dh, dc = x.new_empty(s.D, B, s.H), x.new_empty(s.D, B, s.H)
                layer.launch_resident(
                    resident.layer_resident_bwd,
                    layer.row.backward,
                    (
                        *map(_aligned, (dy, dh_n, dc_n, dcells)),
                        *(reserve, cells, _aligned(c0), layer.w_hh, layer.lengths, layer.reset_mask, dgates, dh, dc),
                    ),
                    (),
                )
            else:
                dh, dc = _state(dh_n, x, s), _state(dc_n, x, s)
                layer.launch_tiled(
                    (tiled.layer_streamed_bwd, tiled.step_tiled_bwd),
                    layer.row.backward,
                    (
                        *(_aligned(dy), _aligned(dcells), reserve, cells, _aligned(c0)),
                        *(layer.w_hh, layer.lengths, layer.reset_mask, dgates, dh, dc),
                    ),
                    (),
                    steps=T + 1,
                )
        for grad, state in ((dh0, dh), (dc0, dc)):
            if grad.numel():
                grad.copy_(state)
    _weight_gradients(dx, dweights, dgates, inputs, y, needs)
    return dx, dh0, dc0, dweights


def _weight_gradients(dx, dweights, dgates, inputs, y, needs) -> None:
    """Compute dx and the weight gradients from dgates [D, T, B, 4H]: one GEMM or sum each, over all T*B rows."""
    x, lengths, s = inputs.x, inputs.lengths, LayerShape.of(inputs.weights)
    T, B, n = *x.shape[:2], s.per_direction
    valid = None if lengths is None else torch.arange(T, device=x.device)[:, None] < lengths  # [T, B]
    for d, w in enumerate(split_weights(inputs.weights)):
        rows = dgates[d].view(T * B, 4 * s.H)
        need, dw = needs[3 + d * n :], dweights[d * n : (d + 1) * n]
        if needs[0]:
            flat = dx.flatten(0, 1)
            if wants_dgates(inputs, needs):
                flat.unflatten(1, (s.D, -1))[:, d] = rows
            else:
                _multiply(flat, rows, w.ih, flat if d else None)
        if need[0]:
            # Padding may hold NaN, and 0 * NaN is NaN.
            valid_x = x if valid is None else x.masked_fill(~valid[..., None], 0)
            _multiply(dw[0], rows.t(), valid_x.flatten(0, 1))
        if need[1]:
            h_prev = _previous_states(y[..., d * s.H : (d + 1) * s.H], inputs.h0, d, valid, inputs.reset_mask)
            _multiply(dw[1], rows.t(), h_prev.flatten(0, 1))
        if s.bias and (need[2] or need[3]):
            db = _column_sums(rows)
            for k in (2, 3):
                if need[k]:
                    dw[k].copy_(db)


def _column_sums(rows: Tensor, run_rows: int = 128) -> Tensor:
    """Return [m] in fp32 from [n, m], in runs: one torch.sum takes 128 MiB of scratch memory on CUDA."""
    runs = len(rows) // run_rows
    if runs < 2:
        return rows.sum(0, dtype=torch.float32)
    sums = rows[: runs * run_rows].unflatten(0, (runs, run_rows)).sum(1, dtype=torch.float32).sum(0)
    return sums.add_(rows[runs * run_rows :].sum(0, dtype=torch.float32))


def _multiply(out: Tensor, a: Tensor, b: Tensor, plus: Tensor | None = None) -> None:
    """Compute out = a b + plus by torch; plus: a vector, or out itself."""
    if _widened(out):
        product = torch.mm(a.double(), b.double())
        out.copy_(product if plus is None else product.add_(plus))
    elif plus is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(plus, a, b, out=out)


def _previous_states(y: Tensor, h0: Tensor | None, d: int, valid: Tensor | None, reset_mask: Tensor | None) -> Tensor:
    """Return h_prev [T, B, H] of direction d; rows without the step may hold any finite value."""
    h = y.new_zeros(1, *y.shape[1:]) if h0 is None else h0[d : d + 1]
    h_prev = torch.cat([y[1:], h] if d else [h, y[:-1]])
    if d and valid is not None and h0 is not None:  # in reverse a row starts at its last step
        starts = valid & torch.cat([~valid[1:], torch.ones_like(valid[:1])])
        h_prev = torch.where(starts[..., None], h, h_prev)
    if reset_mask is not None:
        from_zero = reset_mask
        if d:  # step t starts from zero state where t+1 begins a sequence
            from_zero = reset_mask if valid is None else reset_mask & valid
            from_zero = torch.cat([from_zero[1:], torch.zeros_like(from_zero[:1])])
        h_prev = h_prev.masked_fill(from_zero[..., None], 0)
    return h_prev


class _Layer:
    """Arguments shared by the launches of one op."""

    def __init__(self, inputs: LayerInputs) -> None:
        x, mask = inputs.x, inputs.reset_mask
        self.shape = LayerShape.of(inputs.weights)
        self.T, self.B = x.shape[:2]
        self.device = x.device
        hidden = [w.hh for w in split_weights(inputs.weights)]
        self.w_hh = torch.stack(hidden) if len(hidden) > 1 else _aligned(hidden[0])  # [D, 4H, H]
        self.lengths = _aligned(inputs.lengths)
        self.reset_mask = None if mask is None else _aligned(mask.contiguous().view(torch.uint8))
        self.target, shared = _target(x.device)
        self.precision = "tf32" if x.dtype == torch.float32 and self.target == "cuda" and _tf32() else "ieee"
        kind = self.precision if x.dtype == torch.float32 else "half"
        self.row: Row = choose(self.target, kind, self.shape.H, shared)

    def device_guard(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.device.type == "cpu" else torch.get_device_module(self.device).device(self.device)

    def _options(self, tiles: Tiles) -> dict[str, int | bool]:
        # FMAs as in every other backend; Triton 3.10 turns them off by default, and 3.9 warns that it will.
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
        if tiles.registers is not None and self.target == "cuda":
            options["maxnreg"] = tiles.registers
        return options

    def launch_resident(self, kernel: Any, tiles: Tiles, tensors: tuple[Any, ...], flags: tuple[bool, ...]) -> None:
        """Run all steps in one launch. flags: the kernel's arguments between D and BLOCK_B."""
        s = self.shape
        block_h = max(16, triton.next_power_of_2(s.H))  # 16: the smallest K of matrix units
        grid = (triton.cdiv(self.B, tiles.block_b), s.D, 1)
        args = (*tensors, self.T, self.B, s.H, s.D, *flags, tiles.block_b, block_h, self.precision)
        kernel[grid](*args, **self._options(tiles))

    def launch_tiled(
        self, kernels: tuple[Any, Any], tiles: Tiles, tensors: tuple[Any, ...], flags: tuple[bool, ...], steps: int
    ) -> None:
        """The kernel that loops over time itself, or the one for a step, `steps` times."""
        s, align = self.shape, alignment(self.shape.H)
        tiles = tiles.fitted(align)
        sizes = (self.T, self.B, s.H // align, align, s.D, *flags)
        sizes += (tiles.block_b, tiles.block_n, tiles.block_k, self.precision)
        batch = triton.cdiv(self.B, tiles.block_b)
        if self.row.kernel == "streamed":
            kernels[0][batch, s.D, 1](*tensors, *sizes, **self._options(tiles))
            return
        kernel, grid = kernels[1], (triton.cdiv(s.H, tiles.block_n) * batch, s.D, 1)
        compiled = kernel[grid](*tensors, 0, *sizes, **self._options(tiles))
        # Bypass Triton's lookups of the compiled kernel and of the stream, most of a launch's host time. The
        # interpreter has neither.
        if compiled is None:
            run = functools.partial(kernel[grid], **self._options(tiles))
        else:
            active = triton.runtime.driver.active
            run = functools.partial(compiled[grid], stream=active.get_current_stream(active.get_current_device()))
        for step in range(1, steps):
            run(*tensors, step, *sizes)


def _aligned(t: Tensor | None) -> Tensor | None:
    """Return t contiguous and aligned to 16 bytes: kernels are compiled once, for such pointers."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _state(initial: Tensor | None, x: Tensor, s: LayerShape) -> Tensor:
    """Return a new buffer [D, B, H] in fp32 with the values of `initial`, or zeros."""
    if initial is None:
        return x.new_zeros(s.D, x.shape[1], s.H, dtype=torch.float32)
    return x.new_empty(s.D, x.shape[1], s.H, dtype=torch.float32).copy_(initial)


def _widened(out: Tensor) -> bool:
    """Return True if torch would use TF32 where nn.LSTM does not; the GEMMs then run in float64.

    torch's precision is a setting of the process, which would change other threads' GEMMs.
    """
    return out.dtype == torch.float32 and out.is_cuda and _matmul_tf32() and not _tf32()


def _tf32() -> bool:
    """Return True if nn.LSTM would multiply float32 in TF32 (docs/numerics.md; csrc/cuda/products.cpp)."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32" if torch.backends.cudnn.enabled else _matmul_tf32()


def _matmul_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def _target(device: torch.device) -> tuple[str, int]:
    """Return the kind of device ("hip": AMD, "cpu": interpreter) and the KiB of shared memory per thread block."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        return "hip" if torch.version.hip else "cuda", shared // 1024
    return device.type, 227 if device.type == "cpu" else 64
