"""Check every formula of docs/backward.md in float64, against autograd and against central differences.

python docs/backward.py
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastlstm import reference

Gradients = dict[str, Tensor]


def forward(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, B, P], cells [T, B, H] and the activated gates [T, B, 4H] of one direction."""
    w_ih, w_hh, b_ih, b_hh, *w_hr = weights
    ys, cells, saved = [], [], []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        r = o * c.tanh()
        h = r @ w_hr[0].T if w_hr else r
        ys.append(h)
        cells.append(c)
        saved.append(torch.cat([i, f, g, o], dim=-1))
    return torch.stack(ys), torch.stack(cells), torch.stack(saved)


def backward(
    dy: Tensor, dh: Tensor, dc: Tensor, dcells: Tensor, x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]
) -> Gradients:
    """The formulas of docs/backward.md: gradients of x, h0, c0 and every weight."""
    w_ih, w_hh, _, _, *w_hr = weights
    y, cells, gates = forward(x, h0, c0, weights)
    h_prev, c_prev = torch.cat([h0[None], y[:-1]]), torch.cat([c0[None], cells[:-1]])
    dgates, dhs = torch.empty_like(gates), torch.empty_like(y)
    for t in reversed(range(len(x))):
        i, f, g, o = gates[t].chunk(4, dim=-1)
        tanh_c = cells[t].tanh()
        dh_t = dh + dy[t]
        dr_t = dh_t @ w_hr[0] if w_hr else dh_t
        dc_t = dc + dcells[t] + dr_t * o * (1 - tanh_c**2)
        da_i = dc_t * g * i * (1 - i)
        da_f = dc_t * c_prev[t] * f * (1 - f)
        da_g = dc_t * i * (1 - g**2)
        da_o = dr_t * tanh_c * o * (1 - o)
        dgates[t], dhs[t] = torch.cat([da_i, da_f, da_g, da_o], dim=-1), dh_t
        dh, dc = dgates[t] @ w_hh, dc_t * f
    rows = dgates.flatten(0, 1)
    found = {
        "dx": dgates @ w_ih,
        "dh0": dh,
        "dc0": dc,
        "dW_ih": rows.T @ x.flatten(0, 1),
        "dW_hh": rows.T @ h_prev.flatten(0, 1),
        "db_ih": rows.sum(0),
        "db_hh": rows.sum(0),
    }
    if w_hr:
        r = gates.chunk(4, dim=-1)[3] * cells.tanh()
        found["dW_hr"] = dhs.flatten(0, 1).T @ r.flatten(0, 1)
    return found


def errors(T: int = 5, B: int = 3, I: int = 2, H: int = 4, P: int = 4) -> dict[str, tuple[float, float]]:  # noqa: E741
    """Return, per gradient, the largest difference from autograd and from central differences."""
    torch.manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    weights = [random(4 * H, I), random(4 * H, P), random(4 * H), random(4 * H), *([random(P, H)] if P != H else [])]
    inputs = [random(T, B, I), random(B, P), random(B, H), *weights]
    dy, dh_n, dc_n, dcells = random(T, B, P), random(B, P), random(B, H), random(T, B, H)

    def loss(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> Tensor:
        y, h_n, c_n, cells = reference.layer(x, h0[None], c0[None], list(weights))
        return (y * dy).sum() + (h_n[0] * dh_n).sum() + (c_n[0] * dc_n).sum() + (cells * dcells).sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = backward(dy, dh_n, dc_n, dcells, *inputs[:3], weights)
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
    for P in (4, 3):
        print("with projection" if P != 4 else "without projection")
        for name, (autograd, difference) in errors(P=P).items():
            print(f"  {name:<6} from autograd {autograd:.1e}, from central differences {difference:.1e}")
            right = right and autograd < 1e-12 and difference < 1e-6
    print("every formula holds" if right else "A FORMULA IS WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
