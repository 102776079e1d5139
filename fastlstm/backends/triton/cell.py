"""The LSTM cell in Triton, forward and backward, and helpers of both kernels. Equations: ../eager.py."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter (3.6 to 3.9) multiplies bf16 as integers and truncates fp32 to bf16 instead of rounding, so
# `product` and `rounded` have their own code for it. No compiled kernel contains that code.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); 0 if e^-x overflows."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh within a few ulp of fp32: an odd polynomial near 0, where 2 sigmoid(2x) - 1 cancels; otherwise the latter.

    The coefficients are a minimax fit of (tanh(x) - x)/x^3 in x^2 over |x| < 0.6, relative error 2.8e-9.
    """
    x2 = x * x
    p = ((((-0.005895158 * x2 + 0.020795971) * x2 - 0.05378383) * x2 + 0.13331924) * x2 - 0.333333) * x2 * x + x
    return tl.where(tl.abs(x) < 0.6, p, 2 * sigmoid(2 * x) - 1)


@triton.jit
def cell_forward(a_i, a_f, a_g, a_o, c):
    """Return i, f, g, o, the new c and h; c: the previous one; all fp32."""
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def cell_backward(i, f, g, o, c, c_prev, dh, dc):
    """Return the gradients of the pre-activations and of c_prev; i, f, g, o: activated; all fp32."""
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    return dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o), dc * f


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, accumulated in fp32. PRECISION of fp32 operands: "ieee" or "tf32"."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # Blockwise summation: in one chain over all of K the rounding error grows with K. The compiler fuses
        # `acc + dot` into one chain again unless the dot has this option, which otherwise affects 8-bit types only.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round fp32 x to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def row_lengths(
    lengths,  # [B] int64, or None: every row has T steps
    row,  # [BLOCK_B] rows of the batch
    T,
    B,
):
    """Return the length of each row, 0 past the batch: a row has step t if t < length."""
    return tl.where(row < B, T, 0) if lengths is None else tl.load(lengths + row, mask=row < B, other=0).to(tl.int32)


@triton.jit
def has_step(t, length):
    """Return True for rows that have step t, which may also be -1 or T."""
    # length * 0, not 0: the interpreter combines the bits of a scalar comparison and a tensor as integers.
    return (t < length) & (length * 0 <= t)


@triton.jit
def starts_from_zero_state(
    reset_mask,  # [T, B] uint8
    t,
    d,
    row,  # [BLOCK_B]
    length,  # [BLOCK_B]
    B,
):
    """Return True for rows whose step t starts from zero state: it is reset, or in reverse step t + 1 is."""
    begins = t + d
    return tl.load(reset_mask + begins.to(tl.int64) * B + row, mask=begins < length, other=0) != 0
