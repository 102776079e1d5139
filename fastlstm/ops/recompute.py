"""A layer that keeps h and c at intervals instead of the gates of every step: `fastlstm::recomputed_layer`.

Forward runs segments of `interval` steps with the backend's own op and keeps the states between them. Backward goes
through the segments from last to first, runs each one forward once more, and then back. Between the two passes each
direction holds T/interval * B * (P + H) numbers instead of T * B * (4H + H + P); the price is a second forward pass.

The arguments are those of fastlstm/ops/schema.py after the backend's name and the interval. `keep_states` is to the
states what keep_reserve is there to the reserve: where they are not wanted, forward is the backend's own op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import saved
from .check import check, check_gradients, check_range, check_tensor
from .register import LIBRARY, differentiable, differentiable_backward, needs_differentiable_backward, without_autocast
from .schema import (
    GRADIENTS,
    INPUTS,
    MASKS,
    LayerInputs,
    LayerShape,
    OutputGradients,
    arguments,
    backward_outputs,
    bundled,
    wanted_gradients,
)

# Steps between kept states where the user names no number. At T = 4096 they are less than a hundredth of what else
# would be kept. Each interval packs the weights again and adds to their gradients: 128 steps take 3 % longer.
INTERVAL = 256

_FORWARD = (
    f"(str backend, SymInt interval, {INPUTS}, bool keep_cells, bool keep_states, {MASKS}) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor h_at, Tensor c_at)"
)
_BACKWARD = (
    f"(str backend, SymInt interval, {GRADIENTS}, {INPUTS}, Tensor h_at, Tensor c_at, bool[] needs, {MASKS}) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)


@dataclass(frozen=True)
class _Segment:
    """Steps start .. end of one direction as the op's forward direction sees them: reverse ones run backwards."""

    k: int
    start: int
    end: int
    lengths: Tensor | None  # [B] within the segment
    order: Tensor | None  # [steps, B] the step of the segment that takes each place, where rows have lengths
    reverse: bool

    def turned(self, t: Tensor) -> Tensor:
        """Steps [steps, B, ...] from the order of time to the order of running, or back."""
        if not self.reverse:
            return t
        if self.order is None:
            return t.flip(0)
        return t.gather(0, self.order.view(*self.order.shape, *[1] * (t.dim() - 2)).expand_as(t))

    def of(self, t: Tensor | None) -> Tensor | None:
        """This segment of [T, B, ...], in the order of running."""
        return None if t is None else self.turned(t[self.start : self.end])

    def inputs(self, own: LayerInputs, h: Tensor, c: Tensor) -> LayerInputs:
        """This segment of `_of_direction`, from the states h and c."""
        x, reset_mask = self.turned(own.x[self.start : self.end]), self.of(own.reset_mask)
        masks = [None if mask is None else self.turned(mask[0, self.start : self.end])[None] for mask in own.masks]
        return LayerInputs(x, h, c, own.weights, self.lengths, reset_mask, *masks)


def _segments(T: int, interval: int, lengths: Tensor | None, reverse: bool) -> Iterator[_Segment]:
    """In the order of running."""
    starts = range(0, T, interval)
    for start in reversed(starts) if reverse else starts:
        end = min(start + interval, T)
        own = order = None
        if lengths is not None:
            own = (lengths - start).clamp(0, end - start)
            if reverse:
                step = torch.arange(end - start, device=lengths.device)[:, None]
                order = torch.where(step < own, own - 1 - step, step)
        yield _Segment(start // interval, start, end, own, order, reverse)


def _begins(lengths: Tensor | None, reset_mask: Tensor | None, reverse: bool) -> Tensor | None:
    """[T, B] the steps that this direction starts from zero state: in reverse the one before a flagged step."""
    if reset_mask is None or not reverse:
        return reset_mask
    begins = torch.cat([reset_mask[1:], torch.zeros_like(reset_mask[:1])])
    if lengths is not None:
        begins = begins & (torch.arange(1, len(begins) + 1, device=lengths.device)[:, None] < lengths)
    return begins


def _state(x: Tensor, given: Tensor | None, d: int, features: int) -> Tensor:
    return x.new_zeros(1, x.shape[1], features) if given is None else given[d : d + 1]


def _of_direction(inputs: LayerInputs, d: int) -> LayerInputs:
    """What direction d computes from, its steps in the order of time; `_Segment.inputs` replaces the states."""
    n = LayerShape.of(inputs.weights).per_direction
    begins = _begins(inputs.lengths, inputs.reset_mask, reverse=d == 1)
    masks = [None if mask is None else mask[d : d + 1] for mask in inputs.masks]
    return LayerInputs(inputs.x, None, None, inputs.weights[d * n : (d + 1) * n], inputs.lengths, begins, *masks)


def _initial(states: Tensor) -> Tensor:
    """h0 or c0 [D, B, .] from the states [D, intervals, B, .] that enter each segment."""
    return torch.stack([of_direction[-d] for d, of_direction in enumerate(states)])


def _parts(T: int, interval: int) -> int:
    return (T + interval - 1) // interval


def _check_forward(interval: int, inputs: LayerInputs) -> None:
    check(inputs)
    if interval < 1:
        raise RuntimeError(f"interval must be at least 1, got {interval}")


def _check_backward(
    interval: int, grads: OutputGradients, inputs: LayerInputs, h_at: Tensor, c_at: Tensor, needs: list[bool]
) -> None:
    _check_forward(interval, inputs)
    check_gradients(grads, inputs, needs)
    x, s = inputs.x, LayerShape.of(inputs.weights)
    parts, B = _parts(x.shape[0], interval), x.shape[1]
    check_tensor("h_at", "[D, intervals, B, P]", h_at, (s.D, parts, B, s.P), x.dtype, x.device)
    check_tensor("c_at", "[D, intervals, B, H]", c_at, (s.D, parts, B, s.H), x.dtype, x.device)


def _forward(*args):
    (backend, interval), inputs, (keep_cells, keep_states) = bundled(args, 2, 2)
    _check_forward(interval, inputs)
    x, T = inputs.x, inputs.x.shape[0]
    check_range(inputs.lengths, T)
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    if not keep_states:
        y, h_n, c_n, cells, _ = op(*arguments(inputs, keep_cells, False))
        return y, h_n, c_n, cells, x.new_empty(0), x.new_empty(0)
    s = LayerShape.of(inputs.weights)
    y, h_n, c_n, cells, h_at, c_at = _outputs(inputs, interval, keep_cells, keep_states)
    for d in range(s.D):
        own = _of_direction(inputs, d)
        h, c = _state(x, inputs.h0, d, s.P), _state(x, inputs.c0, d, s.H)
        for part in _segments(T, interval, inputs.lengths, reverse=d == 1):
            h_at[d, part.k], c_at[d, part.k] = h[0], c[0]
            y_part, h, c, cells_part, _ = op(*arguments(part.inputs(own, h, c), keep_cells, False))
            y[part.start : part.end, :, d * s.P : (d + 1) * s.P] = part.turned(y_part)
            if keep_cells:
                cells[part.start : part.end, :, d * s.H : (d + 1) * s.H] = part.turned(cells_part)
        h_n[d], c_n[d] = h[0], c[0]
    return y, h_n, c_n, cells, h_at, c_at


def _outputs(inputs: LayerInputs, interval: int, keep_cells: bool, keep_states: bool) -> tuple[Tensor, ...]:
    x, s = inputs.x, LayerShape.of(inputs.weights)
    T, B = x.shape[:2]
    parts = _parts(T, interval)
    return (
        x.new_empty(T, B, s.D * s.P),
        x.new_empty(s.D, B, s.P),
        x.new_empty(s.D, B, s.H),
        x.new_empty((T, B, s.D * s.H) if keep_cells else (0,)),
        x.new_empty((s.D, parts, B, s.P) if keep_states else (0,)),  # the states that enter each segment
        x.new_empty((s.D, parts, B, s.H) if keep_states else (0,)),
    )


def _backward(*args):
    (backend, interval, *grads), inputs, (h_at, c_at, needs) = bundled(args, 3, 6)
    _check_backward(interval, grads, inputs, h_at, c_at, needs)
    x, T, (dy, dh_n, dc_n, dcells) = inputs.x, inputs.x.shape[0], grads
    check_range(inputs.lengths, T)
    forward = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    backward = getattr(torch.ops.fastlstm, f"{backend}_layer_backward").default
    s = LayerShape.of(inputs.weights)
    n = s.per_direction
    # Sums over segments are taken in float32 at least.
    total = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_zeros(x.shape, dtype=total if s.D == 2 else x.dtype) if needs[0] else x.new_empty(0)
    dh0, dc0, dweights = [], [], []
    for d in range(s.D):
        own, wanted = _of_direction(inputs, d), needs[3 + d * n : 3 + (d + 1) * n]
        sums = [w.new_zeros(w.shape if want else 0, dtype=total) for w, want in zip(own.weights, wanted, strict=True)]
        dh, dc = _state(x, dh_n, d, s.P), _state(x, dc_n, d, s.H)
        dy_d = None if dy is None else dy[..., d * s.P : (d + 1) * s.P]
        dcells_d = None if dcells is None else dcells[..., d * s.H : (d + 1) * s.H]
        for part in reversed(list(_segments(T, interval, inputs.lengths, reverse=d == 1))):
            given = part.inputs(own, h_at[d, part.k][None], c_at[d, part.k][None])
            y, _, _, cells, reserve = forward(*arguments(given, False, True))
            dx_part, dh, dc, dw = backward(
                part.of(dy_d), dh, dc, part.of(dcells_d),
                *arguments(given, y, cells, reserve, [needs[0], True, True, *wanted]),
            )  # fmt: skip
            if needs[0]:
                dx[part.start : part.end] += part.turned(dx_part)
            for found, grad, want in zip(sums, dw, wanted, strict=True):
                if want:
                    found += grad
        dh0.append(dh)
        dc0.append(dc)
        dweights += [found.to(x.dtype) for found in sums]
    return (
        dx.to(x.dtype),
        torch.cat(dh0) if needs[1] else x.new_empty(0),
        torch.cat(dc0) if needs[2] else x.new_empty(0),
        dweights,
    )


def _fake_forward(*args):
    (_, interval), inputs, (keep_cells, keep_states) = bundled(args, 2, 2)
    _check_forward(interval, inputs)
    return _outputs(inputs, interval, keep_cells, keep_states)


def _fake_backward(*args):
    (_, interval, *grads), inputs, (h_at, c_at, needs) = bundled(args, 3, 6)
    _check_backward(interval, grads, inputs, h_at, c_at, needs)
    return backward_outputs(inputs, needs)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, backend, interval, keep_cells, keep_states, *flat):
        inputs = LayerInputs.from_flat(flat)
        results = call(backend, interval, *arguments(inputs, keep_cells, keep_states))
        *_, cells, h_at, c_at = results
        ctx.backend, ctx.interval = backend, interval
        # Backward runs forward again, from copies of h0 and c0.
        traced = saved.traced(inputs.x)
        saved.save(ctx, inputs, [True, traced, traced, *[True] * len(inputs.weights)], h_at, c_at)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([h_at, c_at] if keep_cells else [cells, h_at, c_at]))
        return results

    @staticmethod
    def backward(ctx, *grads):
        grads = grads[:4]
        needs = LayerInputs.from_flat(ctx.needs_input_grad[5:]).differentiable
        inputs, (h_at, c_at) = saved.restore(ctx)
        if needs_differentiable_backward(*grads):
            tensors = saved.connected(ctx, inputs).differentiable
            for k, states in ((1, h_at), (2, c_at)):
                if ctx.unread_sizes[k] is not None:
                    tensors[k] = tensors[k] + _initial(states)
            found = differentiable_backward(grads, inputs.with_differentiable(tensors), needs)
        else:
            op = torch.ops.fastlstm.recomputed_layer_backward.default
            found = op(ctx.backend, ctx.interval, *grads, *arguments(inputs, h_at, c_at, needs))
        return (*[None] * 5, *wanted_gradients(needs, *found))


for _name, _schema, _kernel, _fake in (
    ("recomputed_layer", _FORWARD, _forward, _fake_forward),
    ("recomputed_layer_backward", _BACKWARD, _backward, _fake_backward),
):
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlstm::{_name}", _fake, lib=LIBRARY)
differentiable("recomputed_layer", _Node)
