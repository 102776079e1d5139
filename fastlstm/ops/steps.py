"""What a layer's options mean step by step, in torch's ops: lengths, resets, masks, layer normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import NORM_EPSILON
from .schema import DirectionWeights, LayerInputs, LayerShape, split_weights


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    # fp32 state and accumulation: in bf16 c stops taking in small updates after ~200 steps.
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Steps:
    """What the options mean for one direction.

    valid, fresh, first are [T, B, 1], mask and the shares of zoneout [T, B, n]; None where all is ordinary.
    """

    def __init__(self, inputs: LayerInputs, d: int) -> None:
        T, lengths, reset_mask, reverse = inputs.x.shape[0], inputs.lengths, inputs.reset_mask, d == 1
        of_d = [None if mask is None else mask[d] for mask in inputs.masks]
        dtype = compute_dtype(inputs.x.dtype)
        self.mask, self.share_h, self.share_c = (
            mask if mask is None or mask.dtype == torch.bool else mask.to(dtype) for mask in of_d
        )
        self.reverse = reverse
        self.order = list(reversed(range(T))) if reverse else list(range(T))
        self.valid: Tensor | None = None  # the row has this step
        self.fresh: Tensor | None = None  # the step starts from zero state
        self.first: Tensor | None = None  # the step starts from h0, c0
        if lengths is not None:
            self.valid = (torch.arange(T, device=lengths.device)[:, None] < lengths).unsqueeze(-1)
        if reset_mask is not None:
            fresh = reset_mask.unsqueeze(-1)
            if self.valid is not None:  # a flag in the padding means nothing
                fresh = fresh & self.valid
            if reverse:  # step t-1 starts from zero state where step t is flagged
                fresh = torch.cat([fresh[1:], torch.zeros_like(fresh[:1])])
            self.fresh = fresh
        if self.valid is not None and reverse:
            self.first = self.valid & torch.cat([~self.valid[1:], torch.ones_like(self.valid[:1])])

    def only_valid(self, x: Tensor) -> Tensor:
        """x with zeros for padding, which may hold NaN: 0 * NaN would enter dW_ih."""
        return x if self.valid is None else x.masked_fill(~self.valid, 0)

    def masked(self, h: Tensor, t: int | None = None) -> Tensor:
        """h as it enters W_hh: of step t [B, P], or of all [T, B, P]."""
        return h if self.mask is None else h * (self.mask if t is None else self.mask[t])

    def entering(self, states: Tensor, initial: Tensor) -> Tensor:
        """The state [T, B, n] that enters each valid step, from the state each step left behind."""
        before = torch.cat([states[1:], initial[None]] if self.reverse else [initial[None], states[:-1]])
        if self.first is not None:
            before = torch.where(self.first, initial, before)
        return before if self.fresh is None else before.masked_fill(self.fresh, 0)


class Norm:
    """Layer normalization with gain and bias [n] over the last dimension."""

    def __init__(self, gain: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.gain, self.bias = gain.to(dtype), bias.to(dtype)

    def __call__(self, v: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(v, self.gain.shape, self.gain, self.bias, NORM_EPSILON)

    @staticmethod
    def standard(v: Tensor) -> tuple[Tensor, Tensor]:
        """v with mean 0 and variance 1, and what its distance from the mean was multiplied by."""
        standard, _, scale = torch.native_layer_norm(v, v.shape[-1:], None, None, NORM_EPSILON)
        return standard, scale

    def backward(self, grad: Tensor, standard: Tensor, scale: Tensor) -> Tensor:
        """The gradient of v from that of the result."""
        grad = grad * self.gain
        centred = grad - grad.mean(-1, keepdim=True)
        return scale * (centred - standard * (grad * standard).mean(-1, keepdim=True))


def norms_of(w: DirectionWeights, dtype: torch.dtype) -> tuple[Norm, Norm, Norm] | None:
    """Of W_ih x, of W_hh h and of c."""
    if w.norm is None:
        return None
    ih, hh, c = (Norm(w.norm[k], w.norm[k + 1], dtype) for k in (0, 2, 4))
    return ih, hh, c


def zoned(share: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """The state of which `share` is kept as it was before the step."""
    if share is None:
        return after
    # Flags choose, so that what they leave out may be NaN.
    return torch.where(share, before, after) if share.dtype == torch.bool else torch.lerp(after, before, share)


def initial_state(x: Tensor, state: Tensor | None, d: int, features: int, dtype: torch.dtype) -> Tensor:
    return x.new_zeros(x.shape[1], features, dtype=dtype) if state is None else state[d].to(dtype)


def before_zoneout(gates: Tensor, c: Tensor, c_enter: Tensor, steps: Steps) -> Tensor:
    """The c [T, B, H] that h is computed from: c of every step, or before its zoneout."""
    if steps.share_c is None:
        return c
    i, f, g, _ = gates.chunk(4, dim=-1)
    return f * c_enter + i * g


def output_again(inputs: LayerInputs, reserve: Tensor, cells: Tensor) -> Tensor:
    """y [T, B, D*P] from forward's other results."""
    weights, dtype, directions = inputs.weights, compute_dtype(inputs.x.dtype), []
    shape = LayerShape.of(weights)
    for d, w in enumerate(split_weights(weights)):
        steps, c = Steps(inputs, d), cells[..., d * shape.H : (d + 1) * shape.H].to(dtype)
        c_enter = steps.entering(c, initial_state(inputs.x, inputs.c0, d, shape.H, dtype))
        h_first = initial_state(inputs.x, inputs.h0, d, shape.P, dtype)
        directions.append(output_of_direction(reserve[d].to(dtype), c, c_enter, h_first, w, steps))
    return torch.cat(directions, -1).to(inputs.x.dtype)


def output_of_direction(
    saved: Tensor, c: Tensor, c_enter: Tensor, h: Tensor, w: DirectionWeights, steps: Steps
) -> Tensor:
    """y [T, B, P] from a row of the reserve, c of every step and before it; h [B, P] enters the first step."""
    norms = norms_of(w, saved.dtype)
    gates = saved[..., : 4 * c.shape[-1]]
    c = before_zoneout(gates, c, c_enter, steps)
    y = gates.chunk(4, dim=-1)[3] * (c if norms is None else norms[2](c)).tanh()
    if w.hr is not None:
        y = torch.nn.functional.linear(y, w.hr.to(y.dtype))
    if steps.share_h is not None:
        for t in steps.order:
            if steps.fresh is not None:
                h = h.masked_fill(steps.fresh[t], 0)
            y[t] = zoned(steps.share_h[t], h, y[t])
            h = y[t] if steps.valid is None else torch.where(steps.valid[t], y[t], h)
    return y if steps.valid is None else y.masked_fill(~steps.valid, 0)
