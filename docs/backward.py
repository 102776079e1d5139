"""Check every formula of docs/backward.md in float64, against autograd and against central differences.

python docs/backward.py
"""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm import reference

Gradients = dict[str, Tensor]


class Masks(NamedTuple):
    """m, k and l of docs/backward.md, [T, B, P], [T, B, P] and [T, B, H]."""

    m: Tensor
    k: Tensor
    l: Tensor  # noqa: E741


def split(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The four weights that every layer here has, gains and biases of layer normalization, and W_hr."""
    w_hr = weights[4:] if len(weights) in (5, 11) else []
    return weights[:4], weights[4:10] if len(weights) >= 10 else [], w_hr[-1:]


def standard(v: Tensor) -> tuple[Tensor, Tensor]:
    """u and the factor 1 / sqrt(var(v) + 1e-5)."""
    factor = (v.var(-1, correction=0, keepdim=True) + 1e-5) ** -0.5
    return (v - v.mean(-1, keepdim=True)) * factor, factor


def norm(v: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return standard(v)[0] * gain + bias


def norm_backward(d: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """dv from dLN."""
    (u, factor), e = standard(v), d * gain
    return (e - e.mean(-1, keepdim=True) - u * (e * u).mean(-1, keepdim=True)) * factor


def forward(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], masks: Masks
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, B, P], cells [T, B, H], activated gates, p and q [T, B, 4H] of one direction."""
    (w_ih, w_hh, b_ih, b_hh), norms, w_hr = split(weights)
    ys, cells, saved = [], [], []
    for t, x_t in enumerate(x):
        p, q = x_t @ w_ih.T, (masks.m[t] * h) @ w_hh.T
        a = (norm(p, *norms[:2]) + norm(q, *norms[2:4]) if norms else p + q) + b_ih + b_hh
        i, f, g, o = a.chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new_c = f * c + i * g
        r = o * (norm(new_c, *norms[4:]) if norms else new_c).tanh()
        h = masks.k[t] * h + (1 - masks.k[t]) * (r @ w_hr[0].T if w_hr else r)
        c = masks.l[t] * c + (1 - masks.l[t]) * new_c
        ys.append(h)
        cells.append(c)
        saved.append((torch.cat([i, f, g, o], dim=-1), p, q))
    return torch.stack(ys), torch.stack(cells), *map(torch.stack, zip(*saved, strict=True))


def backward(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    dcells: Tensor,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    masks: Masks,
) -> Gradients:
    """The formulas of docs/backward.md: gradients of x, h0, c0 and every weight."""
    (w_ih, w_hh, _, _), norms, w_hr = split(weights)
    y, cells, gates, p, q = forward(x, h0, c0, weights, masks)
    h_prev, c_prev = torch.cat([h0[None], y[:-1]]), torch.cat([c0[None], cells[:-1]])
    i, f, g, o = gates.chunk(4, dim=-1)
    new_c = f * c_prev + i * g
    tanh = (norm(new_c, *norms[4:]) if norms else new_c).tanh()
    dgates, dq, dhs, dnorm_c = (torch.empty_like(t) for t in (gates, q, y, new_c))
    for t in reversed(range(len(x))):
        i, f, g, o = gates[t].chunk(4, dim=-1)
        tanh_c = tanh[t]
        arrived_h, arrived_c = dh + dy[t], dc + dcells[t]
        dh_t = (1 - masks.k[t]) * arrived_h
        dr_t = dh_t @ w_hr[0] if w_hr else dh_t
        dnorm_c[t] = dr_t * o * (1 - tanh_c**2)
        dc_t = (1 - masks.l[t]) * arrived_c
        dc_t = dc_t + (norm_backward(dnorm_c[t], new_c[t], norms[4]) if norms else dnorm_c[t])
        da_i = dc_t * g * i * (1 - i)
        da_f = dc_t * c_prev[t] * f * (1 - f)
        da_g = dc_t * i * (1 - g**2)
        da_o = dr_t * tanh_c * o * (1 - o)
        dgates[t], dhs[t] = torch.cat([da_i, da_f, da_g, da_o], dim=-1), dh_t
        dq[t] = norm_backward(dgates[t], q[t], norms[2]) if norms else dgates[t]
        dh = masks.m[t] * (dq[t] @ w_hh) + masks.k[t] * arrived_h
        dc = dc_t * f + masks.l[t] * arrived_c
    dp = norm_backward(dgates, p, norms[0]) if norms else dgates
    db = dgates.flatten(0, 1).sum(0)
    found = {
        "dx": dp @ w_ih,
        "dh0": dh,
        "dc0": dc,
        "dW_ih": dp.flatten(0, 1).T @ x.flatten(0, 1),
        "dW_hh": dq.flatten(0, 1).T @ (masks.m * h_prev).flatten(0, 1),
        "db_ih": db,
        "db_hh": db,
    }
    for name, d, v in (("p", dgates, p), ("q", dgates, q), ("c", dnorm_c, new_c)) if norms else ():
        found[f"ds_{name}"] = (d * standard(v)[0]).flatten(0, 1).sum(0)
        found[f"db_{name}"] = d.flatten(0, 1).sum(0)
    if w_hr:
        r = gates.chunk(4, dim=-1)[3] * tanh
        found["dW_hr"] = dhs.flatten(0, 1).T @ r.flatten(0, 1)
    return found


def errors(
    T: int = 5,
    B: int = 3,
    I: int = 2,  # noqa: E741
    H: int = 4,
    P: int = 4,
    masked: bool = False,
    normalized: bool = False,
) -> dict[str, tuple[float, float]]:
    """Return, per gradient, the largest difference from autograd and from central differences."""
    torch.manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    weights = [random(4 * H, I), random(4 * H, P), random(4 * H), random(4 * H)]
    weights += [random(n) for n in (4 * H,) * 4 + (H, H)] if normalized else []
    weights += [random(P, H)] if P != H else []
    ones, zeros = torch.ones(T, B, P, dtype=torch.float64), torch.zeros(T, B, H, dtype=torch.float64)
    masks = Masks(ones, 0 * ones, zeros)
    if masked:
        masks = Masks(*((torch.rand(T, B, n) < 0.5).double() * s for n, s in ((P, 2.0), (P, 1.0), (H, 0.7))))
    inputs = [random(T, B, I), random(B, P), random(B, H), *weights]
    dy, dh_n, dc_n, dcells = random(T, B, P), random(B, P), random(B, H), random(T, B, H)

    def loss(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> Tensor:
        given = (masks.m[None], masks.k[None], masks.l[None]) if masked else ()
        y, h_n, c_n, cells = reference.layer(x, h0[None], c0[None], list(weights), None, None, *given)
        return (y * dy).sum() + (h_n[0] * dh_n).sum() + (c_n[0] * dc_n).sum() + (cells * dcells).sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = backward(dy, dh_n, dc_n, dcells, *inputs[:3], weights, masks)
    differences = [_central_differences(loss, inputs, k) for k in range(len(inputs))]
    return {
        name: (float((value - by_autograd).abs().max()), float((value - by_difference).abs().max()))
        for (name, value), by_autograd, by_difference in zip(found.items(), expected, differences, strict=True)
    }


def _central_differences(loss, inputs: list[Tensor], k: int, step: float = 1e-6) -> Tensor:
    """The gradient of input k, element by element."""
    found = torch.empty_like(inputs[k])
    for element in range(inputs[k].numel()):
        values = []
        for sign in (1, -1):
            moved = [t.clone() for t in inputs]
            moved[k].view(-1)[element] += sign * step
            values.append(loss(*moved))
        found.view(-1)[element] = (values[0] - values[1]) / (2 * step)
    return found


def main() -> int:
    """Print the differences; return 1 if one is larger than rounding explains."""
    right = True
    for P, masked, normalized in itertools.product((4, 3), (False, True), (False, True)):
        words = ["with projection" if P != 4 else "without projection"]
        words += ["masked"] * masked + ["normalized"] * normalized
        print(", ".join(words))
        for name, (autograd, difference) in errors(P=P, masked=masked, normalized=normalized).items():
            print(f"  {name:<6} from autograd {autograd:.1e}, from central differences {difference:.1e}")
            right = right and autograd < 1e-12 and difference < 1e-6
    print("every formula holds" if right else "A FORMULA IS WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
