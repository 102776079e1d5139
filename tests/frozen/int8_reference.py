"""The arithmetic of int8 layers in float64, step by step, with a bound of what float32 may change.

A row v is quantized to q = min(round(v / s) + z, 255) - z, to even between two, with s = (max(v, 0) - min(v, 0)) / 255
and z = round(-min(v, 0) / s); q w is summed exactly; everything else is float64. Each step of a module's run is
computed again from the states that the module itself had before the step, so that errors do not add up over the steps
and the bound stays at a few roundings.

Where v / s or that of z lies within float32's rounding of the middle between two integers, the module may round to the
other one. The bound has one such flip for each of these elements, and none for others: 1 element in 20,000 of x and h,
1 in 1,000 of the rows that a projection quantizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.portable import quantized

from ..cases import Case, Tensors
from ..runners import Results, call_module

UNIT = 2.0**-24  # of float32
# Relative error of a sigmoid or tanh: those of AVX-512 take an estimated reciprocal and one step of Newton's method.
ACTIVATION = 16 * UNIT
ZERO_BELOW = 1e-30  # rows of smaller numbers are quantized as zeros


def tied(exact: Tensor, off: Tensor) -> Tensor:
    """Whether numbers within `off` of these may be rounded to another integer."""
    return (exact - exact.floor() - 0.5).abs() <= off


@dataclass
class Rows:
    """Quantized rows [N, K], and what float32 may change of them."""

    q: Tensor
    scale: Tensor  # [N, 1]
    flips: Tensor  # 1.0 where q may be one more or less
    scale_error: Tensor  # [N, 1], relative

    @classmethod
    def of(cls, v: Tensor, error: Tensor | float = 0.0) -> Rows:
        """Rows v [N, K], known to within `error`."""
        none = v.new_zeros(len(v), 1)
        low = v.amin(1, keepdim=True).clamp(max=0) if v.shape[1] else none
        scale = ((v.amax(1, keepdim=True).clamp(min=0) if v.shape[1] else none) - low) / 255
        nonzero = scale >= ZERO_BELOW
        factor = torch.where(nonzero, 1 / scale.where(nonzero, 1.0), 0.0)
        exact, of_zero = v * factor, -low * factor
        error = torch.as_tensor(error, dtype=v.dtype).expand_as(v)
        scale_error = 2 * (error.amax(1, keepdim=True) if v.shape[1] else none) / 255
        # Of 1 / s, of its product with v, and of v and s themselves.
        off = 255 * 5 * UNIT + (error + 255 * scale_error) * factor
        zero = of_zero.round()
        zero_flips = tied(of_zero, off.amax(1, keepdim=True) if v.shape[1] else none)
        clipped = zero_flips & (exact.round() + zero >= 255)
        flips = (tied(exact, off) | clipped) & nonzero
        q = torch.minimum(exact.round() + zero, torch.full_like(exact, 255.0)) - zero
        return cls(q, scale * nonzero, flips.double(), scale_error * factor + 3 * UNIT)

    def times(self, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(product with a weight q [R, K] of this scale [R], bound of its error)."""
        scales = self.scale * scale
        product = self.q @ q.T * scales
        flipped = self.flips @ q.abs().T * scales
        # The sum becomes a float, the scales are multiplied, and both are.
        return product, flipped + product.abs() * (self.scale_error + 4 * UNIT)


@dataclass
class Direction:
    """Quantized weights of one direction of a layer."""

    ih: tuple[Tensor, Tensor]
    hh: tuple[Tensor, Tensor]
    hr: tuple[Tensor, Tensor] | None
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, weights: dict[str, Tensor], suffix: str) -> Direction:
        def matrix(name: str) -> tuple[Tensor, Tensor]:
            q, scale = quantized(weights[name + suffix])
            return q.double(), scale.double()

        biases = tuple(
            weights[f"bias_{kind}{suffix}"].double() for kind in ("ih", "hh") if f"bias_ih{suffix}" in weights
        )
        hr = matrix("weight_hr") if f"weight_hr{suffix}" in weights else None
        return cls(matrix("weight_ih"), matrix("weight_hh"), hr, biases)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One step of N rows: ((h, bound), (c, bound)); x [N, I], h [N, P], c [N, H]."""
        of_x, x_error = Rows.of(x).times(*self.ih)
        of_h, h_error = Rows.of(h).times(*self.hh)
        pre = of_x + of_h + sum(self.biases)
        # Three additions, of numbers that are no larger than these.
        error = x_error + h_error + 4 * UNIT * (of_x.abs() + of_h.abs() + sum(b.abs() for b in self.biases))
        i, f, g, o = pre.chunk(4, 1)
        i_off, f_off, g_off, o_off = error.chunk(4, 1)
        i, f, o = (v.sigmoid() for v in (i, f, o))
        i_off, f_off, o_off = (off / 4 + ACTIVATION * v for off, v in ((i_off, i), (f_off, f), (o_off, o)))
        g, g_off = g.tanh(), g_off + ACTIVATION * g.tanh().abs()
        c_next = f * c + i * g
        c_off = f_off * c.abs() + i_off * g.abs() + i * g_off + i_off * g_off
        c_off = c_off + 3 * UNIT * ((f * c).abs() + (i * g).abs())
        tanh = c_next.tanh()
        hidden = o * tanh
        h_off = o_off * tanh.abs() + (o + o_off) * (c_off + (ACTIVATION + 2 * UNIT) * tanh.abs())
        if self.hr is None:
            return (hidden, h_off), (c_next, c_off)
        return Rows.of(hidden, h_off).times(*self.hr), (c_next, c_off)


def check_layer(
    weights: dict[str, Tensor], bidirectional: bool, x: Tensor, hx: tuple[Tensor, Tensor], steps: list[int],
    resets: Tensor | None, results: Results, what: str,
) -> None:  # fmt: skip
    """Assert that each step of a layer's results follows from the states before it.

    Args:
        weights: of nn.LSTM's names without the layer, "weight_ih" and "weight_ih_reverse".
        x: [T, B, I].
        hx: h0 [D, B, P] and c0 [D, B, H].
        steps: of each row.
        resets: [T, B], or None.
        results: output and cells [T, B, .], h_n and c_n.
    """
    T, B = x.shape[:2]
    D = 2 if bidirectional else 1
    x, h0, c0 = x.double(), hx[0].double(), hx[1].double()
    for d, suffix in enumerate(("", "_reverse")[:D]):
        P, H = h0.shape[2], c0.shape[2]
        y = results["output"][..., d * P : (d + 1) * P].double()
        cells = results["cells"][..., d * H : (d + 1) * H].double()
        h_before, c_before = torch.zeros(T, B, P).double(), torch.zeros(T, B, H).double()
        active = torch.zeros(T, B, dtype=torch.bool)
        for b, n in enumerate(steps):
            active[:n, b] = True
            h, c = h0[d, b], c0[d, b]
            for t in reversed(range(n)) if d else range(n):
                begins = t + 1 if d else t  # a reset between this step and the one before it in scan order
                if resets is not None and begins < n and resets[begins, b]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                h_before[t, b], c_before[t, b] = h, c
                h, c = y[t, b], cells[t, b]
            for name, last in (("h_n", h), ("c_n", c)):
                assert torch.equal(results[name][d, b].double(), last), f"{what}, {name}, direction {d}, row {b}"
        for name, values in (("output", y), ("cells", cells)):
            assert not values[~active].any(), f"{what}: {name}, direction {d}, is not zero past a length"
        step = Direction.of(weights, suffix).step(x[active], h_before[active], c_before[active])
        for name, values, (exact, bound) in (("output", y, step[0]), ("cells", cells, step[1])):
            excess = (values[active] - exact).abs() - bound - 1e-35  # denormal numbers
            worst = float(excess.max()) if excess.numel() else 0.0
            assert worst <= 0, (
                f"{what}: {name}, direction {d}, is {worst:.3g} beyond the bound {float(bound.max()):.3g}"
            )


def check_int8(case: Case, case_tensors: Tensors, results: Results, what: str, here: bool = True) -> None:
    """Assert that results of a frozen int8 module are right.

    They must equal those of its layers, frozen each as a module and called one after the other, to the bit; the
    layers' results are checked step by step.

    Args:
        here: whether this process made the results. Otherwise those of a single layer with cell states are checked.
    """
    D, P = case.directions, case.proj or case.H
    x, hx, resets = case_tensors.input, case_tensors.hx, case_tensors.reset_mask
    if case.unbatched:
        x, resets = x.unsqueeze(1), resets if resets is None else resets.unsqueeze(1)
        hx = hx and [state.unsqueeze(1) for state in hx]
    elif case.batch_first:
        x, resets = x.transpose(0, 1), resets if resets is None else resets.t()
    if hx is None:
        hx = x.new_zeros(case.layers * D, case.B, P), x.new_zeros(case.layers * D, case.B, case.H)
    steps = list(case.lengths) if case.lengths is not None else [case.T] * case.B
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    h_n, c_n = [], []
    for k in range(case.layers):
        own = {n.replace(f"_l{k}", "_l0"): w for n, w in case_tensors.weights.items() if f"_l{k}" in n}
        states = hx[0][k * D : (k + 1) * D], hx[1][k * D : (k + 1) * D]
        if here:
            layer_case = replace(case, I=x.shape[2], layers=1, batch_first=False, unbatched=False, cells=True)
            layer = layer_case.module(fastlstm.LSTM, {n: nn.Parameter(w.detach()) for n, w in own.items()})
            of_call = Tensors({}, {}, x, states, lengths, resets)
            of_layer = call_module(layer_case, of_call, fastlstm.freeze(layer, torch.int8))
        else:
            of_layer = results
        flat = {name.replace("_l0", ""): weight.detach() for name, weight in own.items()}
        check_layer(flat, case.bidirectional, x, states, steps, resets, of_layer, f"{what}, layer {k}")
        x = of_layer["output"]
        h_n.append(of_layer["h_n"])
        c_n.append(of_layer["c_n"])
    if not here:
        return
    whole = {"output": x, "h_n": torch.cat(h_n), "c_n": torch.cat(c_n), "cells": of_layer["cells"]}
    for name, value in results.items():
        expected = whole[name]
        if case.unbatched:
            expected = expected.squeeze(1)
        elif case.batch_first and name in ("output", "cells"):
            expected = expected.transpose(0, 1)
        assert torch.equal(value, expected), f"{what}: {name} differs from that of the layers one by one"
