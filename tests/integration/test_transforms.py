"""torch.func on the module: grad, vmap, jvp, per-sample gradients, ensembles. nn.LSTM refuses most of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

import fastlstm

from ..cases import Case
from ..device import TEST_DEVICE
from ..module_pairs import data, module_pair, naming
from ..runners import require

X = data(4, 3, 3)


def test_grad(backend):
    ours, theirs = module_pair(num_layers=2, bidirectional=True)
    weights = dict(ours.named_parameters())
    got = grad(lambda w: functional_call(ours, w, (X,))[0].pow(2).sum())(weights)
    expected = torch.autograd.grad(theirs(X)[0].pow(2).sum(), list(theirs.parameters()))
    torch.testing.assert_close(list(got.values()), list(expected))


def test_per_sample_gradients(backend):
    ours, theirs = module_pair()
    weights = {name: w.detach() for name, w in ours.named_parameters()}

    def loss(w, row):
        return functional_call(ours, w, (row[:, None],))[0].pow(2).sum()

    got = vmap(grad(loss), in_dims=(None, 1))(weights, X)
    for b in range(3):
        expected = torch.autograd.grad(theirs(X[:, b : b + 1])[0].pow(2).sum(), list(theirs.parameters()))
        torch.testing.assert_close([g[b] for g in got.values()], list(expected), msg=naming(f"sample {b}"))


def test_vmap_over_inputs_and_ragged_arguments(backend):
    ours, _ = module_pair(bidirectional=True)
    inputs, lengths = data(5, 4, 3, 3), torch.tensor([[4, 0, 2]] * 5)
    mask = data(5, 4, 3) > 0.5
    got = vmap(lambda x, m: ours(x, lengths=lengths[0], reset_mask=m)[0])(inputs, mask)
    for k in range(5):
        expected = ours(inputs[k], lengths=lengths[k], reset_mask=mask[k])[0]
        torch.testing.assert_close(got[k], expected, msg=naming(f"sample {k}"))


@pytest.mark.filterwarnings("error:.*performance drop")
def test_vmap_over_packed_data(backend):
    ours, _ = module_pair(bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(data(5, 3, 3), [5, 2, 4], enforce_sorted=False)
    inputs = data(4, *packed.data.shape)

    def run(rows):
        y, (h_n, c_n) = ours(packed._replace(data=rows))
        return y.data, h_n, c_n

    got = vmap(run)(inputs)
    for k in range(4):
        torch.testing.assert_close(tuple(t[k] for t in got), run(inputs[k]), msg=naming(f"sample {k}"))


def test_ensemble(backend):
    models = [fastlstm.LSTM(3, 4, 2, dtype=TEST_DEVICE.dtype) for _ in range(3)]
    params, buffers = stack_module_state(models)
    base = fastlstm.LSTM(3, 4, 2, device="meta")
    got = vmap(lambda p, b: functional_call(base, (p, b), (X,))[0])(params, buffers)
    for k, model in enumerate(models):
        torch.testing.assert_close(got[k], model(X)[0], msg=naming(f"model {k}"))


def test_jvp_agrees_with_vjp(backend):
    require(backend, Case(proj=2, dtype=TEST_DEVICE.dtype))
    ours, _ = module_pair(proj_size=2)
    tangent = data(4, 3, 3, seed=1)
    output, moved = jvp(lambda x: ours(x)[0], (X,), (tangent,))
    expected, pull = vjp(lambda x: ours(x)[0], X)
    torch.testing.assert_close(output, expected)
    cotangent = torch.ones_like(output)
    torch.testing.assert_close((moved * cotangent).sum(), (pull(cotangent)[0] * tangent).sum())


def test_forward_mode_ad(backend):
    ours, _ = module_pair()
    _, expected = jvp(lambda x: ours(x)[0], (X,), (X,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
    torch.testing.assert_close(tangent, expected)


def test_jacobian_and_nested_gradients(backend):
    ours, theirs = module_pair()
    x = data(2, 1, 3)
    jacobian = jacrev(lambda x: ours(x)[0])(x)
    expected = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    torch.testing.assert_close(jacobian, expected)
    second = grad(lambda x: grad(lambda z: ours(z)[0].pow(2).sum())(x).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(theirs(leaf)[0].pow(2).sum(), leaf, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.pow(2).sum(), leaf)[0])


@pytest.mark.parametrize("recompute", [False, 2])
def test_batched_gradients_of_one_graph(recompute, backend):
    """Equal to a loop over gradients, with torch.autograd's vmap and torch.func's."""
    ours, _ = module_pair(num_layers=2, bidirectional=True)
    ours.recompute = recompute
    x = X.clone().requires_grad_()
    y, (h_n, c_n) = ours(x, lengths=torch.tensor([4, 0, 2]))
    wanted = [x, *ours.parameters()]

    def gradients(*grads):
        return torch.autograd.grad((y, h_n, c_n), wanted, grads, retain_graph=True)

    grads = [data(5, *t.shape) for t in (y, h_n, c_n)]
    alone = [gradients(*(g[k] for g in grads)) for k in range(5)]
    expected = [torch.stack(one) for one in zip(*alone, strict=True)]
    torch.testing.assert_close(list(vmap(gradients)(*grads)), expected)
    batched = torch.autograd.grad((y, h_n, c_n), wanted, grads, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(list(batched), expected)


def test_vectorized_jacobian_and_hessian(backend):
    ours, theirs = module_pair()
    x = data(2, 1, 3)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    got = jacobian(lambda x: ours(x)[0], x, vectorize=True)
    torch.testing.assert_close(got, jacobian(lambda x: theirs(x)[0], x))
    got = hessian(lambda x: ours(x)[0].pow(2).sum(), x, vectorize=True)
    torch.testing.assert_close(got, hessian(lambda x: theirs(x)[0].pow(2).sum(), x))


def test_batched_gradients_of_a_cell(backend):
    ours, theirs = module_pair(cell=True)
    x = X[0]
    got = torch.autograd.functional.jacobian(lambda x: ours(x), x, vectorize=True)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(lambda x: theirs(x), x))


@pytest.mark.parametrize("cell", [False, True])
def test_tangent_of_an_arriving_gradient(cell, backend):
    ours, _ = module_pair(cell=cell)
    x = (X[0] if cell else X).clone().requires_grad_()
    y = ours(x)[0]
    grad, tangent = data(*y.shape), data(*y.shape, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(grad, tangent)
        (results,) = torch.autograd.grad(y, x, dual, retain_graph=True)
        results = torch.autograd.forward_ad.unpack_dual(results)
    torch.testing.assert_close(results.primal, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
    torch.testing.assert_close(results.tangent, torch.autograd.grad(y, x, tangent)[0])


def test_batched_or_dual_gradients_arriving_at_backward(backend):
    """With respect to weights outside torch.func.grad_and_value, through autograd's graph."""
    ours, _ = module_pair()
    weights = {name: w.detach().requires_grad_() for name, w in ours.named_parameters()}
    value = torch.func.grad_and_value(lambda x: functional_call(ours, weights, (x,))[0].sin().sum())(X)[1]
    wanted, factors = list(weights.values()), torch.arange(3.0, dtype=X.dtype, device=X.device)
    plain = torch.autograd.grad(value, wanted, retain_graph=True)
    batched = torch.autograd.grad(value, wanted, factors, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(list(batched), [torch.stack([k * g for k in factors]) for g in plain])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 2))
        results = [torch.autograd.forward_ad.unpack_dual(g) for g in torch.autograd.grad(value, wanted, dual)]
    torch.testing.assert_close([g.primal for g in results], list(plain))
    torch.testing.assert_close([g.tangent for g in results], [2 * g for g in plain])


def test_cell(backend):
    ours, theirs = module_pair(cell=True)
    got = vmap(lambda row: ours(row)[0])(X)
    torch.testing.assert_close(got, torch.stack([theirs(row)[0] for row in X]))
    weights = {name: w.detach() for name, w in ours.named_parameters()}
    got = grad(lambda w: functional_call(ours, w, (X[0],))[1].sum())(weights)
    torch.testing.assert_close(
        list(got.values()), list(torch.autograd.grad(theirs(X[0])[1].sum(), list(theirs.parameters())))
    )


def test_backend_is_restored_after_a_transform():
    ours, _ = module_pair()
    before = type(ours(X)[0].grad_fn)
    grad(lambda x: ours(x)[0].sum())(X)
    with pytest.raises(ZeroDivisionError):
        vmap(lambda x: ours(x)[0] / (1 // 0))(X[None])
    assert type(ours(X)[0].grad_fn) is before


def test_flop_counter_and_module_tracker_work():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        nn.Sequential(fastlstm.LSTM(3, 4))(torch.zeros(2, 1, 3))
    assert counter.get_total_flops() >= 0


@pytest.mark.parametrize("transform", [grad, vmap, lambda f: lambda x: jvp(f, (x,), (x,))], ids=["grad", "vmap", "jvp"])
@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_under_compile(transform, compiled, backend):
    ours, _ = module_pair()

    def loss(x):
        return ours(x)[0].pow(2).sum()

    torch._dynamo.reset()
    x = X[None] if transform is vmap else X
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    if compiled == "inside":
        loss(X), compile_(loss)(X)  # a graph compiled without a transform must not be reused with one
        got = transform(compile_(loss))(x)
    else:
        got = compile_(transform(loss))(x)
    torch.testing.assert_close(got, transform(loss)(x))
    torch._dynamo.reset()


def test_functionalize(backend):
    ours, theirs = module_pair()
    torch.testing.assert_close(torch.func.functionalize(lambda x: ours(x)[0])(X), theirs(X)[0])
