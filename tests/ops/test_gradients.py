"""Backward: gradcheck, second order, eval mode, any subset of inputs and any single output."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastlstm

from ..cases import OUTPUTS, Case, tensors
from ..module_pairs import data, flat, module_pair, naming
from ..runners import check, require, run_torch

SMALL = {"T": 3, "B": 2, "I": 2, "H": 3, "dtype": torch.float64, "hx": "tuple"}
RAGGED = {"lengths": (3, 2), "resets": ((1, 0), (1, 1), (2, 1))}
DENSE, PROJECTION, STACKED = Case(**SMALL), Case(**SMALL, proj=2), Case(**SMALL, bidirectional=True, layers=2)
ALL_OPTIONS = Case(**SMALL, **RAGGED, cells=True, proj=2, bidirectional=True)
CASES = (
    DENSE,
    Case(**SMALL, bias=False),
    PROJECTION,
    STACKED,
    Case(**SMALL, lengths=(1, 3)),
    Case(**SMALL, lengths=(0, 3), bidirectional=True),
    Case(**SMALL, resets=((0, 0), (2, 1)), bidirectional=True),
    ALL_OPTIONS,
    Case(**{**SMALL, "B": 1}, unbatched=True, cells=True),
)


def function(case):
    """(f, its tensor inputs), where f maps all inputs and weights to all results of the layer."""
    case_tensors = tensors(case.to(torch.float64))
    names = list(case_tensors.weights)
    module = case.module(fastlstm.LSTM, case_tensors.weights)
    options = {"lengths": case_tensors.lengths, "reset_mask": case_tensors.reset_mask, "return_cell_states": case.cells}
    inputs = [torch.nan_to_num(case_tensors.leaves["x"].detach()).requires_grad_(), *case_tensors.hx]

    def f(x, h0, c0, *weights):
        swapped = dict(zip(names, weights, strict=True))
        return tuple(flat(torch.func.functional_call(module, swapped, (x, (h0, c0)), options)))

    return f, [*inputs, *(w.detach().requires_grad_() for w in case_tensors.weights.values())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case, backend):
    require(backend, case)
    f, inputs = function(case)
    assert gradcheck(f, inputs, fast_mode=True)


def test_gradcheck_in_full(backend):
    f, inputs = function(Case(**{**SMALL, "T": 2, "H": 2}, proj=1, cells=True))
    assert gradcheck(f, inputs)


@pytest.mark.parametrize("case", [DENSE, PROJECTION, STACKED, ALL_OPTIONS], ids=str)
def test_gradgradcheck(case, backend):
    require(backend, case)
    f, inputs = function(case)
    assert gradgradcheck(f, inputs, fast_mode=True)


def test_gradient_penalty_equals_nn_lstms(backend):
    """A gradient penalty: the norm of the input's gradient is part of the loss."""
    results = []
    for module in module_pair(num_layers=2, bidirectional=True):
        x = data(4, 2, 3).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (dx.square().sum() + dx.pow(3).sum()).backward()
        results.append([x.grad, *(w.grad for w in module.parameters())])
    torch.testing.assert_close(*results)


def test_double_backward_of_some_weights(backend):
    """Double backward with a frozen weight and an unused output."""
    results = []
    for module in module_pair():
        module.weight_ih_l0.requires_grad_(False)
        output, _ = module(data(4, 2, 3))
        (dw,) = torch.autograd.grad(output.pow(2).sum(), module.weight_hh_l0, create_graph=True)
        results.append(torch.autograd.grad(dw.pow(2).sum(), [module.weight_hh_l0, module.bias_hh_l0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", [DENSE, ALL_OPTIONS], ids=str)
def test_backward_twice_with_retain_graph(case, backend):
    require(backend, case)
    f, inputs = function(case)
    outputs = [out for out in f(*inputs) if out.requires_grad]
    loss = sum(out.pow(2).sum() for out in outputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    torch.autograd.grad(outputs[0].sum(), inputs[:1], retain_graph=True)
    third = torch.autograd.grad(loss, inputs, allow_unused=True)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs, allow_unused=True)


def test_gradients_accumulate(backend):
    ours, _ = module_pair(num_layers=2)
    x = data(4, 2, 3)
    ours(x)[0].sum().backward()
    once = {name: w.grad.clone() for name, w in ours.named_parameters()}
    ours(x)[0].sum().backward()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * once[name], msg=naming(name))


def test_gradients_do_not_alias(backend):
    """Otherwise an in-place operation on one, such as clipping, would change the other: their gradients are equal."""
    ours, _ = module_pair(bidirectional=True)
    x, hx = data(4, 2, 3).requires_grad_(), (data(2, 2, 4).requires_grad_(), data(2, 2, 4).requires_grad_())
    grads = torch.autograd.grad(sum(t.sum() for t in flat(ours(x, hx))), [x, *hx, *ours.parameters()])
    for k, grad in enumerate(grads):
        before = [g.clone() for g in grads]
        grad.fill_(7)
        assert all(torch.equal(g, b) for i, (g, b) in enumerate(zip(grads, before, strict=True)) if i != k)


def test_backward_in_eval_mode(backend):
    ours, theirs = module_pair(num_layers=2, dropout=0.5)
    x = data(4, 2, 3).requires_grad_()
    got, expected = (torch.autograd.grad(m.eval()(x)[0].sum(), [x, *m.parameters()]) for m in (ours, theirs))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", [Case(hx="tuple"), Case(hx="tuple", proj=2, bias=False, bidirectional=True)], ids=str)
def test_any_subset_of_gradients(case, backend):
    """Subsets of the arguments of autograd.grad, and of the tensors that require a gradient."""
    case = case.to(torch.float64)
    everything = run_torch(case)
    names = [name[2:] for name in everything if name.startswith("d ")]
    subsets = [[n] for n in names] + [list(p) for p in combinations(names[:4], 2)] + [names[3:], names[:3]]
    for subset in subsets:
        for asked_only in (False, True):
            case_tensors = tensors(case)
            for name, leaf in case_tensors.leaves.items():
                leaf.requires_grad_(asked_only or name in subset)
            results = flat(case.module(fastlstm.LSTM, case_tensors.weights)(case_tensors.input, case_tensors.hx))
            generators = [torch.Generator().manual_seed(case.seed + 1 + k) for k in range(3)]
            grads = [torch.randn(r.shape, generator=g, dtype=r.dtype) for r, g in zip(results, generators, strict=True)]
            collected = torch.autograd.grad(results, [case_tensors.leaves[name] for name in subset], grads)
            for name, grad in zip(subset, collected, strict=True):
                torch.testing.assert_close(
                    grad, everything[f"d {name}"], msg=lambda m, n=name, s=subset: f"{n} of {s}: {m}"
                )


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    "case", [Case(hx="tuple", cells=True, layers=2, bidirectional=True), Case(cells=True, lengths=(5, 0, 2))], ids=str
)
def test_loss_of_a_single_output(name, case, backend):
    require(backend, case)
    check(Case(**{**vars(case), "used": (name,)}), backend)


def test_loss_of_one_step_of_one_output(backend):
    """The gradient of output contains zeros, and the other outputs have none."""
    results = []
    for module in module_pair(bidirectional=True):
        x = data(5, 2, 3).requires_grad_()
        results.append(torch.autograd.grad(module(x)[0][2, 1, 5], [x, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_aliasing_arguments(backend):
    """Tied weights: both directions share one, and so do both biases; the gradient is the sum over its uses."""
    results = []
    for module in module_pair(bidirectional=True):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.bias_hh_l0 = module.bias_ih_l0
        module(data(4, 2, 3))[0].pow(2).sum().backward()
        results.append([module.weight_hh_l0.grad, module.bias_ih_l0.grad, module.weight_ih_l0.grad])
    torch.testing.assert_close(*results)


def test_weights_changed_between_forward_and_backward_are_an_error(backend):
    """Changing a tensor that backward reads is an error, as usual in autograd, not a wrong gradient."""
    ours, _ = module_pair()
    loss = ours(data(4, 2, 3))[0].sum()
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_changed_in_place_before_backward(backend):
    """Backward reads y, so either autograd raises or the gradient is correct."""
    ours, theirs = module_pair(dtype=torch.float64)
    x = data(4, 2, 3)
    expected = torch.autograd.grad((theirs(x)[0] * 2).sum(), list(theirs.parameters()))
    output, _ = ours(x)
    try:
        got = torch.autograd.grad(output.mul_(2).sum(), list(ours.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(got, expected)


def test_checkpointing(backend):
    results = []
    for module in module_pair(num_layers=2):
        x = data(4, 2, 3).requires_grad_()
        output, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        output.pow(2).sum().backward()
        results.append([x.grad, *(w.grad for w in module.parameters())])
    torch.testing.assert_close(*results)


def test_anomaly_mode(backend):
    ours, _ = module_pair(num_layers=2, bidirectional=True)
    with torch.autograd.set_detect_anomaly(True):
        ours(data(4, 2, 3), lengths=[4, 0])[0].sum().backward()


@pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
def test_second_derivatives_under_autocast_keep_their_precision(backend):
    """A backward inside autocast must not run the differentiable formula in bfloat16."""
    ours, _ = module_pair(dtype=torch.float32)
    x = data(4, 3, 3).float().requires_grad_()

    def gradient():
        with torch.autocast("cpu", enabled=False):
            loss = ours(x)[0].pow(2).sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0].detach()

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradient(), expected)
