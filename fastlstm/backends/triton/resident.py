"""Whole-sequence kernels for small H: one launch, W_hh resident on the chip, the time loop inside.

Grid (batch tiles, directions). A program processes BLOCK_B rows and all H units, so programs do not communicate: h and
c (dh and dc in backward) are in registers, W_hh in shared memory, and the loads of the next step are issued before this
step's product, which hides their latency. H is padded to BLOCK_H, a power of two, on the chip only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cell import cell_backward, cell_forward, has_step, product, rounded, row_lengths, starts_from_zero_state


@triton.jit
def _load_w_hh(
    w_hh,  # [4H, H] one direction
    gate: tl.constexpr,  # 0 to 3: i, f, g, o
    rows,  # gate rows of the tile, a column or a row of indices
    cols,  # columns of W_hh, a row or a column of indices
    H: tl.constexpr,
):
    return tl.load(w_hh + (gate * H + rows) * H + cols, mask=(rows < H) & (cols < H), other=0)


@triton.jit
def _load_gates(
    gates,  # [T, B, 4H] one direction
    t,
    first,  # the tile's first row of the batch
    offsets,  # [BLOCK_B, BLOCK_H] of gate i within a tile
    mask,
    B,
    H: tl.constexpr,
):
    p = gates + (tl.cast(t, tl.int64) * B + first) * (4 * H) + offsets
    return (
        tl.load(p, mask=mask, other=0),
        tl.load(p + H, mask=mask, other=0),
        tl.load(p + 2 * H, mask=mask, other=0),
        tl.load(p + 3 * H, mask=mask, other=0),
    )


@triton.jit
def _load_step(
    states,  # [T, B, D*H] at the direction's first column, or None
    t,
    first,
    offsets,  # [BLOCK_B, BLOCK_H] within a tile
    mask,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
):
    if states is None:
        value = tl.zeros(mask.shape, tl.float32)
    else:
        value = tl.load(states + (tl.cast(t, tl.int64) * B + first) * (D * H) + offsets, mask=mask, other=0)
    return value


@triton.jit
def _load_state(
    state,  # [D, B, H], or None for zeros
    offsets,  # [BLOCK_B, BLOCK_H]
    mask,
):
    if state is None:
        value = tl.zeros(mask.shape, tl.float32)
    else:
        value = tl.load(state + offsets, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T", "B"])
def layer_resident_fwd(
    gates,  # [D, T, B, 4H] in: x W_ih^T + b_ih + b_hh. Out, where KEEP_GATES: activated gates
    w_hh,  # [D, 4H, H]
    h0,  # [D, B, H] or None for zeros
    c0,  # [D, B, H] or None for zeros
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    y,  # [T, B, D*H] out
    h_n,  # [D, B, H] out
    c_n,  # [D, B, H] out
    cells,  # [T, B, D*H] out, or None
    T,  # run-time, as is B: no recompilation when they change
    B,
    H: tl.constexpr,  # fixes the mask within BLOCK_H and the alignment of loads
    D: tl.constexpr,  # directions, 1 or 2: part of every stride of y
    KEEP_GATES: tl.constexpr,  # store the activated gates for backward
    BLOCK_B: tl.constexpr,  # rows of the batch per program
    BLOCK_H: tl.constexpr,  # H rounded up to a power of two, as Triton requires
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of fp32 products
):
    """One layer over the whole sequence, all directions (fastlstm/ops/schema.py)."""
    dtype = y.dtype.element_ty
    d = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    r = tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    in_batch = (first + r < B)[:, None] & (n < H)
    length = row_lengths(lengths, first + r, T, B)
    gates += d.to(tl.int64) * T * B * (4 * H)
    w_hh += d * (4 * H * H)
    at_state = (d.to(tl.int64) * B + first) * H + r[:, None] * H + n
    w_i, w_f = _load_w_hh(w_hh, 0, n, k, H), _load_w_hh(w_hh, 1, n, k, H)  # [k, n]: W_hh^T
    w_g, w_o = _load_w_hh(w_hh, 2, n, k, H), _load_w_hh(w_hh, 3, n, k, H)
    h = _load_state(h0, at_state, in_batch).to(dtype)
    c = _load_state(c0, at_state, in_batch)

    at_gates = r[:, None] * (4 * H) + n
    at_y = r[:, None] * (D * H) + d * H + n
    t = d * (T - 1)
    mask = (t < length)[:, None] & (n < H)
    x_i, x_f, x_g, x_o = _load_gates(gates, t, first, at_gates, mask, B, H)
    for s in range(T):
        t = s + d * (T - 1 - 2 * s)
        t_next = t + 1 - 2 * d
        mask_next = has_step(t_next, length)[:, None] & (n < H)
        next_i, next_f, next_g, next_o = _load_gates(gates, t_next, first, at_gates, mask_next, B, H)
        valid = (t < length)[:, None]
        h_prev, c_prev = h, c
        if reset_mask is not None:
            from_zero = starts_from_zero_state(reset_mask, t, d, first + r, length, B)[:, None]
            h_prev, c_prev = tl.where(from_zero, 0, h), tl.where(from_zero, 0, c)
        zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        a_i = product(h_prev, w_i, zero, PRECISION) + x_i.to(tl.float32)
        a_f = product(h_prev, w_f, zero, PRECISION) + x_f.to(tl.float32)
        a_g = product(h_prev, w_g, zero, PRECISION) + x_g.to(tl.float32)
        a_o = product(h_prev, w_o, zero, PRECISION) + x_o.to(tl.float32)
        i, f, g, o, c_new, h_new = cell_forward(a_i, a_f, a_g, a_o, c_prev)
        h_new = rounded(h_new, dtype)
        row = tl.cast(t, tl.int64) * B + first
        if KEEP_GATES:
            p = gates + row * (4 * H) + at_gates
            tl.store(p, rounded(i, dtype), mask=mask)
            tl.store(p + H, rounded(f, dtype), mask=mask)
            tl.store(p + 2 * H, rounded(g, dtype), mask=mask)
            tl.store(p + 3 * H, rounded(o, dtype), mask=mask)
        tl.store(y + row * (D * H) + at_y, tl.where(valid, h_new, 0), mask=in_batch)
        if cells is not None:
            tl.store(cells + row * (D * H) + at_y, rounded(tl.where(valid, c_new, 0), dtype), mask=in_batch)
        h, c = tl.where(valid, h_new, h), tl.where(valid, c_new, c)  # a row keeps its state where it has no step
        x_i, x_f, x_g, x_o, mask = next_i, next_f, next_g, next_o, mask_next
    tl.store(h_n + at_state, h, mask=in_batch)
    tl.store(c_n + at_state, rounded(c, dtype), mask=in_batch)


@triton.jit(do_not_specialize=["T", "B"])
def layer_resident_bwd(
    dy,  # [T, B, D*H] or None for zeros
    dh_n,  # [D, B, H] or None for zeros
    dc_n,  # [D, B, H] or None for zeros
    dcells,  # [T, B, D*H] or None for zeros
    gates,  # [D, T, B, 4H] activated, saved by forward
    cells,  # [T, B, D*H]
    c0,  # [D, B, H] or None for zeros
    w_hh,  # [D, 4H, H]
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    dgates,  # [D, T, B, 4H] out: of the pre-activations, zero where a row has no step
    dh0,  # [D, B, H] out
    dc0,  # [D, B, H] out
    T,  # run-time, as is B: no recompilation when they change
    B,
    H: tl.constexpr,  # fixes the mask within BLOCK_H and the alignment of loads
    D: tl.constexpr,  # directions, 1 or 2: part of every stride of y
    BLOCK_B: tl.constexpr,  # rows of the batch per program
    BLOCK_H: tl.constexpr,  # H rounded up to a power of two, as Triton requires
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of fp32 products
):
    """Gradients of the pre-activations of every step, and of the initial state."""
    dtype = dgates.dtype.element_ty
    d = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    r = tl.arange(0, BLOCK_B)
    n = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    in_batch = (first + r < B)[:, None] & (n < H)
    length = row_lengths(lengths, first + r, T, B)
    gates += d.to(tl.int64) * T * B * (4 * H)
    dgates += d.to(tl.int64) * T * B * (4 * H)
    w_hh += d * (4 * H * H)
    at_state = (d.to(tl.int64) * B + first) * H + r[:, None] * H + n
    w_i, w_f = _load_w_hh(w_hh, 0, k, n, H), _load_w_hh(w_hh, 1, k, n, H)  # [k, n]: W_hh as stored
    w_g, w_o = _load_w_hh(w_hh, 2, k, n, H), _load_w_hh(w_hh, 3, k, n, H)
    dh = _load_state(dh_n, at_state, in_batch)
    dc = _load_state(dc_n, at_state, in_batch)
    c_init = _load_state(c0, at_state, in_batch)

    at_gates = r[:, None] * (4 * H) + n
    at_y = r[:, None] * (D * H) + d * H + n
    t = (1 - d) * (T - 1)
    mask = (t < length)[:, None] & (n < H)
    i, f, g, o = _load_gates(gates, t, first, at_gates, mask, B, H)
    c = _load_step(cells, t, first, at_y, mask, B, H, D)
    dy_t = _load_step(dy, t, first, at_y, mask, B, H, D)
    dcells_t = _load_step(dcells, t, first, at_y, mask, B, H, D)
    for s in range(T):
        t = (T - 1 - s) + d * (2 * s - T + 1)
        t_next = t - 1 + 2 * d  # the previous step, in scan order
        mask_next = has_step(t_next, length)[:, None] & (n < H)
        next_i, next_f, next_g, next_o = _load_gates(gates, t_next, first, at_gates, mask_next, B, H)
        c_next = _load_step(cells, t_next, first, at_y, mask_next, B, H, D)
        dy_next = _load_step(dy, t_next, first, at_y, mask_next, B, H, D)
        dcells_next = _load_step(dcells, t_next, first, at_y, mask_next, B, H, D)
        # c_prev: of the previous step, or c0 if there is none.
        c_prev = tl.where(mask_next, c_next.to(tl.float32), c_init)
        if reset_mask is not None:
            from_zero = starts_from_zero_state(reset_mask, t, d, first + r, length, B)[:, None]
            c_prev = tl.where(from_zero, 0, c_prev)
        a_i, a_f, a_g, a_o, dc_prev = cell_backward(
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            c.to(tl.float32),
            c_prev,
            dh + dy_t.to(tl.float32),
            dc + dcells_t.to(tl.float32),
        )
        a_i, a_f = rounded(tl.where(mask, a_i, 0), dtype), rounded(tl.where(mask, a_f, 0), dtype)
        a_g, a_o = rounded(tl.where(mask, a_g, 0), dtype), rounded(tl.where(mask, a_o, 0), dtype)
        p = dgates + (tl.cast(t, tl.int64) * B + first) * (4 * H) + at_gates
        tl.store(p, a_i, mask=in_batch)
        tl.store(p + H, a_f, mask=in_batch)
        tl.store(p + 2 * H, a_g, mask=in_batch)
        tl.store(p + 3 * H, a_o, mask=in_batch)
        dh_prev = product(a_i, w_i, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), PRECISION)
        dh_prev = product(a_f, w_f, dh_prev, PRECISION)
        dh_prev = product(a_g, w_g, dh_prev, PRECISION)
        dh_prev = product(a_o, w_o, dh_prev, PRECISION)
        if reset_mask is not None:
            dh_prev, dc_prev = tl.where(from_zero, 0, dh_prev), tl.where(from_zero, 0, dc_prev)
        dh, dc = tl.where(mask, dh_prev, dh), tl.where(mask, dc_prev, dc)
        i, f, g, o, c, mask = next_i, next_f, next_g, next_o, c_next, mask_next
        dy_t, dcells_t = dy_next, dcells_next
    tl.store(dh0 + at_state, rounded(dh, dtype), mask=in_batch)
    tl.store(dc0 + at_state, rounded(dc, dtype), mask=in_batch)
