"""The `eager` backend: explicit forward and backward of a layer in PyTorch ops, for any device. Always there.

One input GEMM for all steps before the loop and one GEMM each for dx, dW_ih, dW_hh and dW_hr after it, with no
autograd graph per step. Backward, from the gradients of h_t and c_t (gates' pre-activations a, activated i, f, g, o):
  dc += dh * o * (1 - tanh(c)^2)
  da_i = dc g i(1-i)    da_f = dc c_{t-1} f(1-f)    da_g = dc i (1-g^2)    da_o = dh tanh(c) o(1-o)
  dh_{t-1} = da W_hh    dc_{t-1} = dc f
(tests/ops/test_gradients.py checks them against autograd through fastlstm/reference.py.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import register
from ..ops.schema import DirectionWeights, LayerCall, LayerInputs, LayerShape, lacks_output, output_again, split_weights

NAME = "eager"


def supports(call: LayerCall) -> str | None:
    """None when this backend can run `call`, else why not."""
    return None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    # fp32 state and accumulation: in bf16 c stops taking in small updates after ~200 steps.
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _Steps:
    """What the options mean for one direction; every mask is [T, B, 1], or None where all is ordinary."""

    def __init__(self, inputs: LayerInputs, reverse: bool) -> None:
        T, lengths, reset_mask = inputs.x.shape[0], inputs.lengths, inputs.reset_mask
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

    def entering(self, states: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """The state [T, B, n] that enters each valid step, from the state each step left behind."""
        before = torch.cat([states[1:], initial[None]] if reverse else [initial[None], states[:-1]])
        if self.first is not None:
            before = torch.where(self.first, initial, before)
        return before if self.fresh is None else before.masked_fill(self.fresh, 0)


def _initial(x: Tensor, state: Tensor | None, d: int, features: int, dtype: torch.dtype) -> Tensor:
    return x.new_zeros(x.shape[1], features, dtype=dtype) if state is None else state[d].to(dtype)


def forward(inputs: LayerInputs, keep_cells: bool, keep_reserve: bool) -> tuple[Tensor, ...]:
    """Kernel of fastlstm::eager_layer (fastlstm/ops/schema.py)."""
    x, h0, c0, weights, *_ = inputs
    shape, dtype = LayerShape.of(weights), _compute_dtype(x.dtype)
    results = []
    for d, w in enumerate(split_weights(weights)):
        steps = _Steps(inputs, reverse=d == 1)
        h = _initial(x, h0, d, shape.P, dtype)
        c = _initial(x, c0, d, shape.H, dtype)
        results.append(_forward_direction(steps.only_valid(x).to(dtype), h, c, w, steps))
    y, h_n, c_n, cells, gates = zip(*results, strict=True)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([p.to(x.dtype) for p in parts], dim=-1)

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        """Not torch.stack's view: the caller of an op could not change that in place."""
        return torch.cat([p.to(x.dtype)[None] for p in parts])

    return (
        joined(y),
        stacked(h_n),
        stacked(c_n),
        joined(cells) if keep_cells or keep_reserve else x.new_empty(0),
        stacked(gates) if keep_reserve else x.new_empty(0),
    )


def _forward_direction(
    x: Tensor, h: Tensor, c: Tensor, w: DirectionWeights, steps: _Steps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H] and activated gates [T, B, 4H]."""
    T, B, _ = x.shape
    H = c.shape[1]
    bias = None if w.bias_ih is None or w.bias_hh is None else w.bias_ih.to(x.dtype) + w.bias_hh.to(x.dtype)
    gates = torch.nn.functional.linear(x, w.ih.to(x.dtype), bias)  # [T, B, 4H]
    w_hh_t = w.hh.to(x.dtype).t()
    w_hr_t = None if w.hr is None else w.hr.to(x.dtype).t()
    y, cells = x.new_zeros(T, B, h.shape[1]), x.new_zeros(T, B, H)
    for t in steps.order:
        if steps.fresh is not None:
            h, c = h.masked_fill(steps.fresh[t], 0), c.masked_fill(steps.fresh[t], 0)
        a = torch.addmm(gates[t], h, w_hh_t)
        gates[t] = a.sigmoid()
        gates[t, :, 2 * H : 3 * H] = a[:, 2 * H : 3 * H].tanh()
        i, f, g, o = gates[t].chunk(4, dim=1)
        c_next = f * c + i * g
        h_next = o * c_next.tanh()
        if w_hr_t is not None:
            h_next = h_next @ w_hr_t
        if steps.valid is None:
            h, c = h_next, c_next
            y[t], cells[t] = h, c
        else:
            valid = steps.valid[t]
            h, c = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
            y[t], cells[t] = h.masked_fill(~valid, 0), c.masked_fill(~valid, 0)
    return y, h, c, cells, gates


def backward(grads, inputs, y, cells, reserve, needs, groups=0):
    """Kernel of fastlstm::eager_layer_backward.

    With `groups` > 0 the B rows are that many groups of neighbours, and each weight's gradient is [groups, *its shape],
    one for each group; an empty reserve is then made up for from y and cells, in one product.
    """
    x, h0, c0, weights, *_ = inputs
    dy, dh_n, dc_n, dcells = grads
    shape, dtype = LayerShape.of(weights), _compute_dtype(x.dtype)
    P, H = shape.P, shape.H
    if lacks_output(y):
        y = output_again(reserve, cells, weights, inputs.lengths)
    dx, dh0, dc0, dweights = [], [], [], []
    for d, w in enumerate(split_weights(weights)):
        steps = _Steps(inputs, reverse=d == 1)
        valid_x = steps.only_valid(x).to(dtype)
        h_enter = steps.entering(y[..., d * P : (d + 1) * P].to(dtype), _initial(x, h0, d, P, dtype), reverse=d == 1)
        c = cells[..., d * H : (d + 1) * H].to(dtype)
        c_enter = steps.entering(c, _initial(x, c0, d, H, dtype), reverse=d == 1)
        gates = reserve[d].to(dtype) if reserve.numel() else _gates(valid_x, h_enter, w)
        dgates, dh, dc, dr = _backward_direction(
            None if dy is None else dy[..., d * P : (d + 1) * P].to(dtype),
            None if dcells is None else dcells[..., d * H : (d + 1) * H].to(dtype),
            _initial(x, dh_n, d, P, dtype),
            _initial(x, dc_n, d, H, dtype),
            c,
            c_enter,
            gates,
            w,
            steps,
        )
        if needs[0]:
            dx.append(dgates.flatten(0, 1) @ w.ih.to(dtype))
        dh0.append(dh)
        dc0.append(dc)
        need = needs[3 + d * shape.per_direction :]
        dweights += _weight_gradients(shape.bias, dgates, valid_x, dgates, h_enter, need, groups)
        if dr is not None:
            hidden = gates[..., 3 * H :] * c.tanh()  # h before the projection
            dweights.append(_products(dr, hidden, groups) if need[shape.per_direction - 1] else x.new_empty(0))
    return (
        sum(dx[1:], dx[0]).view_as(x).to(x.dtype) if needs[0] else x.new_empty(0),
        torch.stack(dh0).to(x.dtype) if needs[1] else x.new_empty(0),
        torch.stack(dc0).to(x.dtype) if needs[2] else x.new_empty(0),
        [g.to(x.dtype) for g in dweights],
    )


def _weight_gradients(
    bias: bool, dgates: Tensor, x: Tensor, entered: Tensor, h_enter: Tensor, need: Sequence[bool], groups: int
) -> list[Tensor]:
    """Of weight_ih, weight_hh and the biases of one direction, from the gradients of the pre-activations [T, B, 4H].

    `entered` are those of the steps that h_enter, the states before them, is of.
    """
    empty = x.new_empty(0)
    found = [
        _products(dgates, x, groups) if need[0] else empty,
        _products(entered, h_enter, groups) if need[1] else empty,
    ]
    if bias and (need[2] or need[3]):
        db = dgates.unflatten(1, (groups, -1)).sum((0, 2)) if groups else dgates.flatten(0, 1).sum(0)
        # The two bias gradients are equal but must not be one tensor.
        return [*found, db if need[2] else empty, db.clone() if need[3] else empty]
    return [*found, empty, empty] if bias else found


def weight_gradients_of_groups(dgates, inputs, y, needs, groups):
    """`backward`'s weight gradients where another backend found dgates [T, B, D * 4H]; without projection."""
    x, h0, _, weights, *options = inputs
    shape, dtype, found = LayerShape.of(weights), _compute_dtype(x.dtype), []
    for d in range(shape.D):
        steps = _Steps(inputs, reverse=d == 1)
        own = slice(d * shape.H, (d + 1) * shape.H)
        own_dgates = dgates[..., d * 4 * shape.H : (d + 1) * 4 * shape.H].to(dtype)
        valid_x, states = steps.only_valid(x).to(dtype), y[..., own].to(dtype)
        if h0 is None and not any(
            option is not None for option in options
        ):  # y as it is, without the state of the first step
            later, earlier = (slice(1, None), slice(None, -1)) if d == 0 else (slice(None, -1), slice(1, None))
            entered, h_enter = own_dgates[later], states[earlier]
        else:
            entered, h_enter = own_dgates, steps.entering(states, _initial(x, h0, d, shape.H, dtype), reverse=d == 1)
        need = needs[3 + d * shape.per_direction :]
        found += _weight_gradients(shape.bias, own_dgates, valid_x, entered, h_enter, need, groups)
    return [g.to(x.dtype) for g in found]


def _gates(x: Tensor, h_enter: Tensor, w: DirectionWeights) -> Tensor:
    """The activated gates [T, B, 4H] from x [T, B, I] and the h [T, B, P] that enters each step."""
    bias = None if w.bias_ih is None or w.bias_hh is None else w.bias_ih.to(x.dtype) + w.bias_hh.to(x.dtype)
    gates = torch.nn.functional.linear(x, w.ih.to(x.dtype), bias)
    gates += torch.nn.functional.linear(h_enter, w.hh.to(x.dtype))
    i, f, g, o = gates.chunk(4, dim=-1)
    for part in (i, f, o):
        part.sigmoid_()
    g.tanh_()
    return gates


def _products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The sum over steps and rows of a's [T, B, m] outer products with b's [T, B, n]: [m, n], or [groups, m, n]."""
    if not groups:
        return a.flatten(0, 1).t() @ b.flatten(0, 1)
    return torch.ops.fastlstm.grouped_products.default(a, b, groups)


def _backward_direction(
    dy: Tensor | None,
    dcells: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    c: Tensor,
    c_enter: Tensor,
    gates: Tensor,
    w: DirectionWeights,
    steps: _Steps,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the pre-activations [T, B, 4H], of h0 [B, P] and c0 [B, H], and with projection of h [T, B, P]."""
    w_hh = w.hh.to(gates.dtype)
    w_hr = None if w.hr is None else w.hr.to(gates.dtype)
    dgates, dc_by_dh = _cell_factors(gates, c, c_enter)
    f = gates.chunk(4, dim=-1)[1]
    dr = None if w_hr is None else gates.new_zeros(*gates.shape[:2], dh.shape[1])
    for t in reversed(steps.order):
        dh_t = dh if dy is None else dh + dy[t]
        dc_t = dc if dcells is None else dc + dcells[t]
        if dr is not None:
            dr[t] = dh_t if steps.valid is None else dh_t.masked_fill(~steps.valid[t], 0)
        dh_full = dh_t if w_hr is None else dh_t @ w_hr
        dc_t = torch.addcmul(dc_t, dh_full, dc_by_dh[t])
        i_f_g, o = dgates[t].unflatten(1, (4, -1)).split((3, 1), dim=1)
        i_f_g *= dc_t.unsqueeze(1)
        o *= dh_full.unsqueeze(1)
        dc_t = dc_t * f[t]
        if steps.valid is not None:
            dgates[t].masked_fill_(~steps.valid[t], 0)
        dh_t = dgates[t] @ w_hh
        if steps.fresh is not None:
            dh_t, dc_t = dh_t.masked_fill(steps.fresh[t], 0), dc_t.masked_fill(steps.fresh[t], 0)
        if steps.valid is not None:  # a row passes a step it does not have untouched
            dh_t, dc_t = torch.where(steps.valid[t], dh_t, dh), torch.where(steps.valid[t], dc_t, dc)
        dh, dc = dh_t, dc_t
    return dgates, dh, dc, dr


def _cell_factors(gates: Tensor, c: Tensor, c_enter: Tensor) -> tuple[Tensor, Tensor]:
    """What the cell's gradients are multiplied by, for all steps at once: [T, B, 4H] and [T, B, H].

    The first becomes the gradients of the pre-activations: those of i, f, g by the factor dc, of o by dh. The second
    is what dh adds to dc.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    tanh_c = c.tanh()
    factors = torch.cat([g * i * (1 - i), c_enter * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=-1)
    return factors, o * (1 - tanh_c * tanh_c)


register.define(NAME, forward, backward)
