"""What a call saves for backward: no argument that nn.LSTM frees, and equal ones on every backend."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from fastlstm.ragged import PackedLayout

from ..cases import Case
from ..module_pairs import data, module_pair
from ..runners import require

T, B, I, H = 3, 2, 3, 4  # noqa: E741
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional with projection": {"bidirectional": True, "proj_size": 2},
    "cell": {"cell": True},
}
# Biases, and the weights of both directions, form one group.
GROUPS = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias", "weight_hr")
MESSAGE = "modified by an inplace operation"
backends = pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)


class Computed(torch.autograd.Function):
    """A tensor with autograd history in an array whose lifetime is that of the tensor's memory."""

    @staticmethod
    def forward(ctx, source: Tensor, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class Call:
    """One call of `module` on computed arguments, of which `needs` (of GROUPS) require a gradient."""

    def __init__(self, module: nn.Module, needs: tuple[str, ...], form: str = "padded") -> None:
        D, P = 2 if getattr(module, "bidirectional", False) else 1, getattr(module, "proj_size", 0) or H
        shapes = {"x": (T, B, I), "h0": (D, B, P), "c0": (D, B, H)}
        if isinstance(module, (nn.LSTMCell, fastlstm.LSTMCell)):
            shapes = {name: shape[1:] for name, shape in shapes.items()}
        values = {name: data(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
        values |= {name: p.detach() for name, p in module.named_parameters()}
        self.leaves = {name: v.clone().requires_grad_(group(name) in needs) for name, v in values.items()}
        arrays = {name: v.numpy().copy() for name, v in values.items()}
        self.memory = {name: weakref.ref(array) for name, array in arrays.items()}
        self.arguments = {name: Computed.apply(self.leaves[name], array) for name, array in arrays.items()}
        weights = {name: self.arguments[name] for name in arrays if name not in shapes}
        x = self.arguments["x"] if form == "padded" else pack_padded_sequence(self.arguments["x"], [3, 1])
        y, states = torch.func.functional_call(module, weights, (x, (self.arguments["h0"], self.arguments["c0"])))
        self.y = y.data if isinstance(y, PackedSequence) else y
        self.c = states if isinstance(states, Tensor) else states[1]

    def grad_leaves(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def kept(self) -> set[str]:
        """The arguments that are still in memory while only results are referenced."""
        self.arguments.clear()
        return {name for name, array in self.memory.items() if array() is not None}

    def edit(self, name: str) -> None:
        with torch.no_grad():
            for key, tensor in self.arguments.items():
                if group(key) == name:
                    tensor.mul_(2)

    def gradients(self) -> list[Tensor] | str:
        try:
            return list(torch.autograd.grad(self.y.pow(2).sum() + self.c.sum(), self.grad_leaves(), allow_unused=True))
        except RuntimeError as error:
            return str(error)


def group(name: str) -> str:
    return next(key for key in GROUPS if name.startswith(key))


def groups_of(kind: str) -> list[str]:
    return [name for name in GROUPS if name != "weight_hr" or "projection" in kind]


def subsets(kind: str) -> list[tuple[str, ...]]:
    names = groups_of(kind)
    return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


@backends
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_argument_outlives_that_of_nn_lstm(kind, form, backend):
    if kind == "cell" and form == "packed":
        pytest.skip("a cell takes no PackedSequence")
    for needs in subsets(kind):
        # Each call has a separate module, because modules record weights that are leaves.
        mine, expected = (Call(module, needs, form).kept() for module in module_pair(**KINDS[kind]))
        assert mine <= expected, (needs, mine - expected)


@backends
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks_see_only_what_backward_reads(kind, backend):
    for needs in subsets(kind):
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.data_ptr()) or t, lambda t: t):
            call = Call(module_pair(**KINDS[kind])[0], needs)
        packed = {name for name, t in call.arguments.items() if t.data_ptr() in seen}
        assert packed == call.kept(), needs


@pytest.mark.parametrize("kind", KINDS)
def test_native_and_eager_save_equal_tensors(kind):
    """Compares gradients, and which in-place changes between forward and backward are refused."""
    require("native", Case())
    ours, theirs = module_pair(**KINDS[kind])
    for needs in subsets(kind):
        for edited in groups_of(kind):
            results = []
            for module, backend in ((ours, "native"), (ours, "eager"), (theirs, "auto")):
                with fastlstm.use_backend(backend):
                    call = Call(module, needs)
                    call.edit(edited)
                    results.append(call.gradients())
            native, eager, expected = results
            if isinstance(native, str) or isinstance(eager, str):
                assert MESSAGE in native, (needs, edited)
                assert MESSAGE in eager, (needs, edited)
                assert isinstance(expected, str), (needs, edited)
            else:
                torch.testing.assert_close(native, eager, msg=lambda m, at=(needs, edited): f"{at}: {m}")
                if not isinstance(expected, str):
                    torch.testing.assert_close(native, expected, msg=lambda m, at=(needs, edited): f"{at}: {m}")


def second_order(call: Call) -> list[Tensor]:
    wanted = call.grad_leaves()
    first = torch.autograd.grad(call.y.pow(2).sum() + call.c.sum(), wanted, create_graph=True, allow_unused=True)
    loss = sum((g * g).sum() for g in first if g is not None)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def batched(call: Call) -> list[Tensor]:
    weights = torch.stack([torch.ones_like(call.y), torch.arange(call.y.numel()).view_as(call.y).to(call.y)])
    return list(torch.autograd.grad(call.y, call.grad_leaves(), weights, is_grads_batched=True, allow_unused=True))


def vmapped(call: Call) -> list[Tensor]:
    weights = torch.stack([torch.ones_like(call.y), torch.arange(call.y.numel()).view_as(call.y).to(call.y)])
    wanted = call.grad_leaves()
    return list(torch.vmap(lambda w: torch.autograd.grad(call.y, wanted, w, retain_graph=True))(weights))


@backends
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("take", [second_order, batched, vmapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_saves_no_more_than_nn_lstm(kind, take: Callable[[Call], list[Tensor]], form, backend):
    """Second-order and batched gradients if an argument was freed or changed after forward."""
    if kind == "cell" and form == "packed":
        pytest.skip("a cell takes no PackedSequence")
    modules = module_pair(**KINDS[kind])
    for needs in (("x",), ("weight_hh",), ("bias",), ("x", "weight_ih", "bias"), GROUPS):
        for edited in ("x", "h0", "c0", "weight_ih", "bias"):
            if edited == "bias" or edited not in needs:
                results = []
                for module in modules:
                    call = Call(module, needs, form)
                    call.edit(edited)
                    call.arguments.clear()
                    try:
                        results.append(take(call))
                    except RuntimeError as error:
                        results.append(str(error))
                mine, expected = results
                if isinstance(expected, str):
                    continue
                assert not isinstance(mine, str), (needs, edited, mine)
                torch.testing.assert_close(mine, expected, msg=lambda m, at=(needs, edited): f"{at}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["whole", "lengths", "packed"])
@pytest.mark.parametrize("sizes", [(1, 1, 37, 37), (6, 4, 37, 37), (6, 4, 5, 3)], ids=str)
def test_native_gates_equal_eager_gates(sizes, form, dtype):
    """The op that converts the native reserve's layouts to plain gates."""
    require("native", Case())
    steps, rows, hidden, features = sizes
    lengths = None if form == "whole" else torch.arange(rows).clamp(max=steps - 1).flip(0) + 1
    weights = list(nn.LSTM(5, hidden, bidirectional=True, proj_size=features % hidden).to(dtype).parameters())
    x = data(steps, rows, 5).to(dtype)
    op, eager = torch.ops.fastlstm.native_layer, torch.ops.fastlstm.eager_layer
    if form == "lengths":
        lengths = lengths.flip(0)
    expected = eager(x, None, None, weights, lengths, None, True, True)[4]
    op_input = x
    if form == "packed":
        layout = PackedLayout.of_lengths(lengths)
        op_input, expected = layout.pack(x), torch.stack([layout.pack(gates) for gates in expected])
    gates = torch.ops.fastlstm.native_gates(
        op(op_input, None, None, weights, lengths, None, True, True)[4], op_input, weights, lengths
    )
    if form == "lengths":
        padding = torch.arange(steps)[:, None] >= lengths
        assert not gates[:, padding].any()
        gates, expected = gates[:, ~padding], expected[:, ~padding]
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(gates, expected, rtol=0, atol=tolerance)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_create_graph_does_not_change_first_gradients(shift, dtype, backend):
    """Uses the gates that forward saved, without rounding pre-activations again."""
    ours, _ = module_pair(8, 16, dtype=dtype)
    with torch.no_grad():  # input and output gates near 0, where a pre-activation has few digits left
        ours.bias_ih_l0[:16] -= shift
        ours.bias_ih_l0[48:] -= shift
    x, reset = data(6, 4, 8).to(dtype).requires_grad_(), torch.zeros(6, 4, dtype=torch.bool)
    reset[3, 1] = True
    results = []
    for create_graph in (False, True):
        y = ours(x, lengths=[6, 0, 3, 1], reset_mask=reset)[0]
        results.append(torch.autograd.grad(y.float().pow(2).sum(), [x, *ours.parameters()], create_graph=create_graph))
    for plain, recorded in zip(*results, strict=True):
        assert (plain - recorded).abs().max() <= 4 * torch.finfo(dtype).eps * plain.abs().max()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_order_in_other_dtypes(dtype, backend):
    ours, _ = module_pair(5, 20, bidirectional=True, dtype=torch.float64)
    results = []
    for precision in (dtype, torch.float64):
        x = data(6, 4, 5).to(dtype).to(precision).requires_grad_()
        y = ours.to(dtype).to(precision)(x, lengths=[6, 0, 3, 1])[0]
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.pow(2).sum(), [x, *ours.parameters()])])
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).abs().max() <= 32 * torch.finfo(dtype).eps * reference.abs().max()
