"""fastlstm.LSTMCell against nn.LSTMCell: surface, numbers, errors."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastlstm
from fastlstm.accuracy import error_bounds

from ..module_pairs import assert_same, data, error_of, flat, module_pair, naming
from ..runners import assert_accurate, precision

STATES = (data(2, 4), data(2, 4, seed=1))


@pytest.mark.parametrize("bias", [True, False])
def test_surface(bias):
    ours, theirs = module_pair(cell=True, bias=bias)
    assert isinstance(ours, nn.RNNCellBase)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert ours.__constants__ == theirs.__constants__
    assert set(dir(theirs)) <= set(dir(ours))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    if not bias:
        assert ours.bias_ih is ours.bias_hh is None
        assert dict(ours.named_parameters(), bias_ih=None, bias_hh=None).keys() == set(ours._parameters)


def test_arguments_by_position_and_keyword():
    args = (3, 4, False, "meta", torch.float64)
    assert repr(fastlstm.LSTMCell(*args)) == repr(nn.LSTMCell(*args))
    assert fastlstm.LSTMCell(*args).weight_hh.device.type == "meta"
    ours, _ = module_pair(cell=True)
    assert torch.equal(ours(input=STATES[0][:, :3], hx=STATES)[0], ours(STATES[0][:, :3], STATES)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("hx", ["none", "tuple", "list", "expanded", "strided"])
def test_numbers(bias, batched, hx, backend):
    pair = module_pair(cell=True, bias=bias)
    x = data(2, 3) if batched else data(3)
    h, c = STATES if batched else (s[0] for s in STATES)
    given = {
        "none": None,
        "tuple": (h, c),
        "list": [h, c],
        "expanded": (h[..., :1].expand_as(h), c[..., :1].expand_as(c)),
        "strided": (h.repeat_interleave(2, -1)[..., ::2], c.t().contiguous().t()),
    }[hx]
    assert_same(*pair, x, given)
    for our_tensor, their_tensor in zip(flat(pair[0](x, given)), flat(pair[1](x, given)), strict=True):
        assert our_tensor.shape == their_tensor.shape
        assert our_tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 33), (64, 64, 64)])
def test_precision(dtype, B, I, H, backend):  # noqa: E741
    torch.manual_seed(2)
    cell = fastlstm.LSTMCell(I, H, dtype=dtype)
    inputs = [t.to(dtype) for t in (data(B, I), data(B, H, seed=1), data(B, H, seed=2))]
    arriving = [t.to(dtype) for t in (data(B, H, seed=3), data(B, H, seed=4))]

    def run(cell, to):
        leaves = {name: t.to(to).requires_grad_() for name, t in zip(("x", "h0", "c0"), inputs, strict=True)}
        gradients_at = [t.to(to) for t in arriving]

        def results():
            outputs = cell(leaves["x"], (leaves["h0"], leaves["c0"]))
            wanted = {**leaves, **dict(cell.named_parameters())}
            gradients = torch.autograd.grad(outputs, list(wanted.values()), gradients_at)
            named = {f"d {name}": grad for name, grad in zip(wanted, gradients, strict=True)}
            return {"h": outputs[0].detach(), "c": outputs[1].detach(), **named}

        return results

    true = nn.LSTMCell(I, H, dtype=torch.float64)
    true.load_state_dict(cell.state_dict())
    assert_accurate(run(cell, dtype)(), *error_bounds(run(true, torch.float64), precision(dtype, backend)))


def test_loop_of_cells_equals_the_layer(backend):
    lstm, cell = fastlstm.LSTM(3, 4, dtype=torch.float64), fastlstm.LSTMCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({name[:-3]: value for name, value in lstm.state_dict().items()})
    x, state = data(6, 2, 3), None
    output, (h_n, c_n) = lstm(x)
    for t in range(6):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], output[t], msg=naming(f"step {t}"))
    torch.testing.assert_close(state, (h_n[0], c_n[0]))


def test_swapped_state_and_weights_are_refused():
    pair = module_pair(cell=True)
    x = data(2, 3)
    assert_same(copy.deepcopy(pair[0]), pair[1], x)
    assert_same(pickle.loads(pickle.dumps(pair[0])), pair[1], x)
    other = {name: 2 * w.detach() for name, w in pair[1].named_parameters()}
    torch.testing.assert_close(functional_call(pair[0], other, (x,)), functional_call(pair[1], other, (x,)))
    for module in pair:
        nn.utils.parametrizations.weight_norm(module, "weight_hh")
        module.bias_ih.data = torch.ones(16, dtype=torch.float64)
        module.weight_ih.requires_grad_(False)
    assert_same(*pair, x, STATES)


def test_states_may_be_changed_in_place(backend):
    """As in nn.LSTMCell, for loops that mask the states between steps at episode ends."""

    def gradients(cell):
        h, c = cell(data(2, 3))
        h.mul_(0.5)
        c.mul_(2)
        h, c = cell(data(2, 3, seed=1), (h, c))
        c.mul_(3)
        return torch.autograd.grad((h.sum() + c.sum()), list(cell.parameters()))

    ours, theirs = module_pair(cell=True)
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_second_order(backend):
    def curvature(cell):
        x = data(2, 3).requires_grad_()
        h, c = cell(x, (data(2, 4, seed=1), data(2, 4, seed=2)))
        (dx,) = torch.autograd.grad(h.square().sum() + c.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *cell.parameters()])

    ours, theirs = module_pair(cell=True)
    torch.testing.assert_close(curvature(ours), curvature(theirs))


@pytest.mark.parametrize("lazy", ["negation", "zero", "hooks"])
def test_gradients_and_saved_tensors_of_subclasses(lazy, backend):
    """Backward must not read raw memory of conj views, ZeroTensors and tensors returned by hooks."""

    def gradients(cell):
        x = data(2, 3).requires_grad_()
        strided = (lambda t: t, lambda t: torch.stack([t, t * 0], -1)[..., 0])
        with torch.autograd.graph.saved_tensors_hooks(*strided) if lazy == "hooks" else nullcontext():
            h, c = cell(x, STATES)
        grad = {
            "negation": torch._neg_view(data(2, 4, seed=3)),
            "zero": torch._efficientzerotensor((2, 4), dtype=h.dtype, device=h.device),
            "hooks": data(2, 4, seed=3),
        }[lazy]
        return torch.autograd.grad([h, c], [x, *cell.parameters()], [grad, data(2, 4, seed=4)])

    ours, theirs = module_pair(cell=True)
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_traced():
    """torch.jit.trace records ops, which the fused call (csrc/autograd.cpp) must not hide."""
    cell, _ = module_pair(cell=True)
    x = data(2, 3, seed=5)
    with torch.no_grad():
        traced = torch.jit.trace(cell, (data(2, 3), STATES))
        torch.testing.assert_close(traced(x, STATES), cell(x, STATES))


# Both sides of the thresholds of csrc/cpu/one_step.cpp for GEMMs, packing and a second thread.
@pytest.mark.parametrize(
    ("B", "I", "H"), [(1, 3, 20), (2, 1, 5), (9, 1, 33), (97, 51, 51), (30, 70, 17), (50, 9, 140), (70, 9, 140)]
)
@pytest.mark.parametrize("used", ["h", "c", "both"])
def test_every_subset_of_gradients(B, I, H, used, backend):  # noqa: E741
    pair = module_pair(I, H, cell=True)
    count = 3 + len(list(pair[0].parameters()))
    for subset in (*([k] for k in range(count)), range(count), range(3), range(3, count)):
        collected = []
        for cell in pair:
            leaves = [data(B, n, seed=k) for k, n in enumerate((I, H, H))]
            chosen = [[*leaves, *cell.parameters()][k] for k in subset]
            for tensor in (*leaves, *cell.parameters()):
                tensor.requires_grad_(any(tensor is t for t in chosen))
            h, c = cell(leaves[0], (leaves[1], leaves[2]))
            results = {"h": [h], "c": [c], "both": [h, c]}[used]
            weights = [data(B, H, seed=7 + k) for k in range(len(results))]
            collected.append(torch.autograd.grad(results, chosen, weights, allow_unused=True))
        for our_tensor, their_tensor in zip(*collected, strict=True):
            torch.testing.assert_close(
                our_tensor, torch.zeros_like(our_tensor) if their_tensor is None else their_tensor
            )


def test_empty_batch(backend):
    ours, theirs = module_pair(cell=True)
    x = torch.zeros(0, 3, dtype=torch.float64)
    assert [t.shape for t in ours(x)] == [t.shape for t in theirs(x)] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_input", [False, True])
@pytest.mark.parametrize("state", [None, "float32", "low"])
def test_autocast(dtype, low_input, state, backend):
    ours, theirs = module_pair(cell=True, dtype=torch.float32)
    x = data(2, 3).to(dtype if low_input else torch.float32)
    hx = None if state is None else tuple(t.to(dtype if state == "low" else torch.float32) for t in STATES)
    with torch.autocast("cpu", dtype):
        got, expected = ours(x, hx), theirs(x, hx)
    for our_tensor, their_tensor in zip(got, expected, strict=True):
        assert our_tensor.dtype == their_tensor.dtype
        torch.testing.assert_close(our_tensor, their_tensor, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((3,), {}), ((3.0, 4), {}), ((3, -1), {}), ((3, 4), {"dropout": 0.5})], ids=str
)
def test_constructor_errors(args, kwargs):
    theirs = error_of(lambda: nn.LSTMCell(*args, **kwargs))
    assert error_of(lambda: fastlstm.LSTMCell(*args, **kwargs)) == theirs


X = torch.zeros(2, 3)
GOOD, WIDE, LONG = torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(3, 4)
CALLS = {
    "no argument": (),
    "0-D input": (torch.zeros(()),),
    "3-D input": (torch.zeros(1, 2, 3),),
    "wrong input size": (torch.zeros(2, 4),),
    "wrong input size unbatched": (torch.zeros(4),),
    "hx[0] 3-D": (X, (GOOD[None], GOOD)),
    "hx[1] 3-D": (X, (GOOD, GOOD[None])),
    "hx[0] 0-D": (X, (torch.zeros(()), GOOD)),
    "hx[0] wrong size": (X, (WIDE, GOOD)),
    "hx[1] wrong size": (X, (GOOD, WIDE)),
    "hx[0] wrong batch": (X, (LONG, GOOD)),
    "hx[1] wrong batch": (X, (GOOD, LONG)),
    "hx 1-D, input batched": (X, (GOOD[0], GOOD[0])),
    "hx 2-D, input unbatched": (X[0], (GOOD, GOOD)),
    "hx wrong size unbatched": (X[0], (WIDE[0], WIDE[0])),
    "hx of one tensor": (X, (GOOD,)),
    "hx of three tensors": (X, (GOOD, GOOD, GOOD)),
    "hx a tensor": (X, GOOD),
    "hx of None": (X, (None, None)),
    "hx a number": (X, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_errors(name):
    ours, theirs = fastlstm.LSTMCell(3, 4), nn.LSTMCell(3, 4)
    assert error_of(lambda: ours(*CALLS[name])) == error_of(lambda: theirs(*CALLS[name]))


MIXED_DTYPES = {
    "x in float64": (X.double(), None),
    "x and h in float64": (X.double(), (GOOD.double(), GOOD)),
    "x and c in float64": (X.double(), (GOOD, GOOD.double())),
    "all in float32": (X, None),
    "h in float64": (X, (GOOD.double(), GOOD)),
}


@pytest.mark.parametrize("name", MIXED_DTYPES)
def test_dtype_errors(name):
    """nn.LSTMCell's messages come from matrix products; ours name the argument."""
    x, hx = MIXED_DTYPES[name]
    if x.dtype == torch.float32 and hx is None:
        pytest.skip("valid arguments")
    with pytest.raises(RuntimeError):
        nn.LSTMCell(3, 4)(x, hx)
    with pytest.raises(RuntimeError, match=r"must have the same dtype, got|as x is, got"):
        fastlstm.LSTMCell(3, 4)(x, hx)


@pytest.mark.parametrize("given", ["bias_ih", "bias_hh"])
def test_single_bias(given, backend):
    weights = [torch.randn(16, n) for n in (3, 4)]
    x, hx, bias = torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4)), torch.randn(16)
    biases = {"bias_ih": None, "bias_hh": None, given: bias}
    results = fastlstm.functional.lstm_cell(x, hx, *weights, **biases)
    expected = torch.lstm_cell(x, hx, *weights, *(torch.zeros(16) if b is None else b for b in biases.values()))
    torch.testing.assert_close(results, expected)
