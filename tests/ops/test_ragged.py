"""lengths, reset_mask and return_cell_states against equivalent torch code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm

from ..cases import Case
from ..module_pairs import data, flat, module_pair, naming
from ..runners import check

NAN = float("nan")


def mask_of(T: int, B: int, *flagged: tuple[int, int]) -> Tensor:
    mask = torch.zeros(T, B, dtype=torch.bool)
    for t, b in flagged:
        mask[t, b] = True
    return mask


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_replace_packing(batch_first, backend):
    ours, theirs = module_pair(num_layers=2, bidirectional=True, batch_first=batch_first)
    x, lengths = data(4, 7, 3) if batch_first else data(7, 4, 3), torch.tensor([3, 7, 1, 5])
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    packed_output, states = theirs(packed)
    output, _ = pad_packed_sequence(packed_output, batch_first, total_length=7)
    torch.testing.assert_close(flat(ours(x, lengths=lengths)), flat((output, states)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_every_integer_type(dtype):
    ours, _ = module_pair()
    x = data(5, 3, 3)
    expected = ours(x, lengths=[5, 0, 2])
    for lengths in (torch.tensor([5, 0, 2], dtype=dtype), torch.tensor([5, 9, 0, 9, 2], dtype=dtype)[::2]):
        stride = f"stride {lengths.stride(0)}"
        torch.testing.assert_close(ours(x, lengths=lengths), expected, rtol=0, atol=0, msg=naming(stride))


def test_full_lengths_equal_no_lengths(backend):
    ours, _ = module_pair(bidirectional=True, num_layers=2)
    x = data(5, 3, 3)
    torch.testing.assert_close(ours(x, lengths=[5, 5, 5]), ours(x))


def test_rows_of_length_zero_keep_their_state(backend):
    ours, _ = module_pair(bidirectional=True, num_layers=2)
    x, hx = data(5, 3, 3), (data(4, 3, 4).requires_grad_(), data(4, 3, 4, seed=1).requires_grad_())
    output, (h_n, c_n) = ours(x, hx, lengths=[0, 0, 0])
    assert not output.any()
    assert torch.equal(h_n, hx[0])
    assert torch.equal(c_n, hx[1])
    dh, dc = torch.autograd.grad((output, h_n, c_n), hx, (torch.ones_like(output), 2 * hx[0], 3 * hx[1]))
    assert torch.equal(dh, 2 * hx[0])
    assert torch.equal(dc, 3 * hx[1])
    assert not any(t.any() for t in flat(ours(x, lengths=[0, 0, 0])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 2}], ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_padding_is_ignored(value, kwargs, dtype, backend):
    ours, _ = module_pair(**kwargs, dtype=dtype)
    lengths, collected = torch.tensor([2, 6, 0]), []
    padding = (torch.arange(6)[:, None] >= lengths)[..., None]
    for fill in (0.0, value):
        ours.zero_grad()
        x = data(6, 3, 3).to(dtype).masked_fill(padding, fill).requires_grad_()
        results = flat(ours(x, lengths=lengths, return_cell_states=True))
        # The gradient that arrives in the padding is NaN too.
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        collected.append([*results, x.grad, *(w.grad for w in ours.parameters())])
    for clean, dirty in zip(*collected, strict=True):
        assert dirty.isfinite().all()
        assert torch.equal(dirty, clean)
    output, cells, dx = collected[1][0], collected[1][3], collected[1][4]
    for name, zero_there in {"output": output, "cells": cells, "dx": dx}.items():
        assert not zero_there.masked_select(padding).any(), name


def test_gradients_arriving_in_padding_are_ignored(backend):
    ours, _ = module_pair(bidirectional=True)
    x = data(6, 2, 3).requires_grad_()
    output, _, cells = ours(x, lengths=[2, 5], return_cell_states=True)
    padding = (torch.arange(6)[:, None] >= torch.tensor([2, 5]))[..., None]
    inputs = [x, *ours.parameters()]
    for name, out in {"output": output, "cells": cells}.items():
        grads = torch.autograd.grad(
            out, inputs, torch.zeros_like(out).masked_fill(padding, NAN), retain_graph=True, materialize_grads=True
        )
        assert not any(g.any() for g in grads), name


def test_reset_isolates_sequences(backend):
    ours, theirs = module_pair(num_layers=2)
    x, mask = data(6, 1, 3), mask_of(6, 1, (4, 0))
    output, states = ours(x, (data(2, 1, 4), data(2, 1, 4)), reset_mask=mask)
    tail, tail_states = theirs(x[4:])
    torch.testing.assert_close(output[4:], tail)
    torch.testing.assert_close(states, tail_states)


def test_reset_at_every_step_isolates_every_step(backend):
    ours, theirs = module_pair(num_layers=2, bidirectional=True)
    x = data(5, 2, 3)
    output, _ = ours(x, reset_mask=torch.ones(5, 2, dtype=torch.bool))
    expected, _ = theirs(x.reshape(1, 10, 3))
    torch.testing.assert_close(output, expected.view(5, 2, 8))


def test_reset_contributes_no_gradient_to_earlier_steps(backend):
    ours, _ = module_pair(num_layers=2, bidirectional=True)
    x, hx = data(6, 2, 3).requires_grad_(), (data(4, 2, 4).requires_grad_(), data(4, 2, 4).requires_grad_())
    output, _ = ours(x, hx, reset_mask=mask_of(6, 2, (2, 0), (4, 0), (3, 1)))
    dx, dh, dc = torch.autograd.grad(output[2:4, 0].sum(), (x, *hx))
    assert dx[2:4, 0].all()
    elsewhere = {"dx before": dx[:2, 0], "dx after": dx[4:, 0], "dx of the other row": dx[:, 1], "dh": dh, "dc": dc}
    for name, untouched in elsewhere.items():
        assert not untouched.any(), name


def test_reset_at_the_first_step_discards_hx(backend):
    ours, _ = module_pair(bidirectional=True)
    x, hx = data(5, 2, 3), (data(2, 2, 4).requires_grad_(), data(2, 2, 4, seed=1).requires_grad_())
    output, (h_n, _) = ours(x, hx, reset_mask=mask_of(5, 2, (0, 0)))
    with_hx, no_hx = ours(x, hx), ours(x)
    torch.testing.assert_close(output[:, 0, :4], no_hx[0][:, 0, :4])  # forward, flagged
    torch.testing.assert_close(output[:, 0, 4:], with_hx[0][:, 0, 4:])  # the reverse direction starts at the other end
    torch.testing.assert_close(output[:, 1], with_hx[0][:, 1])
    torch.testing.assert_close(h_n[1], with_hx[1][0][1])
    dh, _ = torch.autograd.grad(output[:, 0].sum(), hx)
    assert not dh[0, 0].any()
    assert dh[1, 0].all()


def test_mask_without_resets_equals_no_mask(backend):
    ours, _ = module_pair(bidirectional=True, num_layers=2)
    x, hx = data(5, 3, 3), (data(4, 3, 4), data(4, 3, 4))
    torch.testing.assert_close(ours(x, hx, reset_mask=mask_of(5, 3)), ours(x, hx))


def test_resets_after_the_length_are_ignored(backend):
    ours, _ = module_pair(bidirectional=True, num_layers=2)
    x, hx = data(6, 3, 3), (data(4, 3, 4), data(4, 3, 4))
    flags = ((2, 0), (3, 0), (5, 0), (5, 1), (0, 2), (1, 2))
    got = ours(x, hx, lengths=[2, 5, 0], reset_mask=mask_of(6, 3, *flags))
    torch.testing.assert_close(got, ours(x, hx, lengths=[2, 5, 0]))


def test_reset_mask_follows_batch_first_and_need_not_be_contiguous():
    ours, _ = module_pair()
    first, _ = module_pair(batch_first=True)
    x, mask = data(5, 2, 3), mask_of(5, 2, (2, 0), (4, 1))
    expected, _ = ours(x, reset_mask=mask)
    got, _ = first(x.transpose(0, 1), reset_mask=mask.t())
    torch.testing.assert_close(got.transpose(0, 1), expected)
    got, _ = ours(x, reset_mask=mask.repeat_interleave(2, 0)[::2])
    torch.testing.assert_close(got, expected)


def test_episodes_in_one_row_equal_episodes_one_by_one(backend):
    """As in reinforcement learning: three episodes of 2, 4 and 1 steps in one row."""
    ours, theirs = module_pair()
    x, starts = data(7, 1, 3), [0, 2, 6]
    output, _ = ours(x, reset_mask=mask_of(7, 1, *((t, 0) for t in starts)))
    parts = [theirs(x[start:end])[0] for start, end in zip(starts, [2, 6, 7], strict=True)]
    torch.testing.assert_close(output, torch.cat(parts))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_cell_states_equal_a_loop_of_cells(layers, bidirectional, batch_first, backend):
    """Values and gradients of a loss of the cell states only."""
    kwargs = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    ours, theirs = module_pair(**kwargs)
    x = data(2, 6, 3) if batch_first else data(6, 2, 3)
    output, _, cells = ours(x, return_cell_states=True)
    assert torch.equal(output, ours(x)[0])
    assert cells.shape == output.shape

    z = x.transpose(0, 1) if batch_first else x
    if layers == 2:  # the input of the last layer
        lower = nn.LSTM(3, 4, bidirectional=bidirectional, dtype=torch.float64)
        for name in lower.state_dict():
            setattr(lower, name, getattr(theirs, name))
        z, _ = lower(z)
    columns = []
    for suffix in ("", "_reverse")[: 1 + bidirectional]:
        cell = nn.LSTMCell(z.shape[2], 4, dtype=torch.float64)
        for name in cell.state_dict():
            setattr(cell, name, getattr(theirs, f"{name}_l{layers - 1}{suffix}"))
        state, results = None, [None] * 6
        for t in reversed(range(6)) if suffix else range(6):
            state = cell(z[t], state)
            results[t] = state[1]
        columns.append(torch.stack(results))
    expected = torch.cat(columns, -1)
    expected = expected.transpose(0, 1) if batch_first else expected
    torch.testing.assert_close(cells, expected)
    weights = data(*expected.shape, seed=5)
    got = torch.autograd.grad(cells, list(ours.parameters()), weights)
    torch.testing.assert_close(got, torch.autograd.grad(expected, list(theirs.parameters()), weights))


def test_cell_states_have_h_features_with_a_projection_and_end_in_c_n(backend):
    ours, _ = module_pair(proj_size=2, bidirectional=True)
    output, (_, c_n), cells = ours(data(5, 2, 3), return_cell_states=True)
    assert output.shape == (5, 2, 4)
    assert cells.shape == (5, 2, 8)
    assert torch.equal(cells[-1, :, :4], c_n[0])
    assert torch.equal(cells[0, :, 4:], c_n[1])


def test_unbatched_and_packed(backend):
    ours, _ = module_pair(bidirectional=True)
    x = data(5, 1, 3)
    mask = mask_of(5, 1, (2, 0))
    expected = flat(ours(x, lengths=[4], reset_mask=mask, return_cell_states=True))
    got = flat(ours(x[:, 0], lengths=torch.tensor(4), reset_mask=mask[:, 0], return_cell_states=True))
    for mine, batched in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, batched[:, 0])
    packed = pack_padded_sequence(x, torch.tensor([4]))
    _, _, cells = ours(packed, return_cell_states=True)
    _, _, expected_cells = ours(x, lengths=[4], return_cell_states=True)
    torch.testing.assert_close(pad_packed_sequence(cells, total_length=5)[0], expected_cells)


@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_of_very_different_lengths(packed, backend):
    lengths = (40, 1, 39, 7, 2, 25) if packed else (40, 0, 1, 39, 7, 0)
    check(Case(T=40, B=6, I=3, H=20, lengths=lengths, packed=packed, bidirectional=True, hx="tuple"), backend)


def test_dropout_and_lengths_together():
    lstm = fastlstm.LSTM(3, 4, 2, dropout=0.5)
    output, _ = lstm(torch.randn(6, 3, 3), lengths=[6, 2, 0])
    assert output[:, 0].all()
    assert output[:2, 1].all()
    assert not output[2:, 1].any()
    assert not output[:, 2].any()
