"""The textbook LSTM layer as a loop over time in plain PyTorch ops: `layer`. Read this file first.

Slow on purpose. Autograd does its backward, so every transform of PyTorch (double backward, vmap, jvp, ...) works on
it, and in float64 it is the truth the tests measure every backend against. It takes and gives what
fastlstm/ops/schema.py says, and imports torch alone so that it shares no mistake with what it judges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

# torch.nn.LayerNorm's
NORM_EPSILON = 1e-5


def cell(
    gates: Tensor, c: Tensor, known_c: Tensor | None = None, norm: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (h, c) after one step from the pre-activations [B, 4H] and c [B, H]; for known_c see `layer`.

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in torch.nn.LSTM's conventions:
    c_t = f * c_{t-1} + i * g and h_t = o * tanh(c_t), where i, f, o = sigmoid and g = tanh of their pre-activations.
    With `norm`, gain and bias [H], c_t enters that tanh normalized.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if known_c is not None:
        c = _with_value(c, known_c)
    return o.sigmoid() * (c if norm is None else normalized(c, *norm)).tanh(), c


def normalized(v: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Layer normalization of each row of v [B, n] (Ba et al. 2016), with gain and bias [n]."""
    centred = v - v.sum(-1, keepdim=True) / v.shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / v.shape[-1]
    return centred / (variance + NORM_EPSILON).sqrt() * gain + bias


def zoned(share: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """The state [B, n] of which `share` [B, n] is kept as it was before the step (Krueger et al. 2017, "Zoneout")."""
    if share is None:
        return after
    if share.dtype == torch.bool:
        return torch.where(share, before, after)
    return share * before + (1 - share) * after


def _with_value(t: Tensor, value: Tensor) -> Tensor:
    """`value` with t's gradient: t - t is 0, and where t is not finite its gradient is that of nothing."""
    return value + (t - t.detach()).nan_to_num(0)


def direction(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reverse: bool,
    known: tuple[Tensor, Tensor] | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one direction: y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H] of x [T, B, I], h0 [B, P], c0 [B, H]."""
    w_ih, w_hh, *rest = weights
    w_hr = rest.pop() if rest and rest[-1].dim() == 2 else None
    norm, rest = (rest[-6:], rest[:-6]) if len(rest) >= 6 else (None, rest)
    b_ih, b_hh = rest or (None, None)
    T = x.shape[0]
    steps = x.unbind(0)  # one node of autograd; x[t] would give T, each with a gradient of x's size
    h, c = h0, c0
    ys: list[Tensor] = [h0] * T
    cells: list[Tensor] = [c0] * T
    for t in reversed(range(T)) if reverse else range(T):
        # Step t starts from zero state if it is flagged (forward), or if the next step in time is (reverse).
        begins = t + 1 if reverse else t
        if reset_mask is not None and begins < T:
            new = reset_mask[begins]
            if lengths is not None:
                new = new & (begins < lengths)
            h, c = h.masked_fill(new[:, None], 0), c.masked_fill(new[:, None], 0)
        entering = h if recurrent_mask is None else h * recurrent_mask[t]
        if norm is None:
            gates = linear(steps[t], w_ih, b_ih) + linear(entering, w_hh, b_hh)
        else:
            gates = normalized(linear(steps[t], w_ih), *norm[:2]) + normalized(linear(entering, w_hh), *norm[2:4])
            gates = gates if b_ih is None or b_hh is None else gates + (b_ih + b_hh)
        known_c = None
        if known is not None:
            gates = _with_value(gates, known[0][t])
            known_c = known[1][t] if zoneout_c is None else None  # otherwise c after the zoneout
        h_next, c_next = cell(gates, c, known_c, None if norm is None else norm[4:])
        if w_hr is not None:
            h_next = linear(h_next, w_hr)
        h_next = zoned(None if zoneout_h is None else zoneout_h[t], h, h_next)
        c_next = zoned(None if zoneout_c is None else zoneout_c[t], c, c_next)
        if known is not None and zoneout_c is not None:
            c_next = _with_value(c_next, known[1][t])
        if lengths is None:
            h, c = h_next, c_next
            ys[t], cells[t] = h, c
        else:
            valid = (t < lengths)[:, None]
            h, c = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
            ys[t], cells[t] = h.masked_fill(~valid, 0), c.masked_fill(~valid, 0)
    return torch.stack(ys), h, c, torch.stack(cells)


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all directions of one layer, as fastlstm/ops/schema.py defines it, for any floating-point dtype and device.

    Args:
        x: [T, B, I].
        h0: [D, B, P], or None for zeros.
        c0: [D, B, H], or None for zeros.
        weights: those of each direction.
        lengths: [B] int64, or None.
        reset_mask: [T, B] bool, or None.
        recurrent_mask: [D, T, B, P], or None.
        zoneout_h: [D, T, B, P], bool or numbers, or None.
        zoneout_c: [D, T, B, H], bool or numbers, or None.
        known: the pre-activations [D, T, B, 4H] and cells of an earlier run on the same arguments. The results then
            follow from these, so that an argument whose value no required gradient reads may have any value.

    Returns:
        y [T, B, D*P], h_n [D, B, P], c_n [D, B, H], cells [T, B, D*H].

    Example:
        >>> import torch
        >>> from fastlstm import reference
        >>> weights = [torch.randn(64, 8), torch.randn(64, 16)]  # H = 16, no bias
        >>> y, h_n, c_n, cells = reference.layer(torch.randn(5, 3, 8), None, None, weights)
        >>> y.shape
        torch.Size([5, 3, 16])
    """
    if lengths is not None:  # padding may hold NaN, and 0 * NaN would enter the weights' gradients
        x = x.masked_fill((torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None], 0)
    H, P = weights[0].shape[0] // 4, weights[1].shape[1]
    # Of a direction: two matrices, then biases and layer normalization, then weight_hr if there is a projection.
    vectors = next((k for k, w in enumerate(weights[2:]) if w.dim() != 1), len(weights) - 2)
    n = 2 + vectors + (P != H)
    masks = recurrent_mask, zoneout_h, zoneout_c
    results = []
    for d in range(len(weights) // n):
        h = x.new_zeros(x.shape[1], P) if h0 is None else h0[d]
        c = x.new_zeros(x.shape[1], H) if c0 is None else c0[d]
        of_d = None if known is None else (known[0][d], known[1][..., d * H : (d + 1) * H])
        own = weights[d * n : (d + 1) * n]
        own_masks = (None if mask is None else mask[d] for mask in masks)
        results.append(direction(x, h, c, own, lengths, reset_mask, d == 1, of_d, *own_masks))
    y, h_n, c_n, cells = zip(*results, strict=True)
    return torch.cat(y, dim=-1), torch.stack(h_n), torch.stack(c_n), torch.cat(cells, dim=-1)
