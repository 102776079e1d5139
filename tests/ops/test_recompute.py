"""`recompute`: checkpoints of the state, gates recomputed in backward. Equal results, less memory."""

from __future__ import annotations

import random

import pytest
import torch
from torch.autograd import gradgradcheck

import fastlstm

from ..cases import Case, random_case, tensors
from ..device import TEST_DEVICE
from ..integration.test_compile import Model, loss_and_gradients
from ..module_pairs import data, module_pair, naming
from ..runners import check, require, run_backend
from .test_gradients import ALL_OPTIONS, DENSE, function

EVERYTHING = {
    "lengths": (7, 0, 3, 5),
    "resets": ((0, 0), (2, 0), (3, 0), (4, 2), (5, 3), (6, 0), (6, 2)),
    "cells": True,
    "hx": "tuple",
}
WITH_STATES = Case(T=7, B=4, hx="tuple")
DOUBLE = Case(T=7, B=4, **EVERYTHING, bidirectional=True, dtype=torch.float64)
OPTIONS = (
    WITH_STATES,
    Case(T=7, B=4, hx="tuple", bidirectional=True, layers=2, cells=True),
    Case(T=7, B=4, **EVERYTHING),
    Case(T=7, B=4, **EVERYTHING, bidirectional=True, layers=2),
    Case(T=7, B=4, **EVERYTHING, bidirectional=True, proj=3, bias=False),
    Case(T=7, B=4, lengths=(7, 2, 3, 5), packed=True, bidirectional=True, batch_first=True),
    Case(T=7, B=3, bidirectional=True, x_grad=False, frozen=("weight_hh_l0", "bias_ih_l0_reverse"), used=("h_n",)),
    Case(
        T=7, B=3, bidirectional=True, used=("c_n", "cells"), cells=True, hx="tuple", strided=("x", "weights", "grads")
    ),
    Case(T=7, B=1, unbatched=True, hx="tuple"),
    Case(T=7, B=0, hx="tuple"),
    DOUBLE,
    Case(T=7, B=4, **EVERYTHING, bidirectional=True, dtype=torch.bfloat16),
)


@pytest.fixture
def interval(request, monkeypatch):
    """Set `recompute` of all modules."""
    monkeypatch.setattr(fastlstm.LSTM, "recompute", request.param)
    return request.param


def is_recomputing(backend):
    return backend != "reference"


@pytest.mark.parametrize("interval", [1, 3, 6], indirect=True)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_parity(case, interval, backend):
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("interval", [2], indirect=True)
def test_random_configurations(interval, backend):
    for seed in range(25):
        case = random_case(random.Random(seed), (torch.float64, torch.float32))
        try:
            require(backend, case)
        except pytest.skip.Exception:
            continue
        check(case, backend)


@pytest.mark.parametrize("interval", [2], indirect=True)
@pytest.mark.parametrize("case", [DENSE, ALL_OPTIONS], ids=str)
def test_gradgradcheck(case, interval, backend):
    require(backend, case)
    f, inputs = function(case)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("interval", [2], indirect=True)
def test_recompute_op_runs_and_backward_twice_with_retain_graph(interval, backend):
    ours, theirs = module_pair(bidirectional=True)
    x = data(7, 2, 3).requires_grad_()
    output, _ = ours(x)
    loss = output.pow(2).sum()
    if is_recomputing(backend):
        names, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [n for n, _ in node.next_functions if n is not None]
        assert any("recomputed_layer" in name for name in names), names
    leaves = [x, *ours.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(theirs(x)[0].pow(2).sum(), [x, *theirs.parameters()])
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def saved_bytes(call, known):
    """Bytes that forward saves for backward, each storage once, without those of the tensors `known`."""
    seen, known = {}, {t.untyped_storage().data_ptr() for t in known}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = call()
    return sum(seen.values()), results


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_saved_memory_is_at_most_a_third(options, backend):
    if not is_recomputing(backend):
        pytest.skip("the reference keeps everything")
    T, B, H = 640, 2, 8
    lstm, x = fastlstm.LSTM(3, H, **options), torch.randn(T, B, 3)
    held = {}
    for recompute in (False, True):
        lstm.recompute = recompute
        held[recompute], results = saved_bytes(lambda: lstm(x), [x, *lstm.parameters()])
        del results
    assert 0 < held[True] <= held[False] / 3, held


def test_inference_saves_no_checkpoints():
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(200, 1, 3)
    lstm.recompute = True
    with torch.no_grad():
        a, _ = lstm(x)
        lstm.recompute = False
        b, _ = lstm(x)
    assert torch.equal(a, b)
    lstm.recompute = True
    short, _ = lstm(x[:128])  # one interval: without recompute
    assert "recomputed" not in type(short.grad_fn).__name__


@pytest.mark.parametrize("interval", [2], indirect=True)
def test_compiles_to_one_graph_without_recompilation(interval):
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch._dynamo.reset()
        model = Model(num_layers=1)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for T, B in ((6, 7), (9, 5)):
            x, call = data(T, B, 3), {"lengths": torch.arange(B) % T}
            expected = loss_and_gradients(model, model, x, **call)
            got = loss_and_gradients(compiled, model, x, **call)
            torch.testing.assert_close(got, expected, msg=naming(f"T={T}, B={B}"))
    torch._dynamo.reset()


@pytest.mark.parametrize("interval", [2], indirect=True)
def test_autocast_and_transforms(interval, backend):
    ours, theirs = module_pair(dtype=torch.float32)
    x = data(5, 2, 3).float()
    with torch.autocast(TEST_DEVICE.device, torch.bfloat16):
        output, _ = ours(x)
    assert output.dtype == torch.bfloat16
    output.float().pow(2).sum().backward()
    theirs(x)[0].pow(2).sum().backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad, rtol=0.05, atol=0.02)
    got = torch.func.grad(lambda x: ours(x)[0].pow(2).sum())(x)
    torch.testing.assert_close(got, torch.func.grad(lambda x: theirs(x)[0].pow(2).sum())(x))


def test_ops_match_their_schema_and_fake_kernels():
    for name, case in {"states": WITH_STATES, "all options": DOUBLE}.items():
        case_tensors = tensors(case.to(torch.float64))
        weights = list(case_tensors.weights.values())
        x = torch.nan_to_num(case_tensors.leaves["x"].detach()).requires_grad_()
        lengths = None if case_tensors.lengths is None else torch.as_tensor(case_tensors.lengths).long()
        args = ("eager", 3, x, *case_tensors.hx, weights, lengths, case_tensors.reset_mask, case.cells, True)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        result = torch.library.opcheck(torch.ops.fastlstm.recomputed_layer.default, args, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}, (name, result)


def ops_arguments():
    """Arguments of the forward op, with lengths and cells, and of the backward op after it."""
    case_tensors = tensors(DOUBLE)
    x, weights = (
        torch.nan_to_num(case_tensors.leaves["x"].detach()),
        [w.detach() for w in case_tensors.weights.values()],
    )
    states = [t.detach() for t in case_tensors.hx]
    forward = [
        "eager",
        3,
        x,
        *states,
        weights,
        torch.as_tensor(case_tensors.lengths),
        case_tensors.reset_mask,
        True,
        True,
    ]
    *results, h_at, c_at = torch.ops.fastlstm.recomputed_layer(*forward)
    needs = [True] * (3 + len(weights))
    return forward, ["eager", 3, *map(torch.ones_like, results), *forward[2:-2], h_at, c_at, needs]


@pytest.mark.parametrize("index", [2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13])  # every tensor but the weights
def test_backward_op_refuses_invalid_shapes_and_dtypes(index):
    _, arguments = ops_arguments()
    torch.ops.fastlstm.recomputed_layer_backward(*arguments)
    for wrong in (arguments[index][:-1], arguments[index].to(torch.complex64)):
        changed = [*arguments[:index], wrong, *arguments[index + 1 :]]
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.fastlstm.recomputed_layer_backward(*changed)


def test_both_ops_refuse_invalid_arguments():
    for op, arguments, lengths in zip(
        (torch.ops.fastlstm.recomputed_layer, torch.ops.fastlstm.recomputed_layer_backward),
        ops_arguments(),
        (6, 10),
        strict=True,
    ):
        changed = [*arguments]
        changed[lengths] = torch.tensor([7, 8, 0, 3])
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, T=7\], got 8 in row 1"):
            op(*changed)
        with pytest.raises(RuntimeError, match="interval must be at least 1, got 0"):
            op("eager", 0, *arguments[2:])
    with pytest.raises(RuntimeError, match="needs must have 11 or 12 flags, got 10"):
        op(*arguments[:-1], arguments[-1][:-1])


@pytest.mark.parametrize("interval", [6, 7, 8, 1000])
def test_intervals_about_as_long_as_the_sequence_and_longer(interval):
    """A compiled graph with dynamic T calls the ops for these too."""
    (_, _, *arguments), (_, _, dy, dh_n, dc_n, dcells, *_, needs) = (
        ops_arguments()
    )  # T = 7, both directions, with lengths
    *results, h_at, c_at = torch.ops.fastlstm.recomputed_layer("eager", interval, *arguments)
    *expected, reserve = torch.ops.fastlstm.eager_layer(*arguments)
    torch.testing.assert_close(results, expected)
    arguments = (dy, dh_n, dc_n, dcells, *arguments[:-2])
    y, _, _, cells = expected
    gradients = torch.ops.fastlstm.recomputed_layer_backward("eager", interval, *arguments, h_at, c_at, needs)
    torch.testing.assert_close(gradients, torch.ops.fastlstm.eager_layer_backward(*arguments, y, cells, reserve, needs))


def test_setting_recompute():
    assert fastlstm.LSTM(3, 4).recompute is False
    converted = fastlstm.convert(torch.nn.LSTM(3, 4))
    converted.recompute = 16
    assert "recompute=16" in repr(converted)
    assert "recompute" not in repr(fastlstm.LSTM(3, 4))
    assert list(converted.state_dict()) == list(torch.nn.LSTM(3, 4).state_dict())
    for wrong, error in ((-1, ValueError), (1.5, TypeError), ("yes", TypeError)):
        converted.recompute = wrong
        with pytest.raises(error, match="recompute must be"):
            converted(torch.zeros(2, 1, 3))


def test_results_equal_those_without(backend):
    """Equal to within rounding, at the interval of recompute=True."""
    case = Case(T=200, B=3, I=5, H=9, bidirectional=True, lengths=(200, 130, 1), hx="tuple")
    require(backend, case)
    plain = run_backend(case, backend)
    fastlstm.LSTM.recompute = True
    try:
        again = run_backend(case, backend)
    finally:
        fastlstm.LSTM.recompute = False
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


def test_gradients_are_contiguous_for_any_strides(inductor_cache):
    """As in the fake kernel, on which a compiled graph relies."""
    lstm = fastlstm.LSTM(5, 7, batch_first=True)
    lstm.recompute = 2
    x = torch.randn(3, 6, 5, requires_grad=True)
    torch._dynamo.reset()
    torch.compile(lstm, fullgraph=True)(x)[0].pow(2).sum().backward()
    results, x.grad = x.grad, None
    lstm(x)[0].pow(2).sum().backward()
    torch.testing.assert_close(results, x.grad)
    torch._dynamo.reset()
