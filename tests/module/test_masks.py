"""The masks of recurrent dropout and zoneout: statistics, seeds, sequences, replays."""

from __future__ import annotations

# ruff: noqa: F811 - fixtures of another file are arguments here
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlstm
from fastlstm.masks import Masks, flags
from fastlstm.ops.schema import LayerInputs

from .test_variants import drawn, every_variant, loop, lstm_of, supported  # noqa: F401 - fixtures


def test_recurrent_mask_is_one_for_a_sequence(drawn):
    lstm = fastlstm.LSTM(4, 64, 2, bidirectional=True, recurrent_dropout=0.25)
    resets = torch.zeros(10, 3, dtype=torch.bool)
    resets[0, 0] = resets[4, 1] = resets[6, 1] = True
    lstm(torch.randn(10, 3, 4))
    lstm(torch.randn(10, 3, 4), reset_mask=resets)
    for inputs in drawn[:2]:
        mask = inputs.recurrent_mask
        assert mask.shape == (2, 10, 3, 64)
        assert mask.stride(1) == 0
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert not torch.equal(mask[0, 0, 0], mask[1, 0, 0])
        assert not torch.equal(mask[0, 0, 0], mask[0, 0, 1])
    assert not torch.equal(drawn[0].recurrent_mask, drawn[1].recurrent_mask)
    with_resets = drawn[2].recurrent_mask
    for b, segments in enumerate([[(0, 10)], [(0, 4), (4, 6), (6, 10)], [(0, 10)]]):
        of_segment = [with_resets[0, start, b] for start, _ in segments]
        for (start, end), mask in zip(segments, of_segment, strict=True):
            assert torch.equal(with_resets[0, start:end, b], mask.expand(end - start, -1))
        assert len({tuple(mask.tolist()) for mask in of_segment}) == len(segments)


def test_zoneout_has_a_mask_for_each_step(drawn):
    fastlstm.LSTM(4, 64, zoneout=(0.25, 0.5))(torch.randn(10, 3, 4))
    inputs = drawn[0]
    assert inputs.zoneout_h.dtype == inputs.zoneout_c.dtype == torch.bool
    steps = [tuple(inputs.zoneout_h[0, t, b].tolist()) for t in range(10) for b in range(3)]
    assert len(set(steps)) == 30
    assert not torch.equal(inputs.zoneout_h, inputs.zoneout_c)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_frequency_of_flags(p):
    """Of n independent flags: mean within five standard deviations, and so is that of pairs of neighbours."""
    torch.manual_seed(0)
    n = 1 << 20
    sample = flags((n,), p, torch.device("cpu")).double()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(sample.mean().item() - p) <= 5 * deviation
    for lag in (1, 2, 64):
        both = (sample[lag:] * sample[:-lag]).mean().item()
        assert abs(both - p * p) <= 5 * (p * p * (1 - p * p) * 3 / n) ** 0.5
    if p in (0.0, 1.0):
        assert sample.unique().tolist() == [p]


def test_flags_follow_the_seed_and_not_the_threads():
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(11)
        found.append(flags((3, 70_001), 0.3, torch.device("cpu")))
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not torch.equal(found[0], flags((3, 70_001), 0.3, torch.device("cpu")))


@every_variant
def test_reproducible(kwargs, backend):
    lstm, x = lstm_of(**kwargs), torch.randn(6, 3, 4, dtype=torch.float64)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(lstm(x)[0])
    assert torch.equal(*results)
    assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])


@every_variant
def test_checkpoint_replays_masks(kwargs, backend):
    lstm, x = lstm_of(**kwargs), torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (lstm, lambda x: checkpoint(lstm, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run(x)[0].sum(), [x, *lstm.parameters()]))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


@every_variant
def test_recompute(kwargs, backend):
    lstm, x = lstm_of(**kwargs), torch.randn(7, 3, 4, dtype=torch.float64)
    grads = []
    for recompute in (False, 3):
        lstm.recompute = recompute
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(lstm(x, lengths=[7, 2, 5])[0].sum(), list(lstm.parameters())))
    torch.testing.assert_close(*grads)


def test_dropped_units_are_scaled_so_that_their_expectation_stays():
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(4, 256, recurrent_dropout=0.3)
    mean = torch.stack([m for m in _masks(lstm, 200)]).mean()
    assert abs(mean.item() - 1) < 0.01


def _masks(lstm, n):
    for _ in range(n):
        masks = Masks.of(0.3, 0.0, True)
        inputs = LayerInputs(torch.zeros(2, 1, 4), None, None, list(lstm.parameters()))
        yield masks.draw(inputs).recurrent_mask[0, 0]


def test_everything_dropped(backend):
    """recurrent_dropout=1: no step sees h, and nothing is NaN."""
    lstm, x = lstm_of(recurrent_dropout=1.0), torch.randn(4, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(lstm(x)[0], loop(lstm, x, mask=torch.zeros(2, 8, dtype=torch.float64))[0])
    kept = lstm_of(zoneout=1.0)
    assert not kept(x)[0].any()  # h and c keep their zeros
