"""The forward pass besides its values: layout of results, dropout, autocast, NaN, packing, as in nn.LSTM."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fastlstm

from ..module_pairs import assert_same, data, flat, module_pair

LAYOUTS = (
    {},
    {"num_layers": 2},
    {"batch_first": True},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"proj_size": 2, "num_layers": 2},
)
every_layout = pytest.mark.parametrize("kwargs", LAYOUTS, ids=str)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 3), (1, 2, 3), (5, 1, 3), (5, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_layout_of_results(kwargs, dtype, shape, with_hx, backend):
    ours, theirs = module_pair(**kwargs, dtype=dtype)
    x, hx = data(*shape).to(dtype), None
    if with_hx:
        batch = shape[:-1][0 if kwargs.get("batch_first") else 1 :][:1] if len(shape) == 3 else ()
        S = theirs.num_layers * (2 if theirs.bidirectional else 1)
        hx = (data(S, *batch, theirs.proj_size or 4).to(dtype), data(S, *batch, 4).to(dtype))
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with grad_mode():
            got, expected = ours(x, hx), theirs(x, hx)
        mode = grad_mode.__name__
        assert type(got) is tuple, mode
        assert len(got) == 2, mode
        assert type(got[1]) is tuple, mode
        assert len(got[1]) == 2, mode
        for our_tensor, their_tensor in zip(flat(got), flat(expected), strict=True):
            assert our_tensor.shape == their_tensor.shape, mode
            assert our_tensor.dtype == their_tensor.dtype, mode
            assert our_tensor.requires_grad == their_tensor.requires_grad, mode
            if their_tensor.is_contiguous():
                assert our_tensor.is_contiguous(), mode


def test_default_state_takes_the_dtype_of_the_input():
    before = torch.get_default_dtype()
    lstm, x = fastlstm.LSTM(3, 4), torch.zeros(2, 1, 3)
    try:
        torch.set_default_dtype(torch.float64)
        assert {t.dtype for t in flat(lstm(x))} == {torch.float32}
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for t in flat(lstm.double()(x.double()))} == {torch.float64}


def test_input_and_state_are_not_written_to(backend):
    ours, _ = module_pair(num_layers=2, bidirectional=True)
    x, h0, c0 = data(5, 2, 3), data(4, 2, 4), data(4, 2, 4, seed=1)
    before = [t.clone() for t in (x, h0, c0, *ours.parameters())]
    results = flat(ours(x.requires_grad_(), (h0, c0)))
    kept = [t.detach().clone() for t in results]
    sum(t.sum() for t in results).backward()
    for t, value in zip((x, h0, c0, *ours.parameters()), before, strict=True):
        assert torch.equal(t, value)
    for t, value in zip(results, kept, strict=True):
        assert torch.equal(t, value)


def test_results_do_not_alias_hx():
    ours, _ = module_pair()
    hx = (data(1, 2, 4), data(1, 2, 4))
    _, (h_n, c_n) = ours(data(5, 2, 3), hx, lengths=[0, 0])
    assert torch.equal(h_n, hx[0])
    h_n.zero_()
    c_n.zero_()
    assert hx[0].any()
    assert hx[1].any()


@every_layout
def test_empty_batch(kwargs, backend):
    ours, theirs = module_pair(**kwargs)
    x = torch.zeros((0, 5, 3) if kwargs.get("batch_first") else (5, 0, 3), dtype=torch.float64, requires_grad=True)
    for our_tensor, their_tensor in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        assert our_tensor.shape == their_tensor.shape
    sum(t.sum() for t in flat(ours(x))).backward()
    assert x.grad.shape == x.shape
    for weight in ours.parameters():
        assert not weight.grad.any()


def test_empty_batch_ragged(backend):
    ours, _ = module_pair(bidirectional=True)
    x = torch.zeros(5, 0, 3, dtype=torch.float64)
    mask = torch.zeros(5, 0, dtype=torch.bool)
    output, (h_n, _), cells = ours(x, lengths=[], reset_mask=mask, return_cell_states=True)
    assert output.shape == cells.shape == (5, 0, 8)
    assert h_n.shape == (2, 0, 4)


@pytest.mark.parametrize("where", ["input", "hx"])
def test_nan_stays_in_its_own_row(where, backend):
    ours, theirs = module_pair(num_layers=2, bidirectional=True)
    x, hx = data(5, 4, 3), (data(4, 4, 4), data(4, 4, 4, seed=1))
    clean = flat(ours(x, hx))
    (x if where == "input" else hx[0])[..., 2, :] = float("nan")
    x.requires_grad_()
    got, others = flat(ours(x, hx)), torch.tensor([0, 1, 3])
    for our_tensor, their_tensor, untouched in zip(got, flat(theirs(x, hx)), clean, strict=True):
        assert torch.equal(our_tensor.isnan(), their_tensor.isnan())
        torch.testing.assert_close(our_tensor[:, others], untouched[:, others])
    sum(t[:, others].sum() for t in got).backward()
    assert x.grad[:, others].isfinite().all()


@pytest.mark.parametrize("value", [1e30, -1e30, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_extreme_inputs_saturate_as_in_nn_lstm(value, dtype, backend):
    ours, theirs = module_pair(dtype=dtype)
    x = torch.full((3, 2, 3), value, dtype=dtype)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight_ih_l0.abs_()  # avoids inf - inf
        for our_tensor, their_tensor in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            torch.testing.assert_close(our_tensor, their_tensor, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_layers": 2, "dropout": 0.5},
        {"num_layers": 3, "dropout": 0.3, "bidirectional": True},
        {"num_layers": 2, "dropout": 0.5, "batch_first": True, "proj_size": 2},
        {"num_layers": 2, "dropout": 1.0},
    ],
    ids=str,
)
def test_dropout_draws_the_mask_of_nn_lstm(kwargs):
    ours, theirs = module_pair(**kwargs)
    x, results = data(6, 3, 3), []
    for module in (ours, theirs):
        torch.manual_seed(11)
        results.append([*flat(module(x)), torch.rand(1)])
    torch.testing.assert_close(*results)
    torch.manual_seed(11)
    assert torch.equal(ours(x)[0], results[0][0])
    if kwargs["dropout"] < 1:
        assert not torch.equal(ours(x)[0], results[0][0])  # masks differ from call to call
    assert_same(ours.eval(), theirs.eval(), x)


def test_dropout_skips_first_layers_state_and_last_layers_output():
    ours, _ = module_pair(num_layers=2, dropout=0.9)
    dropped, kept = ours(data(6, 3, 3)), ours.eval()(data(6, 3, 3))
    assert torch.equal(dropped[1][0][0], kept[1][0][0])
    assert (dropped[0] != 0).all()
    assert not torch.equal(dropped[0], kept[0])


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed_sequence(enforce_sorted, with_hx, backend):
    pair = module_pair(num_layers=2, bidirectional=True, proj_size=2)
    lengths = torch.tensor([5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4])
    packed = pack_padded_sequence(data(5, 4, 3), lengths, enforce_sorted=enforce_sorted)
    hx = (data(4, 4, 2), data(4, 4, 4)) if with_hx else None
    assert_same(*pair, packed, hx)
    got, _ = pair[0](packed, hx)
    assert isinstance(got, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(got, name) is getattr(packed, name)


def test_packed_sequence_from_single_rows():
    pair = module_pair()
    assert_same(*pair, pack_sequence([data(3, 3)]))
    assert_same(*pair, pack_sequence([data(1, 3), data(1, 3)]))
    assert_same(*pair, pack_sequence([data(4, 3), data(2, 3)]), [data(1, 2, 4), data(1, 2, 4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_autocast(dtype, kwargs, backend):
    """float32 inputs are cast. nn.LSTM does so if its CPU library supports the dtype, and raises otherwise."""
    lstm, cast = module_pair(**kwargs, dtype=torch.float32)[0], fastlstm.LSTM(3, 4, **kwargs, dtype=dtype)
    cast.load_state_dict(lstm.state_dict())
    x, low = data(4, 2, 3).float().requires_grad_(), data(4, 2, 3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        got = flat(lstm(x))
    expected = flat(cast(low))
    for our_tensor, their_tensor in zip(got, expected, strict=True):
        assert our_tensor.dtype == dtype
        assert torch.equal(our_tensor, their_tensor)
    for results in (got, expected):
        sum(t.sum() for t in results).backward()
    for our_tensor, their_tensor in zip((x, *lstm.parameters()), (low, *cast.parameters()), strict=True):
        assert our_tensor.grad.dtype == torch.float32
        assert torch.equal(our_tensor.grad, their_tensor.grad.float())
    with torch.autocast("cpu", dtype, enabled=False):
        assert lstm(x)[0].dtype == torch.float32


@pytest.mark.parametrize("with_hx", [False, True])
def test_autocast_of_inputs_in_its_dtype_is_nn_lstms(with_hx):
    ours, theirs = module_pair(dtype=torch.float32)
    x, hx = data(4, 2, 3).bfloat16(), (data(1, 2, 4).bfloat16(), data(1, 2, 4).bfloat16()) if with_hx else None
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x, hx), theirs(x, hx)
    for our_tensor, their_tensor in zip(flat(got), flat(expected), strict=True):
        assert our_tensor.dtype == their_tensor.dtype
        torch.testing.assert_close(our_tensor, their_tensor, rtol=2e-2, atol=1e-2)


def test_autocast_does_not_change_float64():
    ours, theirs = module_pair()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flat(ours(data(4, 2, 3))), flat(theirs(data(4, 2, 3))))


def test_inference_mode(backend):
    ours, theirs = module_pair(num_layers=2)
    with torch.inference_mode():
        output, _ = ours(data(4, 2, 3))
        torch.testing.assert_close(output, theirs(data(4, 2, 3))[0])
    assert output.is_inference()


def test_streaming_equals_the_whole_sequence(backend):
    ours, _ = module_pair(num_layers=2, proj_size=2)
    x, state, outputs = data(6, 2, 3), None, []
    whole, (h_n, c_n) = ours(x)
    for t in range(6):
        output, state = ours(x[t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(state, (h_n, c_n))


def test_inside_a_model_with_named_parameters():
    model = nn.ModuleDict({"encoder": fastlstm.LSTM(3, 4)})
    assert next(iter(model.state_dict())) == "encoder.weight_ih_l0"
    assert repr(model) == "ModuleDict(\n  (encoder): LSTM(3, 4)\n)"
