"""torch.func beyond single transforms: nested, with every option of the module, and inside an outer backward pass.

Each result is compared with plain loops over nn.LSTM, or over fastlstm.LSTM where nn.LSTM lacks the option.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vjp, vmap

import fastlstm
from fastlstm.accuracy import error_bounds

from ..cases import Case
from ..device import TEST_DEVICE
from ..module_pairs import data, flat, module_pair, naming
from ..runners import assert_accurate, precision, require

T, N, B = 4, 3, 2
LENGTHS = torch.tensor([[4, 0], [2, 3], [1, 4]])
MASK = data(N, T, B, seed=5) > 0.4
RAGGED_OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 2, "bias": False, "bidirectional": True},
)
OPTIONS = (
    *RAGGED_OPTIONS,
    {"batch_first": True},
    {"proj_size": 2, "num_layers": 2},
)


def weights_of(module):
    return {name: w.detach() for name, w in module.named_parameters()}


def loss(module, weights, x, **ragged):
    results = flat(functional_call(module, weights, (x,), ragged))
    return sum((k + 1) * r.pow(2).sum() for k, r in enumerate(results))


def looped(module, inputs, options=({},) * N):
    """The gradients of `loss` for each sample, stacked."""
    results = []
    for x, ragged in zip(inputs, options, strict=True):
        leaves = {name: w.clone().requires_grad_() for name, w in weights_of(module).items()}
        results.append(torch.autograd.grad(loss(module, leaves, x, **ragged), list(leaves.values())))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("steps", [T, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_sample_gradients(options, steps, backend):
    require(backend, Case(proj=options.get("proj_size", 0), dtype=TEST_DEVICE.dtype))
    ours, theirs = module_pair(**options)
    inputs = data(N, *((B, steps) if "batch_first" in options else (steps, B)), 3)
    got = vmap(grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0))(weights_of(ours), inputs)
    torch.testing.assert_close(list(got.values()), looped(theirs, inputs))


@pytest.mark.parametrize("options", RAGGED_OPTIONS, ids=str)
def test_per_sample_gradients_of_ragged_rows(options, backend):
    """Separate lengths and masks for each sample, and NaN in the padding."""
    require(backend, Case(proj=options.get("proj_size", 0), dtype=TEST_DEVICE.dtype, lengths=(1,), resets=((0, 0),)))
    ours, _ = module_pair(**options)
    padding = torch.arange(T)[None, :, None] >= LENGTHS[:, None]
    inputs = data(N, T, B, 3).masked_fill(padding[..., None], float("nan"))

    def one(w, x, n, m):
        return loss(ours, w, x, lengths=n, reset_mask=m, return_cell_states=True)

    got = vmap(grad(one), in_dims=(None, 0, 0, 0))(weights_of(ours), inputs, LENGTHS, MASK)
    ragged = [{"lengths": n, "reset_mask": m, "return_cell_states": True} for n, m in zip(LENGTHS, MASK, strict=True)]
    with fastlstm.use_backend("reference"):
        expected = looped(ours, inputs, ragged)
    torch.testing.assert_close(list(got.values()), expected)


def test_per_sample_gradients_of_states(backend):
    """Mapped initial states and their gradients."""
    ours, theirs = module_pair(bidirectional=True)
    x, h0, c0 = data(T, B, 3), data(N, 2, B, 4), data(2, N, B, 4, seed=1)
    got = vmap(grad(lambda h, c: ours(x, (h, c))[0].pow(2).sum(), argnums=(0, 1)), in_dims=(0, 1))(h0, c0)
    for k in range(N):
        h, c = h0[k].clone().requires_grad_(), c0[:, k].clone().requires_grad_()
        expected = torch.autograd.grad(theirs(x, (h, c))[0].pow(2).sum(), (h, c))
        torch.testing.assert_close([g[k] for g in got], list(expected), msg=naming(f"sample {k}"))


def test_vmap_in_vmap(backend):
    ours, theirs = module_pair()
    inputs = data(2, N, T, B, 3)
    per_sample = vmap(vmap(grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0)), in_dims=(None, 0))
    got = per_sample(weights_of(ours), inputs)
    for k in range(2):
        torch.testing.assert_close([g[k] for g in got.values()], looped(theirs, inputs[k]), msg=naming(f"sample {k}"))


def test_ensemble_gradients(backend):
    """Training an ensemble by vmap(grad), and by backward through vmap."""
    pairs = [module_pair(num_layers=2) for _ in range(N)]
    for k, (ours, theirs) in enumerate(pairs):
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.mul_(k + 1)
                b.mul_(k + 1)
    base, x = pairs[0][0], data(T, B, 3)
    params, _ = stack_module_state([ours for ours, _ in pairs])
    expected = [looped(theirs, [x], [{}]) for _, theirs in pairs]
    got = vmap(grad(lambda w, x: loss(base, w, x)), in_dims=(0, None))(
        {name: w.detach() for name, w in params.items()}, x
    )
    vmap(lambda w: loss(base, w, x))(params).sum().backward()
    for k in range(N):
        torch.testing.assert_close([g[k : k + 1] for g in got.values()], expected[k], msg=naming(f"grad, model {k}"))
        grads = [params[name].grad[k : k + 1] for name in got]
        torch.testing.assert_close(grads, expected[k], msg=naming(f"backward, model {k}"))


def test_per_sample_gradients_of_an_ensemble(backend):
    models = [fastlstm.LSTM(3, 4, dtype=TEST_DEVICE.dtype) for _ in range(2)]
    params, _ = stack_module_state(models)
    params = {name: w.detach() for name, w in params.items()}
    inputs = data(N, T, B, 3)
    one = grad(lambda w, x: loss(models[0], w, x))
    orders = {
        "samples inside": vmap(vmap(one, in_dims=(None, 0)), in_dims=(0, None)),
        "models inside": vmap(vmap(one, in_dims=(0, None)), in_dims=(None, 0), out_dims=1),
    }
    for order, nested in orders.items():
        got = nested(params, inputs)
        for k, model in enumerate(models):
            case = f"{order}, model {k}"
            torch.testing.assert_close([g[k] for g in got.values()], looped(model, inputs), msg=naming(case))


def test_backward_through_per_sample_gradients(backend):
    """A loss with the norm of each sample's gradient: second derivatives through vmap."""
    ours, theirs = module_pair(bidirectional=True)
    inputs = data(N, T, B, 3)
    leaves = {name: w.clone().requires_grad_() for name, w in weights_of(ours).items()}
    results = vmap(grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0))(leaves, inputs)
    got = torch.autograd.grad(sum(g.pow(2).sum() for g in results.values()), list(leaves.values()))
    total = 0
    for x in inputs:
        first = torch.autograd.grad(
            loss(theirs, dict(theirs.named_parameters()), x), theirs.parameters(), create_graph=True
        )
        total = total + sum(g.pow(2).sum() for g in first)
    torch.testing.assert_close(got, torch.autograd.grad(total, list(theirs.parameters())))


def test_hessian_by_three_compositions(backend):
    ours, theirs = module_pair(2, 3)
    x = data(3, 1, 2)
    expected = torch.autograd.functional.hessian(lambda x: theirs(x)[0].pow(3).sum(), x)

    def f(x):
        return ours(x)[0].pow(3).sum()

    compositions = {
        "hessian": hessian(f),
        "jacrev of jacrev": jacrev(jacrev(f)),
        "jacrev of jacfwd": jacrev(jacfwd(f)),
        "jacfwd of jacfwd": jacfwd(jacfwd(f)),
    }
    for name, second in compositions.items():
        torch.testing.assert_close(second(x), expected, msg=naming(name))


def test_hessian_vector_product_and_third_derivative(backend):
    ours, theirs = module_pair(2, 3)
    x, v = data(3, 1, 2), data(3, 1, 2, seed=1)
    _, pull = vjp(grad(lambda x: ours(x)[0].pow(2).sum()), x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(theirs(leaf)[0].pow(2).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), leaf, create_graph=True)
    torch.testing.assert_close(pull(v)[0], second.detach())
    got = grad(lambda x: vjp(grad(lambda z: ours(z)[0].pow(2).sum()), x)[1](v)[0].pow(2).sum())(x)
    torch.testing.assert_close(got, torch.autograd.grad(second.pow(2).sum(), leaf)[0])


def test_jacobians_of_mapped_rows(backend):
    ours, theirs = module_pair()
    inputs = data(N, 2, 1, 3)
    expected = [torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x) for x in inputs]
    for jacobian in (jacrev, jacfwd):
        got = vmap(jacobian(lambda x: ours(x)[0]))(inputs)
        torch.testing.assert_close(got, torch.stack(expected), msg=naming(jacobian.__name__))


def test_transforms_run_on_the_backend(monkeypatch):
    """vmap(grad) does not run the reference; second-order gradients do."""
    ours, _ = module_pair()
    inputs, calls = data(N, T, B, 3), []
    real = fastlstm.reference.layer
    monkeypatch.setattr(fastlstm.reference, "layer", lambda *args: calls.append(1) or real(*args))
    with fastlstm.use_backend("auto"):
        vmap(grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0))(weights_of(ours), inputs)
        vmap(lambda x: ours(x)[0])(inputs)
        assert not calls
        grad(lambda x: grad(lambda z: ours(z)[0].pow(2).sum())(x).sum())(inputs[0])
        assert calls


def test_lengths_out_of_range_raise_under_vmap(backend):
    ours, _ = module_pair()
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T=4\], got 9"):
        vmap(lambda x, n: ours(x, lengths=n)[0])(data(N, T, B, 3), LENGTHS + 5)


def test_dropout_under_vmap(backend):
    ours, _ = module_pair(num_layers=2, dropout=0.5)
    same = data(T, B, 3).expand(N, T, B, 3)
    got = vmap(lambda x: ours(x)[0], randomness="different")(same)
    assert not torch.equal(got[0], got[1])
    got = vmap(lambda x: ours(x)[0], randomness="same")(same)
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_sample_gradients_in_other_dtypes(dtype, backend):
    ours, theirs = module_pair(3, 8, dtype=dtype)
    inputs = data(N, T, B, 3).to(dtype)
    got = vmap(grad(lambda w, x: loss(ours, w, x)), in_dims=(None, 0))(weights_of(ours), inputs)
    theirs.double()
    bounded = error_bounds(
        lambda: dict(zip(got, looped(theirs, inputs.double()), strict=True)), precision(dtype, backend)
    )
    assert_accurate(got, *bounded)
