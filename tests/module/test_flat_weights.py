"""The tensors that a call uses: `_flat_weights` as written by other code, or the attributes, as in nn.LSTM."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm

from ..module_pairs import assert_same, data, flat, module_pair, naming

X = data(5, 2, 3)
OPTIONS = {"num_layers": 2, "bidirectional": True, "proj_size": 2}


class Adapted(nn.Module):
    """An LSTM with a trained low-rank term added to its hidden weights before each call."""

    def __init__(self, lstm: nn.Module, write: str) -> None:
        super().__init__()
        self.lstm, self.write = lstm.requires_grad_(False), write
        self.names = [name for name in lstm._flat_weights_names if name.startswith("weight_hh")]
        shapes = [getattr(lstm, name).shape for name in self.names]
        self.a = nn.ParameterList([data(rows, 1, seed=k) for k, (rows, _) in enumerate(shapes)])
        self.b = nn.ParameterList([data(1, columns, seed=9 + k) for k, (_, columns) in enumerate(shapes)])

    def forward(self, *args):
        lstm, terms = self.lstm, {n: a @ b for n, a, b in zip(self.names, self.a, self.b, strict=True)}
        if self.write == "item":
            for name, term in terms.items():
                lstm._flat_weights[lstm._flat_weights_names.index(name)] = getattr(lstm, name) + term
        elif self.write == "dict":
            for name, term in terms.items():
                lstm.__dict__[name] = lstm._parameters[name] + term
        else:
            weights = [getattr(lstm, name) + terms.get(name, 0) for name in lstm._flat_weights_names]
            lstm._flat_weights = tuple(weights) if self.write == "tuple" else weights
        return lstm(*args)


def adapted(write: str, how: str = "plain") -> tuple[nn.Module, nn.Module]:
    ours, theirs = module_pair(**OPTIONS)
    if how == "converted":
        ours = fastlstm.convert(copy.deepcopy(theirs))
    pair = Adapted(ours, write), Adapted(theirs, write)
    change = {"unpickled": lambda m: pickle.loads(pickle.dumps(m)), "copied": copy.deepcopy}.get(how, lambda m: m)
    return change(pair[0]), change(pair[1])


@pytest.mark.parametrize("write", ["list", "tuple", "item", "dict"])
def test_adapters_compute_and_train(write, backend):
    ours, theirs = adapted(write)
    for _ in range(3):
        assert_same(ours, theirs, X)
        for model in (ours, theirs):
            with torch.no_grad():
                for weight in model.a:
                    weight.add_(0.1)
    assert all(weight.grad.any() for weight in [*ours.a, *ours.b])


@pytest.mark.parametrize("write", ["list", "item", "dict"])
@pytest.mark.parametrize("how", ["converted", "unpickled", "copied"])
def test_adapters_of_modules_that_were_not_built_here(how, write):
    assert_same(*adapted(write, how), X)


@pytest.mark.parametrize("write", ["list", "item", "dict"])
def test_adapters_with_packed_input(write, backend):
    assert_same(*adapted(write), pack_padded_sequence(X, torch.tensor([5, 2])))


@pytest.mark.parametrize("write", ["list", "item", "dict"])
def test_adapters_compile_in_one_graph(write):
    torch._dynamo.reset()
    ours, theirs = adapted(write)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = flat(compiled(X)), flat(theirs(X))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(
            torch.autograd.grad(results[0][0].sum(), list(ours.a)),
            torch.autograd.grad(results[1][0].sum(), list(theirs.a)),
        )
        for model in (ours, theirs):
            model.a[0] = nn.Parameter(2 * model.a[0].detach())


def test_compiled_call_reads_weights_written_between_calls():
    torch._dynamo.reset()
    ours, theirs = module_pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for k in range(4):
        torch.testing.assert_close(flat(compiled(X)), flat(theirs(X)), msg=naming(f"call {k}"))
        for module in (ours, theirs):
            module._flat_weights[1] = data(16, 4, seed=k)


def weight(k: int) -> nn.Parameter:
    return nn.Parameter(data(16, 4, seed=k))


# Changes applied to both modules; a call compares the modules after each.
STEPS = {
    "item": lambda m: m._flat_weights.__setitem__(1, 2 * m.weight_hh_l0),
    "another item": lambda m: m._flat_weights.__setitem__(0, 3 * m.weight_ih_l0),
    "whole list": lambda m: setattr(m, "_flat_weights", [2 * w for w in m.parameters()]),
    "item back": lambda m: m._flat_weights.__setitem__(1, m.weight_hh_l0),
    "parameter": lambda m: setattr(m, "weight_hh_l0", weight(1)),
    "parameter, then item": lambda m: (setattr(m, "weight_hh_l0", weight(2)), STEPS["another item"](m)),
    "parameter in the dict of parameters": lambda m: m._parameters.__setitem__("weight_hh_l0", weight(3)),
    "both": lambda m: [d.__setitem__(k, w) for w in [weight(4)] for d, k in
                       ((m._parameters, "weight_hh_l0"), (m._flat_weights, 1))],
    "entry of the module's dict": lambda m: m.__dict__.__setitem__("weight_hh_l0", data(16, 4, seed=5)),
    "no entry": lambda m: m.__dict__.pop("weight_hh_l0", None),
    "loaded": lambda m: m.load_state_dict({n: 2 * w for n, w in m.state_dict().items()}, assign=True),
    "moved": lambda m: m.float().double(),
    "functional_call": lambda m: functional_call(m, {"weight_hh_l0": weight(6)}, (X,)),
    "requires_grad": lambda m: m.requires_grad_(False).requires_grad_(True),
}  # fmt: skip


def after(module: nn.Module, step: str) -> list[torch.Tensor]:
    STEPS[step](module)
    return [t.detach() for t in flat(module(X))]


@pytest.mark.parametrize("first", STEPS)
def test_pairs_of_weight_changes_equal_nn_lstm(first, backend):
    """Every pair of ways to change a weight gives nn.LSTM's results after each call."""
    for second in STEPS:
        ours, theirs = module_pair()
        for step in (first, second, "another item", "requires_grad"):
            torch.testing.assert_close(
                after(ours, step), after(theirs, step), msg=lambda m, k=second, s=step: f"{k}, {s}: {m}"
            )


@pytest.mark.parametrize("seed", range(20))
def test_weight_changes_in_any_order(seed):
    ours, theirs = module_pair()
    steps = list(STEPS)
    order = [steps[k] for k in torch.randint(len(steps), (25,), generator=torch.Generator().manual_seed(seed))]
    for k, step in enumerate(order):
        torch.testing.assert_close(after(ours, step), after(theirs, step), msg=lambda m, k=k: f"{order[: k + 1]}: {m}")


def test_missing_attribute_is_dropped_from_flat_weights():
    """For code that removes a parameter and writes the list instead."""
    pair = module_pair()
    for module in pair:
        raw = data(16, 4, seed=3)
        del module.weight_hh_l0
        module._flat_weights[1] = raw.requires_grad_()
        module.raw = nn.Parameter(raw)
    torch.testing.assert_close(flat(pair[0](X)), flat(pair[1](X)))


def test_flat_weights_accept_a_tuple(backend):
    pair = module_pair()
    for module in pair:
        module._flat_weights = tuple(module.parameters())
    assert_same(*pair, X)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_computed_weights_are_not_kept_alive_and_do_not_hinder_a_copy(grad):
    """nn.LSTM keeps them in the list, so it cannot be copied after a call."""
    lstm = module_pair()[0]
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    kept = []
    lstm.parametrizations.weight_hh_l0.register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    with torch.set_grad_enabled(grad):
        lstm(X)
        expected = flat(lstm(X))
        torch.testing.assert_close(flat(copy.deepcopy(lstm)(X)), expected)
    del expected
    gc.collect()
    assert len(kept) >= 2
    assert not any(ref() is not None for ref in kept)


def test_weights_of_a_transform_are_not_retained():
    lstm = module_pair()[0]
    weights = {name: torch.stack([w, 2 * w]).detach() for name, w in lstm.named_parameters()}
    torch.func.vmap(lambda w: functional_call(lstm, w, (X,))[0])(weights)
    assert [id(w) for w in lstm._flat_weights] == [id(w) for w in lstm.parameters()]


def test_parametrization_is_computed_once_per_call():
    lstm, calls = module_pair()[0], []
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    lstm.parametrizations.weight_hh_l0.register_forward_hook(lambda *_: calls.append(1))
    lstm(X)
    assert len(calls) == 1


def test_flat_weights_follow_replaced_parameters():
    lstm = fastlstm.LSTM(3, 4, dtype=torch.float64)
    lstm._parameters["weight_hh_l0"] = new = weight(0)
    lstm(X)
    assert lstm._flat_weights[1] is new
    assert lstm._flat_weight_refs[1]() is new


@pytest.mark.parametrize("hx", [None, (data(2, 4), data(2, 4, seed=1))], ids=["zeros", "hx"])
def test_cells_read_instance_attributes_before_parameters(hx, backend):
    pair = module_pair(cell=True)
    for module in pair:
        module.__dict__["weight_hh"] = 2 * module.weight_hh
        module.__dict__["bias_ih"] = data(16)
    assert_same(*pair, X[0], hx)
    for module in pair:
        module.__dict__.pop("weight_hh")
    assert_same(*pair, X[0], hx)
