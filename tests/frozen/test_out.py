"""Results in tensors that the caller gives: FrozenLSTM(x, hx, out=(output, (h_n, c_n))) and FrozenLSTMCell's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastlstm
from fastlstm import dispatch
from fastlstm.backends import native

from ..module_pairs import naming
from .forms import FORMS, NO_EXTENSION

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

# L, bidirectional, proj_size, batch_first, T, B: steps of streams, and calls whose results are copied.
CALLS = [
    (1, False, 0, False, 1, 1),
    (1, False, 0, True, 1, 3),
    (3, False, 5, False, 1, 2),
    (2, True, 0, True, 1, 1),
    (2, True, 5, False, 4, 2),
    (2, False, 0, True, 4, 2),
]


def lstm(form: str = "float32", I: int = 8, H: int = 33, **kwargs: Any) -> fastlstm.LSTM:  # noqa: E741
    dtype, weights = FORMS[form]
    torch.manual_seed(0)
    return fastlstm.freeze(fastlstm.LSTM(I, H, dtype=dtype, **kwargs), weights)


def arguments(module: Any, T: int, B: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    D, H, P = 1 + module.bidirectional, module.hidden_size, module.proj_size or module.hidden_size
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), module.input_size).to(module.dtype)
    states = [torch.randn(module.num_layers * D, B, n).to(module.dtype) for n in (P, H)]
    return x, (states[0], states[1])


def empty(results: Any) -> Any:
    """Contiguous tensors of the sizes of `results` that hold other numbers."""
    output, (h, c) = results[:2]
    like = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in (output, h, c)]
    return like[0], (like[1], like[2])


def assert_equal(found: Any, expected: Any, name: Any) -> None:
    flat = [(f, e) for f, e in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)]
    for k, (f, e) in enumerate(flat):
        torch.testing.assert_close(f, e, rtol=0, atol=0, msg=naming(f"{name}, result {k}"))


@pytest.mark.parametrize("form", FORMS)
def test_results(form, monkeypatch):
    """Equal to the bit to those of a call without, and of the op; the tensors and tuples that were given."""
    for L, bidirectional, proj, batch_first, T, B in CALLS:
        module = lstm(form, num_layers=L, bidirectional=bidirectional, proj_size=proj, batch_first=batch_first)
        x, hx = arguments(module, T, B)
        name = (form, L, bidirectional, proj, batch_first, T, B)
        with monkeypatch.context() as general:
            general.setattr(dispatch, "_extension_may_run", lambda: False)
            expected = module(x, hx)
        assert_equal(module(x, hx), expected, name)
        assert_equal(module(x), module(x, tuple(torch.zeros_like(t) for t in hx)), name)
        for strided in (False, True):
            given = torch.stack([x, x], -1)[..., 0] if strided else x
            out = empty(expected)
            found = module(given, hx, out=out)
            assert found[0] is out[0]
            assert all(ours is given for ours, given in zip(found[1], out[1], strict=True))
            assert_equal(found, expected, name)
        state = (hx[0].clone(), hx[1].clone())
        found = module(x, state, out=(torch.empty(expected[0].shape, dtype=x.dtype), state))
        assert found[1][0] is state[0]
        assert_equal(found, expected, (*name, "in place"))


@pytest.mark.parametrize("form", FORMS)
def test_cell(form):
    dtype, weights = FORMS[form]
    cell = fastlstm.freeze(fastlstm.LSTMCell(8, 33, dtype=dtype), weights)
    for rows in ((3,), ()):
        x, state = torch.randn(*rows, 8).to(dtype), tuple(torch.randn(*rows, 33).to(dtype) for _ in range(2))
        expected = cell(x, state)
        out = (torch.empty_like(state[0]), torch.empty_like(state[1]))
        assert cell(x, state, out=out) is out
        assert all(map(torch.equal, out, expected))
        assert cell(x, state, out=state) is state
        assert all(map(torch.equal, state, expected))


def test_general_calls():
    """Options, unbatched input, autocast and dispatch modes write into the tensors too."""
    module = lstm(bidirectional=True)
    x, hx = arguments(module, 5, 3)
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[2, 1] = True
    for options in ({"lengths": [5, 0, 2]}, {"reset_mask": mask}, {"return_cell_states": True}):
        expected = module(x, hx, **options)
        out = empty(expected)
        found = module(x, hx, out=out, **options)
        assert found[0] is out[0]
        assert len(found) == len(expected)
        assert_equal(found[:2], expected[:2], options)
    single, state = x[:, 0], (hx[0][:, 0], hx[1][:, 0])
    out = empty(module(single, state))
    assert_equal(module(single, state, out=out), module(single, state), "unbatched")
    out = empty(module(x, hx))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(module(x.bfloat16(), hx, out=out), module(x.bfloat16(), hx), "autocast")
    with FlopCounterMode(display=False) as counter:
        assert_equal(module(x, hx, out=out), module(x, hx), "FlopCounterMode")
    assert counter.get_total_flops() > 0


def allocations(call: Any) -> int:
    """The number of tensor storages that torch's allocators make in a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "bfloat16"])  # which widens its input
@pytest.mark.parametrize("H", [64, 200])
def test_streaming_allocates_no_storage(form, H):
    """Without `out` a step allocates its results alone."""
    dtype, weights = FORMS[form]
    for L in (1, 2):
        module = lstm(form, 64, H, num_layers=L)
        x, state = arguments(module, 1, 1)
        output = torch.empty(1, 1, H, dtype=dtype)
        with torch.inference_mode():
            module(x, state)  # a thread's block for workspaces grows in its first call
            assert allocations(lambda: module(x, state)) == 3  # noqa: B023
            assert allocations(lambda: [module(x, state, out=(output, state)) for _ in range(5)]) == 0  # noqa: B023
    cell = fastlstm.freeze(fastlstm.LSTMCell(64, H, dtype=dtype), weights)
    x, state = x[0], tuple(torch.zeros(1, H, dtype=dtype) for _ in range(2))
    with torch.inference_mode():
        assert allocations(lambda: cell(x, state)) == 2
        assert allocations(lambda: cell(x, state, out=state)) == 0


def wrong_results(x: Tensor, h: Tensor, c: Tensor, y: Tensor) -> dict[str, tuple[type[Exception], str, Any]]:
    """By name the error, its text and an `out` for lstm(), T = B = 2: all of these sizes [., 2, 8]."""
    memory = torch.zeros(100)
    part = memory[:16].view(1, 2, 8)
    return {
        "a list": (TypeError, r"out must be a tuple \(output, \(h_n, c_n\)\), got list", [y, (h, c)]),
        "three": (TypeError, r"out must be a tuple \(output, \(h_n, c_n\)\), got a tuple of 3", (y, h, c)),
        "a list of states": (TypeError, r"out\[1\] must be a tuple \(h_n, c_n\), got list", (y, [h, c])),
        "no tensor": (TypeError, r"out\[1\]\[0\] must be a torch.Tensor, got NoneType", (y, (None, c))),
        "sizes": (ValueError, r"out\[0\] must be \[2, 2, 8\], got \[1, 2, 8\]", (y[:1], (h, c))),
        "dtype": (ValueError, r"out\[1\]\[1\] must be torch.float32 on cpu, got torch.float64", (y, (h, c.double()))),
        "device": (ValueError, r"out\[0\] must be .* on cpu, got torch.float32 on meta", (y.to("meta"), (h, c))),
        "strides": (ValueError, r"out\[0\] must be contiguous", (torch.stack([y, y], -1)[..., 0], (h, c))),
        "gradient": (RuntimeError, r"out\[0\] must not require", (y.clone().requires_grad_(), (h, c))),
        "of inference": (RuntimeError, r"out\[0\] is an inference tensor", (inference_tensor(2, 2, 8), (h, c))),
        "h_n and c_n": (ValueError, r"out\[1\]\[1\] must share no memory with out\[1\]\[0\]", (y, (part, part))),
        "y and h_n": (ValueError, r"out\[1\]\[0\] must share no memory with out\[0\]", (y, (y[1:], c.clone()))),
        "x": (ValueError, r"out\[0\] must share no memory with input", (x, (h, c))),
        "states swapped": (ValueError, r"out\[1\]\[0\] must share no memory with hx\[1\]", (y, (c, h))),
        "a shifted state": (
            ValueError,
            r"out\[1\]\[0\] must be hx\[0\] itself or share no memory with it",
            (y, (torch.as_strided(h, (1, 2, 8), (16, 8, 1), 8), c)),
        ),
    }


def test_state_may_be_a_buffer_of_the_module():
    """The extension writes into it, and so does a call that is copied from."""
    module, x, y = lstm(H=8), torch.randn(1, 2, 8), torch.zeros(1, 2, 8)
    for name in ("h", "c"):
        module.register_buffer(name, torch.zeros(1, 2, 8), persistent=False)
    with torch.no_grad():
        expected = module(x, (module.h, module.c))
        out = (y, (module.h, module.c))
        for options in ({}, {"lengths": [1, 1]}):
            module.h.zero_(), module.c.zero_()
            assert module(x, out[1], **options, out=out) is out
            assert torch.equal(y, expected[0])
            assert torch.equal(module.h, expected[1][0])
            assert torch.equal(module.c, expected[1][1])


def inference_tensor(*sizes: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(sizes)


def test_refused_results():
    """Each raises what is expected and what was given, before anything is written."""
    module = lstm(H=8)
    x, h = torch.randn(2, 2, 8), torch.randn(48)
    h, c, y = h[:16].view(1, 2, 8), torch.randn(1, 2, 8), torch.zeros(2, 2, 8)
    before = [t.clone() for t in (x, h, c, y)]
    for name, (error, text, out) in wrong_results(x, h, c, y).items():
        with pytest.raises(error, match=text):
            pytest.fail(f"{name}: {module(x, (h, c), out=out)}")
    weights = module.packed_l0[128:].view(torch.float32)[:32].view(2, 2, 8)
    with pytest.raises(ValueError, match=r"out\[0\] must share no memory with packed_l0"):
        module(x, (h, c), out=(weights, (h, c)))
    for wrong in (x[0, 0], x[None]):  # the error of any call
        with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
            module(wrong, (h, c), out=(y, (h, c)))
    with pytest.raises(ValueError, match=r"out\[1\]\[0\] must be \[1, 2, 8\]"):
        module(x.to_sparse(), (h, c), out=(y, (h[:, :1], c)))
    for wrong in (None, 5):  # the error of any call
        with pytest.raises(AttributeError):
            module(wrong, (h, c), out=(y, (h, c)))
    with pytest.raises(ValueError, match="out must be None with a PackedSequence"):
        module(pack_padded_sequence(x, torch.tensor([2, 1])), (h, c), out=(y, (h, c)))
    for k, t in enumerate((x, h, c, y)):
        assert torch.equal(t, before[k]), k
    cell = fastlstm.freeze(fastlstm.LSTMCell(8, 8))
    for error, text, out in (
        (TypeError, r"out must be a tuple \(h, c\), got list", [h[0], c[0]]),
        (ValueError, r"out\[0\] must be \[2, 8\], got \[1, 2, 8\]", (h, c)),
        (ValueError, r"out\[1\] must share no memory with out\[0\]", (y[0], y[0])),
        (ValueError, r"out\[0\] must share no memory with input", (x[0], c[0])),
    ):
        with pytest.raises(error, match=text):
            cell(x[0], (h[0], c[0]), out=out)
    with pytest.raises(RuntimeError, match="input has inconsistent input_size"):
        cell(torch.zeros(2, 9), out=(h[0], c[0]))


def test_gradients_and_transforms():
    module = lstm(H=8)
    x, hx = arguments(module, 1, 1)
    out = empty(module(x, hx))
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"out must be None if an input requires a gradient: .*no_grad"):
        module(leaf, hx, out=out)
    with torch.no_grad():
        assert_equal(module(leaf, hx, out=out), module(x, hx), "no_grad")
    with pytest.raises(RuntimeError, match=r"out must be None under torch\.func"):
        torch.func.vmap(lambda x: module(x, hx, out=out)[0])(x[None])
    with pytest.raises(RuntimeError, match=r"out must be None under .*torch\.jit\.trace"):
        torch.jit.trace(lambda x: module(x, hx, out=out)[0], x)
    with pytest.raises(Exception, match=r"out must be None under torch\.compile"):
        torch.compile(lambda x: module(x, hx, out=out)[0], backend="eager", fullgraph=True)(x)


def test_writes_count_as_in_place():
    """autograd refuses a backward pass that would read a result that was overwritten."""
    module, head = lstm(H=8), torch.nn.Linear(8, 2)
    x, state = arguments(module, 1, 1)
    output = torch.empty(1, 1, 8)
    loss = head(module(x, state, out=(output, state))[0]).sum()
    module(x, state, out=(output, state))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_extension_writes():
    """A plain step runs below the dispatcher: what it returns is what the extension was given."""
    module = lstm(H=8)
    x, state = arguments(module, 1, 1)
    out = (torch.empty(1, 1, 8), state)
    assert native.extension.frozen_lstm_call(module, x, state, out) is out
    assert native.extension.frozen_lstm_call(module, x, state, (out[0], (x, state[1]))) is None


@pytest.mark.parametrize("form", FORMS)
def test_extension_runs_plain_cell_calls(form):
    """What it refuses the general path runs, with the same numbers."""
    dtype, weights = FORMS[form]
    cell = fastlstm.freeze(fastlstm.LSTMCell(5, 8, dtype=dtype), weights)
    run, x = native.extension.frozen_cell_call, torch.randn(3, 5, dtype=dtype)
    h, c = run(cell, x, None, None)
    refused = {"gradient": x.clone().requires_grad_(), "unbatched": x[0], "no rows": x[:0]}
    for name, given in refused.items():
        assert run(cell, given, None, None) is None, name
        rows = {"unbatched": 0, "no rows": slice(0)}.get(name, slice(None))
        if name == "gradient" and weights is not None:
            continue
        for ours, correct in zip(cell(given), (h[rows], c[rows]), strict=True):
            torch.testing.assert_close(ours, correct, msg=lambda text, name=name: f"{name}: {text}")
