"""The `eager` backend: explicit forward and backward of a layer in PyTorch ops, for any device. Always there.

One input GEMM for all steps before the loop and one GEMM each for dx, dW_ih, dW_hh and dW_hr after it, with no
autograd graph per step. Backward, from the gradients of h_t and c_t (gates' pre-activations a, activated i, f, g, o):
  dc += dh * o * (1 - tanh(c)^2)
  da_i = dc g i(1-i)    da_f = dc c_{t-1} f(1-f)    da_g = dc i (1-g^2)    da_o = dh tanh(c) o(1-o)
  dh_{t-1} = da W_hh    dc_{t-1} = dc f
With zoneout, shares k of the previous state: dh (dc) above is (1 - k) times the gradient that arrives, and k times that
is added to dh_{t-1} (dc_{t-1}). With a recurrent mask m, da W_hh is multiplied by m. With layer normalization the
gradients pass `Norm.backward` between da and either product, and between tanh and c.
(tests/ops/test_gradients.py checks them against autograd through fastlstm/reference.py.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import register
from ..ops.schema import (
    DirectionWeights,
    LayerCall,
    LayerInputs,
    LayerShape,
    lacks_output,
    split_weights,
    wants_dgates,
)
from ..ops.steps import (
    Norm,
    Steps,
    before_zoneout,
    compute_dtype,
    initial_state,
    norms_of,
    output_of_direction,
    zoned,
)

NAME = "eager"


def supports(call: LayerCall) -> str | None:
    """None when this backend can run `call`, else why not."""
    return None


def forward(inputs: LayerInputs, keep_cells: bool, keep_reserve: bool) -> tuple[Tensor, ...]:
    """Kernel of fastlstm::eager_layer (fastlstm/ops/schema.py)."""
    x, h0, c0, weights, *_ = inputs
    shape, dtype = LayerShape.of(weights), compute_dtype(x.dtype)
    results = []
    for d, w in enumerate(split_weights(weights)):
        steps = Steps(inputs, d)
        h = initial_state(x, h0, d, shape.P, dtype)
        c = initial_state(x, c0, d, shape.H, dtype)
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
    x: Tensor, h: Tensor, c: Tensor, w: DirectionWeights, steps: Steps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H] and a row of the reserve [T, B, 4H or 12H]."""
    T, B, _ = x.shape
    H = c.shape[1]
    norms, bias = norms_of(w, x.dtype), _bias(w, x.dtype)
    w_hh_t = w.hh.to(x.dtype).t()
    saved = []
    if norms is None:
        gates = torch.nn.functional.linear(x, w.ih.to(x.dtype), bias)  # [T, B, 4H]
    else:
        saved = [torch.nn.functional.linear(x, w.ih.to(x.dtype)), x.new_empty(T, B, 4 * H)]
        gates = norms[0](saved[0]) if bias is None else norms[0](saved[0]) + bias
    w_hr_t = None if w.hr is None else w.hr.to(x.dtype).t()
    y, cells = x.new_zeros(T, B, h.shape[1]), x.new_zeros(T, B, H)
    for t in steps.order:
        if steps.fresh is not None:
            h, c = h.masked_fill(steps.fresh[t], 0), c.masked_fill(steps.fresh[t], 0)
        entering = steps.masked(h, t)
        if norms is None:
            a = torch.addmm(gates[t], entering, w_hh_t)
        else:
            torch.mm(entering, w_hh_t, out=saved[1][t])
            a = gates[t] + norms[1](saved[1][t])
        gates[t] = a.sigmoid()
        gates[t, :, 2 * H : 3 * H] = a[:, 2 * H : 3 * H].tanh()
        i, f, g, o = gates[t].chunk(4, dim=1)
        c_next = f * c + i * g
        h_next = o * (c_next if norms is None else norms[2](c_next)).tanh()
        if w_hr_t is not None:
            h_next = h_next @ w_hr_t
        h_next = zoned(None if steps.share_h is None else steps.share_h[t], h, h_next)
        c_next = zoned(None if steps.share_c is None else steps.share_c[t], c, c_next)
        if steps.valid is None:
            h, c = h_next, c_next
            y[t], cells[t] = h, c
        else:
            valid = steps.valid[t]
            h, c = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
            y[t], cells[t] = h.masked_fill(~valid, 0), c.masked_fill(~valid, 0)
    return y, h, c, cells, torch.cat([gates, *saved], -1) if saved else gates


def _bias(w: DirectionWeights, dtype: torch.dtype) -> Tensor | None:
    return None if w.bias_ih is None or w.bias_hh is None else w.bias_ih.to(dtype) + w.bias_hh.to(dtype)


def backward(grads, inputs, y, cells, reserve, needs, groups=0):
    """Kernel of fastlstm::eager_layer_backward.

    With `groups` > 0 the B rows are that many groups of neighbours, and each weight's gradient is [groups, *its shape],
    one for each group; an empty reserve is then made up for from y and cells, in one product.
    """
    x, h0, c0, weights, *_ = inputs
    dy, dh_n, dc_n, dcells = grads
    shape, dtype = LayerShape.of(weights), compute_dtype(x.dtype)
    P, H = shape.P, shape.H
    dx, dh0, dc0, dweights = [], [], [], []
    for d, w in enumerate(split_weights(weights)):
        steps, norms = Steps(inputs, d), norms_of(w, dtype)
        valid_x, h_first = steps.only_valid(x).to(dtype), initial_state(x, h0, d, P, dtype)
        c = cells[..., d * H : (d + 1) * H].to(dtype)
        c_enter = steps.entering(c, initial_state(x, c0, d, H, dtype))
        saved = reserve[d].to(dtype) if reserve.numel() else None
        states = None if lacks_output(y) else y[..., d * P : (d + 1) * P].to(dtype)
        if states is None:
            states = output_of_direction(reserve[d].to(dtype), c, c_enter, h_first, w, steps)
        h_enter = steps.masked(steps.entering(states, h_first))
        if saved is None:
            saved = _saved_again(valid_x, h_enter, w)
        gates = saved[..., : 4 * H]
        cell = _CellBackward(
            gates, before_zoneout(gates, c, c_enter, steps), c_enter, None if norms is None else norms[2]
        )
        hh = None if norms is None else (norms[1], *Norm.standard(saved[..., 8 * H :]))
        dgates, dproducts, dh, dc, dr = _backward_direction(
            None if dy is None else dy[..., d * P : (d + 1) * P].to(dtype),
            None if dcells is None else dcells[..., d * H : (d + 1) * H].to(dtype),
            initial_state(x, dh_n, d, P, dtype),
            initial_state(x, dc_n, d, H, dtype),
            cell,
            hh,
            w,
            steps,
        )
        dinput, norm_parts = dgates, []  # the gradient of W_ih x; pairs whose products' sums are gradients of a gain
        if norms is not None and hh is not None:
            standard, scale = Norm.standard(saved[..., 4 * H : 8 * H])
            dinput = norms[0].backward(dgates, standard, scale)
            norm_parts = [(dgates, standard), (dgates, hh[1]), (cell.dnormalized, cell.standard)]
        if needs[0]:
            dx.append(dinput if wants_dgates(inputs, needs) else dinput @ w.ih.to(dtype))
        dh0.append(dh)
        dc0.append(dc)
        need = needs[3 + d * shape.per_direction :]
        dweights += _weight_gradients(shape.bias, dgates, dinput, valid_x, dproducts, h_enter, need, groups)
        at = 2 + 2 * shape.bias
        for k, (grad, standard) in enumerate(norm_parts):
            for j, terms in ((at + 2 * k, grad * standard), (at + 2 * k + 1, grad)):
                dweights.append(_sums(terms, groups) if need[j] else x.new_empty(0))
        if dr is not None:
            dweights.append(_products(dr, cell.hidden, groups) if need[shape.per_direction - 1] else x.new_empty(0))
    return (
        _input_gradient(dx, wants_dgates(inputs, needs)).to(x.dtype) if needs[0] else x.new_empty(0),
        torch.stack(dh0).to(x.dtype) if needs[1] else x.new_empty(0),
        torch.stack(dc0).to(x.dtype) if needs[2] else x.new_empty(0),
        [g.to(x.dtype) for g in dweights],
    )


def _input_gradient(of_directions: list[Tensor], concatenate: bool) -> Tensor:
    return torch.cat(of_directions, -1) if concatenate else sum(of_directions[1:], of_directions[0])


def _weight_gradients(
    bias: bool,
    dgates: Tensor,
    dinput: Tensor,
    x: Tensor,
    entered: Tensor,
    h_enter: Tensor,
    need: Sequence[bool],
    groups: int,
) -> list[Tensor]:
    """Of weight_ih, weight_hh and the biases of one direction, from the gradients of the pre-activations [T, B, 4H].

    `dinput` are those of W_ih x. `entered` are those of W_hh h, for the steps that h_enter, the states before them, is
    of.
    """
    found = [
        _products(dinput, x, groups) if need[0] else x.new_empty(0),
        _products(entered, h_enter, groups) if need[1] else x.new_empty(0),
    ]
    if bias and (need[2] or need[3]):
        db = _sums(dgates, groups)
        # The two bias gradients are equal but must not be one tensor.
        return [*found, db if need[2] else x.new_empty(0), db.clone() if need[3] else x.new_empty(0)]
    return [*found, x.new_empty(0), x.new_empty(0)] if bias else found


def weight_gradients_of_groups(dgates, inputs, y, needs, groups):
    """`backward`'s weight gradients where another backend found dgates [T, B, D * 4H]; without projection."""
    x, h0, _, weights, *options = inputs
    shape, dtype, found = LayerShape.of(weights), compute_dtype(x.dtype), []
    for d in range(shape.D):
        steps = Steps(inputs, d)
        own = slice(d * shape.H, (d + 1) * shape.H)
        own_dgates = dgates[..., d * 4 * shape.H : (d + 1) * 4 * shape.H].to(dtype)
        valid_x, states = steps.only_valid(x).to(dtype), y[..., own].to(dtype)
        if h0 is None and not any(
            option is not None for option in options
        ):  # y as it is, without the state of the first step
            later, earlier = (slice(1, None), slice(None, -1)) if d == 0 else (slice(None, -1), slice(1, None))
            entered, h_enter = own_dgates[later], states[earlier]
        else:
            h_enter = steps.masked(steps.entering(states, initial_state(x, h0, d, shape.H, dtype)))
            entered = own_dgates
        need = needs[3 + d * shape.per_direction :]
        found += _weight_gradients(shape.bias, own_dgates, own_dgates, valid_x, entered, h_enter, need, groups)
    return [g.to(x.dtype) for g in found]


def _saved_again(x: Tensor, h_enter: Tensor, w: DirectionWeights) -> Tensor:
    """A row of the reserve [T, B, 4H or 12H] from x [T, B, I] and the h [T, B, P] that enters W_hh in each step."""
    norms, bias = norms_of(w, x.dtype), _bias(w, x.dtype)
    of_x = torch.nn.functional.linear(x, w.ih.to(x.dtype), bias if norms is None else None)
    of_h = torch.nn.functional.linear(h_enter, w.hh.to(x.dtype))
    if norms is None:
        return _activated(of_x + of_h)
    gates = norms[0](of_x) + norms[1](of_h)
    return torch.cat([_activated(gates if bias is None else gates + bias), of_x, of_h], -1)


def _activated(gates: Tensor) -> Tensor:
    """The pre-activations [..., 4H] activated, in place."""
    i, f, g, o = gates.chunk(4, dim=-1)
    for part in (i, f, o):
        part.sigmoid_()
    g.tanh_()
    return gates


def _sums(terms: Tensor, groups: int) -> Tensor:
    """The sum of terms [T, B, n] over steps and rows: [n], or [groups, n]."""
    return terms.unflatten(1, (groups, -1)).sum((0, 2)) if groups else terms.flatten(0, 1).sum(0)


def _products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The sum over steps and rows of a's [T, B, m] outer products with b's [T, B, n]: [m, n], or [groups, m, n]."""
    if not groups:
        return a.flatten(0, 1).t() @ b.flatten(0, 1)
    return torch.ops.fastlstm.grouped_products.default(a, b, groups)


class _CellBackward:
    """What the cells' gradients are multiplied by, for all steps at once."""

    def __init__(self, gates: Tensor, c: Tensor, c_enter: Tensor, norm: Norm | None) -> None:
        i, f, g, o = gates.chunk(4, dim=-1)
        self.norm, self.f = norm, f
        if norm is not None:
            self.standard, self.scale = Norm.standard(c)
            self.dnormalized = torch.zeros_like(c)  # gradients of the normalized c, as `step` finds them
        tanh_c = (c if norm is None else norm(c)).tanh()
        # The gradients of the pre-activations: those of i, f, g by the factor dc, of o by dh.
        self.dgates = torch.cat([g * i * (1 - i), c_enter * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=-1)
        self.dc_by_dh = o * (1 - tanh_c * tanh_c)
        self.hidden = o * tanh_c  # h before the projection

    def step(self, t: int, dh: Tensor, dc: Tensor) -> Tensor:
        """Turn dgates[t] into gradients, from those of h_t before the projection and of c_t; dc_{t-1} [B, H]."""
        if self.norm is None:
            dc = torch.addcmul(dc, dh, self.dc_by_dh[t])
        else:
            torch.mul(dh, self.dc_by_dh[t], out=self.dnormalized[t])
            dc = dc + self.norm.backward(self.dnormalized[t], self.standard[t], self.scale[t])
        i_f_g, o = self.dgates[t].unflatten(1, (4, -1)).split((3, 1), dim=1)
        i_f_g *= dc.unsqueeze(1)
        o *= dh.unsqueeze(1)
        return dc * self.f[t]


def _backward_direction(
    dy: Tensor | None,
    dcells: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    cell: _CellBackward,
    hh: tuple[Norm, Tensor, Tensor] | None,
    w: DirectionWeights,
    steps: Steps,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the pre-activations and of W_hh h [T, B, 4H], of h0 [B, P], c0 [B, H], and of the projected h.

    The last, [T, B, P], is None without projection. `hh`: normalization of W_hh h, and `Norm.standard` of it.
    """
    dgates = cell.dgates
    w_hh = w.hh.to(dgates.dtype)
    w_hr = None if w.hr is None else w.hr.to(dgates.dtype)
    dr = None if w_hr is None else dgates.new_zeros(*dgates.shape[:2], dh.shape[1])
    dproducts = dgates if hh is None else torch.zeros_like(dgates)
    for t in reversed(steps.order):
        dh_t = dh if dy is None else dh + dy[t]
        dc_t = dc if dcells is None else dc + dcells[t]
        kept_h = kept_c = None  # what goes to the previous state past the cell
        if steps.share_h is not None:
            kept_h = dh_t * steps.share_h[t]
            dh_t = dh_t - kept_h
        if steps.share_c is not None:
            kept_c = dc_t * steps.share_c[t]
            dc_t = dc_t - kept_c
        if dr is not None:
            dr[t] = dh_t if steps.valid is None else dh_t.masked_fill(~steps.valid[t], 0)
        dc_t = cell.step(t, dh_t if w_hr is None else dh_t @ w_hr, dc_t)
        if steps.valid is not None:
            dgates[t].masked_fill_(~steps.valid[t], 0)
            if cell.norm is not None:
                cell.dnormalized[t].masked_fill_(~steps.valid[t], 0)
        if hh is not None:
            dproducts[t] = hh[0].backward(dgates[t], hh[1][t], hh[2][t])
        dh_t = steps.masked(dproducts[t] @ w_hh, t)
        dh_t = dh_t if kept_h is None else dh_t + kept_h
        dc_t = dc_t if kept_c is None else dc_t + kept_c
        if steps.fresh is not None:
            dh_t, dc_t = dh_t.masked_fill(steps.fresh[t], 0), dc_t.masked_fill(steps.fresh[t], 0)
        if steps.valid is not None:  # a row passes a step it does not have untouched
            dh_t, dc_t = torch.where(steps.valid[t], dh_t, dh), torch.where(steps.valid[t], dc_t, dc)
        dh, dc = dh_t, dc_t
    return dgates, dproducts, dh, dc, dr


register.define(NAME, forward, backward)
