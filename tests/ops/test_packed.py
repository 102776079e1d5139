"""PackedSequence: packed rows in the native op, its contract for them, and calls that fall back to padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm
from fastlstm import backends, dispatch
from fastlstm.ragged import PackedLayout

from ..cases import Case
from ..module_pairs import assert_same, data, module_pair, naming
from .test_ops import backward_arguments, flat, forward_arguments, ops

LENGTHS = (6, 4, 4, 1)  # sorted as in a PackedSequence
ONE_LAYER = Case(T=6, B=4, lengths=LENGTHS)
CASES = (
    ONE_LAYER,
    Case(T=6, B=4, lengths=LENGTHS, bidirectional=True, proj=2, hx="tuple", cells=True),
    Case(T=6, B=4, H=37, I=5, lengths=(6, 6, 6, 6), bidirectional=True, bias=False, hx="tuple"),
    Case(T=1, B=1, I=1, H=1, lengths=(1,), hx="tuple", cells=True),
    Case(T=70, B=9, I=6, H=20, lengths=(70, 50, 50, 33, 9, 2, 1, 1, 1), bidirectional=True, cells=True),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

needs_native = pytest.mark.skipif(backends.native.extension is None, reason="the extension is not built")


def packed_arguments(case, dtype=torch.float32, requires_grad=False):
    """Arguments of the native op with packed rows, and the layout that packs those of forward_arguments."""
    x, *rest = forward_arguments(case, dtype, requires_grad=requires_grad)
    layout = PackedLayout.of_lengths(rest[3])
    return [layout.pack(x).detach().requires_grad_(requires_grad), *rest], layout


def packed_batch(*lengths: int, features: int = 3, enforce_sorted: bool = False) -> PackedSequence:
    return pack_padded_sequence(
        data(max(lengths), len(lengths), features), torch.tensor(lengths), enforce_sorted=enforce_sorted
    )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_rows_equal_padded_rows(case, dtype, poisoned_empty):
    """Forward and each single gradient are bitwise equal: only the order of rows differs."""
    forward, backward = ops("native")
    arguments = forward_arguments(case, dtype)
    packed, layout = packed_arguments(case, dtype)
    y, h_n, c_n, cells, _ = forward(*arguments)
    results = forward(*packed)
    for our_tensor, padded in zip(results, (layout.pack(y), h_n, c_n, layout.pack(cells)), strict=False):
        assert torch.equal(our_tensor, padded)
        assert our_tensor.is_contiguous()
    D = 2 if case.bidirectional else 1
    assert results[4].shape == (D, sum(case.lengths), 4 * case.H)
    assert results[4].isfinite().all()

    full, small = backward_arguments(forward, arguments), backward_arguments(forward, packed)
    for present in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        for k in range(4):
            if k not in present:
                full[k] = small[k] = None
            elif case.cells or k < 3:
                full[k] = torch.linspace(-1, 1, (y, h_n, c_n, cells)[k].numel(), dtype=torch.float64)
                full[k] = full[k].to(dtype).view((y, h_n, c_n, cells)[k].shape)
                small[k] = layout.pack(full[k]) if k in (0, 3) else full[k]
        for needs in [full[-1], *[[i == k and n for i, n in enumerate(full[-1])] for k in range(len(full[-1]))]]:
            expected = backward(*full[:-1], needs)
            got = flat(backward(*small[:-1], needs))
            expected = flat([layout.pack(expected[0]) if needs[0] else expected[0], *expected[1:]])
            for our_tensor, padded in zip(got, expected, strict=True):
                assert torch.equal(our_tensor, padded)


@needs_native
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_packed_rows(case, requires_grad):
    forward, backward = ops("native")
    arguments, _ = packed_arguments(case, requires_grad=requires_grad)
    opcheck(forward, arguments)
    if not requires_grad:
        opcheck(backward, backward_arguments(forward, arguments))


@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_kernels_of_packed_rows(case):
    forward, backward = ops("native")
    arguments, _ = packed_arguments(case)
    for op, args in ((forward, arguments), (backward, backward_arguments(forward, arguments))):
        real = flat(op(*args))
        with FakeTensorMode() as mode:
            convert = lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a  # noqa: E731
            fake = flat(op(*[[convert(w) for w in a] if isinstance(a, list) else convert(a) for a in args]))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@needs_native
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([2, 3], 5), ([3, 2], 6), ([3, 2], 4), ([3, -1], 2), ([2**62, 2**62, 2**62, 2**62], 0), ([-1], 3), ([3, 3], 3)],
    ids=str,
)
def test_lengths_must_match_the_packed_rows(lengths, rows):
    (_, *rest), _ = packed_arguments(ONE_LAYER)
    rest[3] = torch.tensor(lengths)
    with pytest.raises(RuntimeError, match=rf"lengths of packed rows must not rise and have the sum N={rows}, got \["):
        torch.ops.fastlstm.native_layer(torch.zeros(rows, 3), *rest)


@needs_native
def test_arguments_that_packed_rows_refuse():
    (x, h0, c0, weights, lengths, _, *keep), _ = packed_arguments(ONE_LAYER)
    op = torch.ops.fastlstm.native_layer
    mask = torch.zeros(6, 4, dtype=torch.bool)
    for arguments, message in (
        ((x, h0, c0, weights, None, None), r"x must be \[T, B, I\], got \[15, 4\]"),
        ((x, h0, c0, weights, lengths, mask), "reset_mask must be None with packed rows"),
        ((x, h0, c0, weights, lengths.int(), None), r"lengths of packed rows must be int64 \[B\], got Int"),
        ((x, h0, c0, weights, lengths[None], None), r"must be int64 \[B\], got Long \[1, 4\]"),
        ((x, h0, c0, weights, torch.tensor(15), None), r"must be int64 \[B\], got Long \[\]"),
        ((x[:0], h0, c0, weights, lengths[:0], None), "Expected sequence length to be larger than 0"),
        ((x, torch.zeros(1, 3, 4), c0, weights, lengths, None), r"h0 must be \[1, 4, 6\], got \[1, 3, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, *keep)
    for name in ("eager", "triton"):
        if name in dispatch.BACKENDS:
            with pytest.raises(RuntimeError, match=r"x must be \[T, B, I\], got \[15, 4\]"):
                getattr(torch.ops.fastlstm, f"{name}_layer")(x, h0, c0, weights, lengths, None, *keep)


@needs_native
@pytest.mark.parametrize(
    "batch_sizes",
    [[2, 3], [3, 1], [3, 2, 1], [5, 0], [-1, 6], [2**62, 2**62, 2**62, 2**62, 5], [], [[3, 2]]],
    ids=str,
)
def test_batch_sizes_must_sum_to_the_rows(batch_sizes):
    """The extension leaves them to Python, and no kernel runs."""
    lstm = fastlstm.LSTM(3, 4)
    rows = torch.zeros(5, 3)
    assert dispatch.fast_path(lstm, "lstm", "frozen_lstm", rows, None, torch.tensor([3, 2]))[0] is not None
    for sizes in (torch.tensor(batch_sizes), torch.tensor([3, 2], dtype=torch.int32), torch.tensor([3, 9, 2])[::2]):
        sizes = sizes.long() if sizes.numel() == 0 else sizes
        assert dispatch.fast_path(lstm, "lstm", "frozen_lstm", rows, None, sizes)[0] is None


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("batch_sizes", [[2, 3], [3, 2, 3], [4, 2, 3, 1], [3, 9, 2], [1, 2], [3, 1, 2]], ids=str)
def test_increasing_batch_sizes_are_refused(batch_sizes, states, backend):
    """PackedSequence does not check them; nn.LSTM's states have too few rows."""
    packed_input = PackedSequence(data(sum(batch_sizes), 3), torch.tensor(batch_sizes))
    hx = tuple(data(1, batch_sizes[0], 4, seed=k) for k in (1, 2)) if states else None
    for module in module_pair():
        with pytest.raises(RuntimeError) as caught:
            module(packed_input, hx)
        if isinstance(module, fastlstm.LSTM):
            assert "batch_sizes must not rise" in str(caught.value)


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "proj_size": 2}, {"batch_first": True}], ids=str)
def test_dropout_draws_the_mask_of_nn_lstm(kwargs, backend):
    ours, theirs = module_pair(num_layers=3, dropout=0.4, **kwargs)
    packed_input, results = packed_batch(4, 1, 6, 4), {}
    variants = {
        "nn.LSTM": lambda: theirs(packed_input),
        "fastlstm": lambda: ours(packed_input),
        "cell states": lambda: ours(packed_input, return_cell_states=True)[:2],
    }
    for name, call in variants.items():
        torch.manual_seed(11)
        results[name] = [*flat_results(call()), torch.rand(1)]
    ours.recompute = True
    torch.manual_seed(11)
    results["recompute"] = [*flat_results(ours(packed_input)), torch.rand(1)]
    for name, result in results.items():
        torch.testing.assert_close(result, results["nn.LSTM"], msg=naming(name))
    assert_same(ours.eval(), theirs.eval(), packed_input)


def flat_results(results):
    output, (h_n, c_n) = results
    return output.data, h_n, c_n


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_second_order_gradients(enforce_sorted, backend):
    lengths = (4, 2, 1) if enforce_sorted else (2, 1, 4)
    packed_input, (lstm, _) = (
        packed_batch(*lengths, enforce_sorted=enforce_sorted),
        module_pair(3, 2, bidirectional=True),
    )
    hx = [data(2, 3, 2, seed=k).requires_grad_() for k in (1, 2)]

    def run(rows, h0, c0):
        packed = PackedSequence(
            rows, packed_input.batch_sizes, packed_input.sorted_indices, packed_input.unsorted_indices
        )
        return flat_results(lstm(packed, (h0, c0)))

    inputs = (packed_input.data.clone().requires_grad_(), *hx)
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@needs_native
def test_compiled_autograd_of_packed_rows():
    ours, theirs = module_pair(num_layers=2)
    packed_input = packed_batch(4, 1, 6)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        ours(packed_input)[0].data.square().sum().backward()
    theirs(packed_input)[0].data.square().sum().backward()
    for our_tensor, their_tensor in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our_tensor.grad, their_tensor.grad)


@needs_native
def test_saved_tensors_of_other_strides():
    ours, theirs = module_pair(bidirectional=True)
    packed_input = packed_batch(4, 1, 6)
    turn = lambda t: torch.stack([t, -t], -1)[..., 0]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turn):
        ours(packed_input)[0].data.square().sum().backward()
    theirs(packed_input)[0].data.square().sum().backward()
    for our_tensor, their_tensor in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our_tensor.grad, their_tensor.grad)


@needs_native
def test_packed_rows_are_not_padded(monkeypatch):
    """For plain tensors; calls that packed rows do not support run padded, with equal results."""
    lstm, packed_input, padded = fastlstm.LSTM(3, 4, 2), packed_batch(4, 1, 6), []
    lstm = lstm.to(packed_input.data.dtype)
    pad = PackedLayout.pad
    monkeypatch.setattr(PackedLayout, "pad", lambda self, rows: padded.append(rows) or pad(self, rows))
    expected = lstm(packed_input)
    assert not padded
    calls = {
        "cell states": lambda: lstm(packed_input, return_cell_states=True)[:2],
        "functional_call": lambda: torch.func.functional_call(lstm, dict(lstm.named_parameters()), (packed_input,)),
    }
    for name, call in calls.items():
        torch.testing.assert_close(flat_results(call()), flat_results(expected), msg=naming(name))
    assert len(padded) == 1
    with fastlstm.use_backend("eager"):
        torch.testing.assert_close(flat_results(lstm(packed_input)), flat_results(expected))
    lstm.recompute = True
    torch.testing.assert_close(flat_results(lstm(packed_input)), flat_results(expected))
    assert len(padded) == 3


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_output_may_be_changed_in_place(kwargs, backend):
    """As nn.LSTM with packed input; with padded input nn.LSTM refuses it."""
    results = []
    for module in module_pair(**kwargs):
        output, _ = module(packed_batch(4, 1, 6))
        output.data.relu_().square().sum().backward()
        results.append([output.data, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results)


@needs_native
@pytest.mark.filterwarnings("ignore")  # from the tracer
def test_recorded_ops_include_the_source_of_lengths():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen, packed_input = [], packed_batch(4, 1, 6, enforce_sorted=False)
    lstm = fastlstm.LSTM(3, 4, dtype=packed_input.data.dtype).requires_grad_(False)
    run = lambda rows, sizes: lstm(PackedSequence(rows, sizes))[0].data  # noqa: E731
    with torch.no_grad():
        expected = run(packed_input.data, packed_input.batch_sizes)
        with Record():
            torch.testing.assert_close(run(packed_input.data, packed_input.batch_sizes), expected)
        assert torch.ops.fastlstm.packed_lengths.default in seen
        assert torch.ops.fastlstm.native_layer.default in seen
        traced = torch.jit.trace(run, (packed_input.data, packed_input.batch_sizes))
        other = packed_batch(5, 2, 3, 2)
        torch.testing.assert_close(traced(other.data, other.batch_sizes), run(other.data, other.batch_sizes))


@needs_native
def test_rows_of_length_zero_at_the_end():
    """The module has none; the op's contract allows them."""
    weights = module_pair()[0]._current_weights()

    def run(x, h0, c0):
        y, h_n, c_n, _, _ = torch.ops.fastlstm.native_layer(x, h0, c0, weights, lengths, None, False, True)
        return y, h_n, c_n

    lengths = torch.tensor([3, 2, 0])
    inputs = [t.requires_grad_() for t in (data(5, 3), data(1, 3, 4), data(1, 3, 4, seed=1))]
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_packed_rows_and_states_of_any_strides():
    pair = module_pair(num_layers=2, bidirectional=True)
    packed_input = packed_batch(4, 1, 6)
    wide = torch.stack([packed_input.data, -packed_input.data], 2)[..., 0]
    hx = (data(4, 4, 3).transpose(1, 2), data(4, 4, 3, seed=1).transpose(1, 2))
    strided = PackedSequence(wide, packed_input.batch_sizes, packed_input.sorted_indices, packed_input.unsorted_indices)
    assert not strided.data.is_contiguous()
    assert_same(*pair, strided, hx)


@pytest.mark.parametrize("kwargs", [{"num_layers": 2, "dropout": 0.3}, {"bidirectional": True}], ids=str)
def test_packed_results_are_independent_of_threads(kwargs):
    """Long rows on one thread, short ones on the other."""
    lengths = torch.randint(1, 300, (16,), generator=torch.Generator().manual_seed(5))
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            ours, theirs = (cls(24, 40, **kwargs) for cls in (fastlstm.LSTM, nn.LSTM))
            theirs.load_state_dict(ours.state_dict())
            packed_input = packed_batch(*lengths.tolist(), features=24).to(torch.float32)
            for module in (ours, theirs):
                torch.manual_seed(1)
                output, _ = module(packed_input)
                output.data.sum().backward()
                results.append([output.data, *(p.grad for p in module.parameters())])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        for our_tensor, their_tensor in zip(results[0], other, strict=True):
            torch.testing.assert_close(
                our_tensor, their_tensor, rtol=1e-3, atol=1e-5 * float(their_tensor.detach().abs().max())
            )
