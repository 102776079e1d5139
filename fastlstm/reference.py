"""The textbook LSTM layer as a loop over time in plain PyTorch ops: `layer`. Read this file first.

Slow on purpose. Autograd does its backward, so every transform of PyTorch (double backward, vmap, jvp, ...) works on
it, and in float64 it is the truth the tests measure every backend against. It takes and gives what
fastlstm/ops/schema.py says, and imports torch alone so that it shares no mistake with what it judges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def cell(gates: Tensor, c: Tensor, known_c: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (h, c) after one step from the pre-activations [B, 4H] and c [B, H]; for known_c see `layer`.

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in torch.nn.LSTM's conventions:
    c_t = f * c_{t-1} + i * g and h_t = o * tanh(c_t), where i, f, o = sigmoid and g = tanh of their pre-activations.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if known_c is not None:
        c = _with_value(c, known_c)
    return o.sigmoid() * c.tanh(), c


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one direction: y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H] of x [T, B, I], h0 [B, P], c0 [B, H]."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
    w_hr = rest[-1] if len(rest) in (1, 3) else None
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
        gates = linear(steps[t], w_ih, b_ih) + linear(h, w_hh, b_hh)
        if known is None:
            h_next, c_next = cell(gates, c)
        else:
            h_next, c_next = cell(_with_value(gates, known[0][t]), c, known[1][t])
        if w_hr is not None:
            h_next = linear(h_next, w_hr)
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
    has_bias = len(weights) > 2 and weights[2].dim() == 1
    n = 2 + 2 * has_bias + (P != H)
    results = []
    for d in range(len(weights) // n):
        h = x.new_zeros(x.shape[1], P) if h0 is None else h0[d]
        c = x.new_zeros(x.shape[1], H) if c0 is None else c0[d]
        of_d = None if known is None else (known[0][d], known[1][..., d * H : (d + 1) * H])
        own = weights[d * n : (d + 1) * n]
        results.append(direction(x, h, c, own, lengths, reset_mask, d == 1, of_d))
    y, h_n, c_n, cells = zip(*results, strict=True)
    return torch.cat(y, dim=-1), torch.stack(h_n), torch.stack(c_n), torch.cat(cells, dim=-1)
