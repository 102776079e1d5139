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
from .register import LIBRARY, differentiable, differentiable_backward, needs_differentiable_backward, without_autocast
from .schema import LayerShape, backward_outputs, check, check_gradients, check_range, check_tensor

# Steps between kept states where the user names no number. At T = 4096 they are less than a hundredth of what else
# would be kept. Each interval packs the weights again and adds to their gradients: 128 steps take 3 % longer.
INTERVAL = 256

_FORWARD = (
    "(str backend, SymInt interval, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, "
    "Tensor? reset_mask, bool keep_cells, bool keep_states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor h_at, Tensor c_at)"
)
_BACKWARD = (
    "(str backend, SymInt interval, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, "
    "Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? reset_mask, Tensor h_at, Tensor c_at, bool[] needs) "
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


def _initial(states: Tensor) -> Tensor:
    """h0 or c0 [D, B, .] from the states [D, intervals, B, .] that enter each segment."""
    return torch.stack([of_direction[-d] for d, of_direction in enumerate(states)])


def _parts(T: int, interval: int) -> int:
    return (T + interval - 1) // interval


def _check_forward(interval, x, h0, c0, weights, lengths, reset_mask):
    check(x, h0, c0, weights, lengths, reset_mask)
    if interval < 1:
        raise RuntimeError(f"interval must be at least 1, got {interval}")


def _check_backward(interval, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, h_at, c_at, needs):
    _check_forward(interval, x, h0, c0, weights, lengths, reset_mask)
    check_gradients(dy, dh_n, dc_n, dcells, x, weights, lengths, needs)
    s, parts, B = LayerShape.of(weights), _parts(x.shape[0], interval), x.shape[1]
    check_tensor("h_at", "[D, intervals, B, P]", h_at, (s.D, parts, B, s.P), x.dtype, x.device)
    check_tensor("c_at", "[D, intervals, B, H]", c_at, (s.D, parts, B, s.H), x.dtype, x.device)


def _forward(backend, interval, x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_states):
    _check_forward(interval, x, h0, c0, weights, lengths, reset_mask)
    check_range(lengths, x.shape[0])
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    if not keep_states:
        y, h_n, c_n, cells, _ = op(x, h0, c0, weights, lengths, reset_mask, keep_cells, False)
        return y, h_n, c_n, cells, x.new_empty(0), x.new_empty(0)
    s = LayerShape.of(weights)
    y, h_n, c_n, cells, h_at, c_at = _outputs(x, interval, weights, keep_cells, keep_states)
    for d in range(s.D):
        own = weights[d * s.per_direction : (d + 1) * s.per_direction]
        h, c = _state(x, h0, d, s.P), _state(x, c0, d, s.H)
        begins = _begins(lengths, reset_mask, reverse=d == 1)
        for part in _segments(x.shape[0], interval, lengths, reverse=d == 1):
            h_at[d, part.k], c_at[d, part.k] = h[0], c[0]
            y_part, h, c, cells_part, _ = op(part.of(x), h, c, own, part.lengths, part.of(begins), keep_cells, False)
            y[part.start : part.end, :, d * s.P : (d + 1) * s.P] = part.turned(y_part)
            if keep_cells:
                cells[part.start : part.end, :, d * s.H : (d + 1) * s.H] = part.turned(cells_part)
        h_n[d], c_n[d] = h[0], c[0]
    return y, h_n, c_n, cells, h_at, c_at


def _outputs(
    x: Tensor, interval: int, weights: list[Tensor], keep_cells: bool, keep_states: bool
) -> tuple[Tensor, ...]:
    s = LayerShape.of(weights)
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


def _backward(
    backend, interval, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, h_at, c_at, needs
):  # one argument for each of the schema's
    _check_backward(interval, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, h_at, c_at, needs)
    check_range(lengths, x.shape[0])
    forward = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    backward = getattr(torch.ops.fastlstm, f"{backend}_layer_backward").default
    s, n = LayerShape.of(weights), LayerShape.of(weights).per_direction
    # Sums over segments are taken in float32 at least.
    total = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_zeros(x.shape, dtype=total if s.D == 2 else x.dtype) if needs[0] else x.new_empty(0)
    dh0, dc0, dweights = [], [], []
    for d in range(s.D):
        own, wanted = weights[d * n : (d + 1) * n], needs[3 + d * n : 3 + (d + 1) * n]
        sums = [w.new_zeros(w.shape if want else 0, dtype=total) for w, want in zip(own, wanted, strict=True)]
        dh, dc = _state(x, dh_n, d, s.P), _state(x, dc_n, d, s.H)
        begins = _begins(lengths, reset_mask, reverse=d == 1)
        dy_d = None if dy is None else dy[..., d * s.P : (d + 1) * s.P]
        dcells_d = None if dcells is None else dcells[..., d * s.H : (d + 1) * s.H]
        for part in reversed(list(_segments(x.shape[0], interval, lengths, reverse=d == 1))):
            given = (part.of(x), h_at[d, part.k][None], c_at[d, part.k][None], own, part.lengths, part.of(begins))
            y, _, _, cells, reserve = forward(*given, False, True)
            dx_part, dh, dc, dw = backward(
                part.of(dy_d), dh, dc, part.of(dcells_d), *given, y, cells, reserve, [needs[0], True, True, *wanted]
            )
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


def _fake_forward(backend, interval, x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_states):
    _check_forward(interval, x, h0, c0, weights, lengths, reset_mask)
    return _outputs(x, interval, weights, keep_cells, keep_states)


def _fake_backward(
    backend, interval, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, h_at, c_at, needs
):  # one argument for each of the schema's
    _check_backward(interval, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, h_at, c_at, needs)
    return backward_outputs(x, weights, lengths, needs)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, backend, interval, x, h0, c0, lengths, reset_mask, keep_cells, keep_states, *weights):
        results = call(backend, interval, x, h0, c0, list(weights), lengths, reset_mask, keep_cells, keep_states)
        *_, cells, h_at, c_at = results
        ctx.backend, ctx.interval = backend, interval
        inputs = (x, h0, c0, *weights)
        # Backward runs forward again, from copies of h0 and c0.
        read = [True] * len(inputs) if saved.traced(x) else [k not in (1, 2) for k in range(len(inputs))]
        saved.save(ctx, inputs, read, lengths, reset_mask, h_at, c_at)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([h_at, c_at] if keep_cells else [cells, h_at, c_at]))
        return results

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dcells, *_):
        needs = [*ctx.needs_input_grad[3:6], *ctx.needs_input_grad[10:]]
        inputs, (lengths, reset_mask, h_at, c_at) = saved.restore(ctx, len(needs))
        grads = (dy, dh_n, dc_n, dcells)
        if needs_differentiable_backward(*grads):
            x, h0, c0, *weights = saved.connected(ctx, inputs)
            if ctx.unread_sizes[1] is not None:
                h0 = h0 + _initial(h_at)
            if ctx.unread_sizes[2] is not None:
                c0 = c0 + _initial(c_at)
            dx, dh0, dc0, dw = differentiable_backward(*grads, x, h0, c0, weights, lengths, reset_mask, needs)
        else:
            x, h0, c0, *weights = inputs
            op = torch.ops.fastlstm.recomputed_layer_backward.default
            given = (*grads, x, h0, c0, weights, lengths, reset_mask)
            dx, dh0, dc0, dw = op(ctx.backend, ctx.interval, *given, h_at, c_at, needs)
        found = [g if need else None for g, need in zip([dx, dh0, dc0, *dw], needs, strict=True)]
        return (None, None, None, *found[:3], None, None, None, None, *found[3:])


for _name, _schema, _kernel, _fake in (
    ("recomputed_layer", _FORWARD, _forward, _fake_forward),
    ("recomputed_layer_backward", _BACKWARD, _backward, _fake_backward),
):
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlstm::{_name}", _fake, lib=LIBRARY)
differentiable("recomputed_layer", _Node, keep=9)
