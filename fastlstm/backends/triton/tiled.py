"""Kernels for larger H, where W_hh is read through the cache: one tile of product and cell, in two kinds of launch.

`_forward_tile` and `_backward_tile` compute one step of BLOCK_B rows and BLOCK_N units: a product over blocks of
BLOCK_K, then the cell as its epilogue. The `step` kernels run one step per launch, with tiles distributed over the
device. The `streamed` kernels loop over time inside one launch; a program processes all units of its rows, tile after
tile, with a barrier between steps. State passes between tiles through buffers that stay in the cache; h and dgates are
read by other tiles than wrote them, so h is double-buffered by the parity of the step. H is a run-time argument: one
compilation covers all H that are divisible by the same ALIGN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cell import cell_backward, cell_forward, has_step, product, rounded, row_lengths, starts_from_zero_state


@triton.jit
def _forward_tile(
    gates,  # [D, T, B, 4H] in and out; shapes and roles as in step_tiled_fwd
    w_hh,  # [D, 4H, H]
    h_state,  # [2, D, B, H]
    c_state,  # [D, B, H] fp32
    lengths,  # [B] or None
    reset_mask,  # [T, B] or None
    y,  # [T, B, D*H]
    cells,  # [T, B, D*H] or None
    s,
    d,
    first_b,  # the tile's first row of the batch, int64
    first_n,  # the tile's first unit
    T,
    B,
    H,
    D: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step s of direction d for one tile."""
    dtype = y.dtype.element_ty
    t = s + d * (T - 1 - 2 * s)
    r = tl.arange(0, BLOCK_B)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    length = row_lengths(lengths, first_b + r, T, B)
    in_batch = (first_b + r < B)[:, None]
    valid = (t < length)[:, None]
    carry = in_batch  # rows whose previous state is used
    if reset_mask is not None:
        carry = in_batch & ~starts_from_zero_state(reset_mask, t, d, first_b + r, length, B)[:, None]
    tile_mask = in_batch & (n < H)[None, :]
    mask = valid & (n < H)[None, :]

    plane = tl.cast(B, tl.int64) * H
    tile = (d * plane + first_b * H) + r[:, None] * H
    h_prev_ptr = h_state + (s % 2) * D * plane + tile + k[None, :]
    w_i = w_hh + tl.cast(d, tl.int64) * (4 * H * H) + n[None, :] * H + k[:, None]  # [BLOCK_K, BLOCK_N]: W_hh^T
    p = gates + ((tl.cast(d, tl.int64) * T + t) * B + first_b) * (4 * H) + r[:, None] * (4 * H) + n[None, :]
    a_i = tl.load(p, mask=mask, other=0).to(tl.float32)
    a_f = tl.load(p + H, mask=mask, other=0).to(tl.float32)
    a_g = tl.load(p + 2 * H, mask=mask, other=0).to(tl.float32)
    a_o = tl.load(p + 3 * H, mask=mask, other=0).to(tl.float32)
    for k0 in range(0, H, BLOCK_K):
        in_k = k0 + k < H
        h = tl.load(h_prev_ptr + k0, mask=carry & in_k[None, :], other=0)
        in_w = in_k[:, None] & (n < H)[None, :]
        a_i = product(h, tl.load(w_i + k0, mask=in_w, other=0), a_i, PRECISION)
        a_f = product(h, tl.load(w_i + k0 + H * H, mask=in_w, other=0), a_f, PRECISION)
        a_g = product(h, tl.load(w_i + k0 + 2 * H * H, mask=in_w, other=0), a_g, PRECISION)
        a_o = product(h, tl.load(w_i + k0 + 3 * H * H, mask=in_w, other=0), a_o, PRECISION)
    c_prev = tl.load(c_state + tile + n[None, :], mask=tile_mask, other=0)
    i, f, g, o, c, h_new = cell_forward(a_i, a_f, a_g, a_o, tl.where(carry, c_prev, 0))
    h_new = rounded(h_new, dtype)
    if KEEP_GATES:
        tl.store(p, rounded(i, dtype), mask=mask)
        tl.store(p + H, rounded(f, dtype), mask=mask)
        tl.store(p + 2 * H, rounded(g, dtype), mask=mask)
        tl.store(p + 3 * H, rounded(o, dtype), mask=mask)
    at_y = (tl.cast(t, tl.int64) * B + first_b) * (D * H) + d * H + r[:, None] * (D * H) + n[None, :]
    tl.store(y + at_y, tl.where(valid, h_new, 0), mask=tile_mask)
    if cells is not None:
        tl.store(cells + at_y, rounded(tl.where(valid, c, 0), dtype), mask=tile_mask)
    # A row without the step keeps its state.
    if lengths is not None:
        h_prev = tl.load(h_state + (s % 2) * D * plane + tile + n[None, :], mask=tile_mask, other=0)
        h_new, c = tl.where(valid, h_new, h_prev), tl.where(valid, c, c_prev)
    tl.store(h_state + ((s + 1) % 2) * D * plane + tile + n[None, :], h_new, mask=tile_mask)
    tl.store(c_state + tile + n[None, :], c, mask=tile_mask)


@triton.jit
def _backward_tile(
    dy,  # [T, B, D*H] or None; shapes and roles as in step_tiled_bwd
    dcells,  # [T, B, D*H] or None
    gates,  # [D, T, B, 4H]
    cells,  # [T, B, D*H]
    c0,  # [D, B, H] or None
    w_hh,  # [D, 4H, H]
    lengths,  # [B] or None
    reset_mask,  # [T, B] or None
    dgates,  # [D, T, B, 4H] out
    dh_state,  # [D, B, H] fp32
    dc_state,  # [D, B, H] fp32
    s,
    d,
    first_b,  # the tile's first row of the batch, int64
    first_n,  # the tile's first unit
    T,
    B,
    H,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The s-th last step of direction d for one tile; s = T leaves the gradient of h0 in dh_state."""
    dtype = dgates.dtype.element_ty
    t = (T - 1 - s) + d * (2 * s - T + 1)
    r = tl.arange(0, BLOCK_B)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = first_b + r
    length = row_lengths(lengths, row, T, B)
    tile_mask = (row < B)[:, None] & (n < H)[None, :]
    at_state = d * tl.cast(B, tl.int64) * H + first_b * H + r[:, None] * H + n[None, :]

    # dh = dgates of the next step (in scan order) times W_hh, if the row has that step.
    after = t + 1 - 2 * d
    at_after = ((tl.cast(d, tl.int64) * T + after) * B + first_b) * (4 * H) + r[:, None] * (4 * H)
    w = w_hh + tl.cast(d, tl.int64) * (4 * H * H) + n[None, :]
    dh = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for k0 in range(0, tl.where(s > 0, 4 * H, 0), BLOCK_K):
        in_k = k0 + k < 4 * H
        da = tl.load(dgates + at_after + (k0 + k)[None, :], mask=(row < B)[:, None] & in_k[None, :], other=0)
        in_w = in_k[:, None] & (n < H)[None, :]
        dh = product(da, tl.load(w + (k0 + k)[:, None] * H, mask=in_w, other=0), dh, PRECISION)
    if reset_mask is not None:
        dh = tl.where(starts_from_zero_state(reset_mask, after, d, row, length, B)[:, None], 0, dh)
    passed = has_step(after, length)
    dh = tl.where(passed[:, None], dh, tl.load(dh_state + at_state, mask=tile_mask & ~passed[:, None], other=0))
    if lengths is not None or s == T:  # without lengths dh_state is read at s = 0 alone
        tl.store(dh_state + at_state, dh, mask=tile_mask)
    if s < T:
        valid = (t < length)[:, None]
        mask = valid & (n < H)[None, :]
        p = ((tl.cast(d, tl.int64) * T + t) * B + first_b) * (4 * H) + r[:, None] * (4 * H) + n[None, :]
        i = tl.load(gates + p, mask=mask, other=0).to(tl.float32)
        f = tl.load(gates + p + H, mask=mask, other=0).to(tl.float32)
        g = tl.load(gates + p + 2 * H, mask=mask, other=0).to(tl.float32)
        o = tl.load(gates + p + 3 * H, mask=mask, other=0).to(tl.float32)
        at_y = r[:, None] * (D * H) + d * H + n[None, :]
        here = (tl.cast(t, tl.int64) * B + first_b) * (D * H) + at_y
        c = tl.load(cells + here, mask=mask, other=0).to(tl.float32)
        # c_prev: of the previous step, or c0 if there is none; zero if t is reset.
        before = t - 1 + 2 * d
        inside = has_step(before, length)[:, None]
        at_before = (tl.cast(before, tl.int64) * B + first_b) * (D * H) + at_y
        c_prev = tl.load(cells + at_before, mask=mask & inside, other=0).to(tl.float32)
        if c0 is not None:
            c_prev += tl.load(c0 + at_state, mask=mask & ~inside, other=0).to(tl.float32)
        dc = tl.load(dc_state + at_state, mask=tile_mask, other=0)
        dc_t = dc
        if dy is not None:
            dh += tl.load(dy + here, mask=mask, other=0).to(tl.float32)
        if dcells is not None:
            dc_t += tl.load(dcells + here, mask=mask, other=0).to(tl.float32)
        if reset_mask is not None:
            from_zero = starts_from_zero_state(reset_mask, t, d, row, length, B)[:, None]
            c_prev = tl.where(from_zero, 0, c_prev)
        a_i, a_f, a_g, a_o, dc_prev = cell_backward(i, f, g, o, c, c_prev, dh, dc_t)
        if reset_mask is not None:
            dc_prev = tl.where(from_zero, 0, dc_prev)
        tl.store(dgates + p, rounded(tl.where(valid, a_i, 0), dtype), mask=tile_mask)
        tl.store(dgates + p + H, rounded(tl.where(valid, a_f, 0), dtype), mask=tile_mask)
        tl.store(dgates + p + 2 * H, rounded(tl.where(valid, a_g, 0), dtype), mask=tile_mask)
        tl.store(dgates + p + 3 * H, rounded(tl.where(valid, a_o, 0), dtype), mask=tile_mask)
        tl.store(dc_state + at_state, tl.where(valid, dc_prev, dc), mask=tile_mask)


@triton.jit(do_not_specialize=["s", "T", "B", "spans"])
def step_tiled_fwd(
    gates,  # [D, T, B, 4H] in: x W_ih^T + b_ih + b_hh. Out, where KEEP_GATES: activated gates
    w_hh,  # [D, 4H, H]
    h_state,  # [2, D, B, H] in: h before step s in [s % 2]. Out: h after it in the other
    c_state,  # [D, B, H] fp32, in and out
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    y,  # [T, B, D*H] out
    cells,  # [T, B, D*H] out, or None
    s,  # step, in scan order
    T,  # run-time, as are B and H: no recompilation when they change
    B,
    spans,  # H / ALIGN: the compiler derives the divisibility of H = spans * ALIGN
    ALIGN: tl.constexpr,  # a power of two that divides H, for the width of loads
    D: tl.constexpr,  # directions, 1 or 2: part of every stride of y
    KEEP_GATES: tl.constexpr,  # store the activated gates for backward
    BLOCK_B: tl.constexpr,  # rows of the batch in a tile
    BLOCK_N: tl.constexpr,  # units in a tile (four times as many gate rows of W_hh)
    BLOCK_K: tl.constexpr,  # units of h per K iteration
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of fp32 products
):
    """One step of all directions. Grid (tiles of units times tiles of the batch, D)."""
    H = spans * ALIGN
    tiles = tl.cdiv(H, BLOCK_N)
    first_n, first_b = tl.program_id(0) % tiles * BLOCK_N, (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_B
    _forward_tile(
        gates, w_hh, h_state, c_state, lengths, reset_mask, y, cells, s, tl.program_id(1), first_b, first_n,
        T, B, H, D, KEEP_GATES, BLOCK_B, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "spans"])
def layer_streamed_fwd(
    gates,  # [D, T, B, 4H]; all arguments as in step_tiled_fwd
    w_hh,  # [D, 4H, H]
    h_state,  # [2, D, B, H] in: h0 in [0]. Out: h_n in [T % 2]
    c_state,  # [D, B, H] fp32 in: c0. Out: c_n
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    y,  # [T, B, D*H] out
    cells,  # [T, B, D*H] out, or None
    T,
    B,
    spans,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All steps of all directions. Grid (tiles of the batch, D)."""
    H = spans * ALIGN
    first_b, d = tl.program_id(0).to(tl.int64) * BLOCK_B, tl.program_id(1)
    for s in range(T):
        for first_n in range(0, H, BLOCK_N):
            _forward_tile(
                gates, w_hh, h_state, c_state, lengths, reset_mask, y, cells, s, d, first_b, first_n,
                T, B, H, D, KEEP_GATES, BLOCK_B, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next step reads h of every tile


@triton.jit(do_not_specialize=["s", "T", "B", "spans"])
def step_tiled_bwd(
    dy,  # [T, B, D*H] or None for zeros
    dcells,  # [T, B, D*H] or None for zeros
    gates,  # [D, T, B, 4H] activated, saved by forward
    cells,  # [T, B, D*H]
    c0,  # [D, B, H] or None for zeros
    w_hh,  # [D, 4H, H]
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    dgates,  # [D, T, B, 4H] out: of the pre-activations, zero for a row without the step
    dh_state,  # [D, B, H] fp32 in: gradient of h_n. Out, after s = T: of h0
    dc_state,  # [D, B, H] fp32 in: gradient of c_n. Out: of c0
    s,  # number of later steps in scan order; T for the gradient of h0
    T,  # run-time, as are B and H: no recompilation when they change
    B,
    spans,  # H / ALIGN: the compiler derives the divisibility of H = spans * ALIGN
    ALIGN: tl.constexpr,  # a power of two that divides H, for the width of loads
    D: tl.constexpr,  # directions, 1 or 2: part of every stride of y
    BLOCK_B: tl.constexpr,  # rows of the batch in a tile
    BLOCK_N: tl.constexpr,  # units in a tile
    BLOCK_K: tl.constexpr,  # gate rows of W_hh per K iteration
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of fp32 products
):
    """One step back of all directions. Grid (tiles of units times tiles of the batch, D)."""
    H = spans * ALIGN
    tiles = tl.cdiv(H, BLOCK_N)
    first_n, first_b = tl.program_id(0) % tiles * BLOCK_N, (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_B
    _backward_tile(
        dy, dcells, gates, cells, c0, w_hh, lengths, reset_mask, dgates, dh_state, dc_state, s, tl.program_id(1),
        first_b, first_n, T, B, H, D, BLOCK_B, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "spans"])
def layer_streamed_bwd(
    dy,  # [T, B, D*H] or None; all arguments as in step_tiled_bwd
    dcells,  # [T, B, D*H] or None
    gates,  # [D, T, B, 4H]
    cells,  # [T, B, D*H]
    c0,  # [D, B, H] or None
    w_hh,  # [D, 4H, H]
    lengths,  # [B] int64 or None
    reset_mask,  # [T, B] uint8 or None
    dgates,  # [D, T, B, 4H] out
    dh_state,  # [D, B, H] fp32
    dc_state,  # [D, B, H] fp32
    T,
    B,
    spans,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All steps of all directions, last first. Grid (tiles of the batch, D)."""
    H = spans * ALIGN
    first_b, d = tl.program_id(0).to(tl.int64) * BLOCK_B, tl.program_id(1)
    for s in range(T + 1):
        for first_n in range(0, H, BLOCK_N):
            _backward_tile(
                dy, dcells, gates, cells, c0, w_hh, lengths, reset_mask, dgates, dh_state, dc_state, s, d,
                first_b, first_n, T, B, H, D, BLOCK_B, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next step reads dgates of every tile
