"""In-place changes between forward and backward: those that nn.LSTM's float64 layers allow give correct gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm

from ..module_pairs import data, module_pair

EDITS: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda y: y.relu_(),
    "masked": lambda y: y.__setitem__(y > 0.1, 0),
    "add": lambda y: y.__iadd__(1),
    "masked_fill_": lambda y: y.masked_fill_(y < 0, 0.5),
    "of a view": lambda y: y[..., :2].mul_(3),
    "twice": lambda y: y.mul_(2).add_(1),
}
KINDS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": 2},
    "deep": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False, "batch_first": True},
}
MESSAGE = "modified by an inplace operation"
pytestmark = pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, [4, 1, 3], enforce_sorted=False)


def gradients(module: nn.Module, edit: Callable[[Tensor], object], form: str = "padded", call=None):
    """The output after `edit`, and gradients with respect to x and every parameter."""
    x = data(4, 3, 3).requires_grad_()
    output, (h_n, c_n) = (module if call is None else call)(x if form == "padded" else packed(x))
    y = output if form == "padded" else output.data
    edit(y)
    loss = (y * y).sum() + h_n.sin().sum() + c_n.sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_changed_in_place(kind, edit, form, backend):
    if kind == "deep" and form == "packed":
        pytest.skip("pack_padded_sequence is given [T, B, I]")
    ours, theirs = module_pair(**KINDS[kind])
    torch.testing.assert_close(gradients(ours, EDITS[edit], form), gradients(theirs, EDITS[edit], form))


@pytest.mark.parametrize("lengths", [None, (6, 0, 4)], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "bidirectional", "projected"])
def test_output_changed_in_place_in_every_dtype(kind, dtype, lengths, backend):
    """nn.LSTM refuses some of these. The error is at most twice that of the out-of-place change."""
    ours, _ = module_pair(24, 40, **({"proj_size": 18} if kind == "projected" else KINDS[kind]), dtype=dtype)
    results = []
    for precision, in_place in ((dtype, True), (dtype, False), (torch.float64, False)):
        x = data(6, 3, 24).to(dtype).to(precision).requires_grad_()
        y = ours.to(precision)(x, lengths=lengths)[0]
        y = y.relu_() if in_place else y.relu()
        results.append(torch.autograd.grad(y.double().sum(), [x, *ours.parameters()]))
        ours.to(dtype)
    for mine, plain, reference in zip(*results, strict=True):
        off, bar = ((g - reference).abs().max() for g in (mine, plain))
        assert off <= 2 * bar + torch.finfo(dtype).eps * reference.abs().max()


@pytest.mark.parametrize("option", ["lengths", "reset_mask", "return_cell_states", "recompute"])
def test_output_changed_in_place_with_every_option(option, backend):
    """The final states and c of every step are edited too; backward does not read them."""
    ours, _ = module_pair(bidirectional=True)
    ours.recompute = 2 if option == "recompute" else False
    kwargs = {
        "lengths": {"lengths": [4, 0, 2]},
        "reset_mask": {"reset_mask": data(4, 3) > 0.5},
        "return_cell_states": {"return_cell_states": True},
    }.get(option, {})
    results = []
    for in_place in (True, False):
        x = data(4, 3, 3).requires_grad_()
        y, (h_n, c_n), *_ = ours(x, **kwargs)
        if in_place:
            y.tanh_(), h_n.mul_(2), c_n.relu_()
        else:
            y, h_n, c_n = y.tanh(), h_n * 2, c_n.relu()
        results.append(torch.autograd.grad(y.sum() + (h_n * c_n).sum(), [x, *ours.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", ["bidirectional", "projected"])
def test_output_changed_in_place_under_compile(kind, where, backend):
    ours, theirs = module_pair(**KINDS[kind])

    def inside(x):
        y, states = ours(x)
        y.relu_()
        return y, states

    torch._dynamo.reset()
    call = torch.compile(ours if where == "outside" else inside, backend="aot_eager", fullgraph=True)
    edit = EDITS["relu_"] if where == "outside" else lambda y: None
    torch.testing.assert_close(gradients(ours, edit, call=call), gradients(theirs, EDITS["relu_"]))


def test_output_changed_in_place_with_hooks_and_checkpoints(backend):
    ours, theirs = module_pair(bidirectional=True)
    expected = gradients(theirs, EDITS["relu_"])
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(ours, EDITS["relu_"]), expected)
    call = lambda x: torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)  # noqa: E731
    torch.testing.assert_close(gradients(ours, EDITS["relu_"], call=call), expected)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        x = data(4, 3, 3).requires_grad_()
        y, (h_n, c_n) = ours(x)
        y.relu_()
        ((y * y).sum() + h_n.sin().sum() + c_n.sum()).backward()
    torch.testing.assert_close([y.detach(), x.grad, *(p.grad for p in ours.parameters())], expected)


def test_output_changed_in_place_keeps_second_derivatives(backend):
    ours, theirs = module_pair(bidirectional=True)
    results = []
    for module in (ours, theirs):
        x = data(4, 3, 3).requires_grad_()
        y = module(x)[0]
        y.tanh_()
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_output_changed_in_place_inside_a_transform(backend):
    results = []
    for module in module_pair(bidirectional=True):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters, module=module):
            y = torch.func.functional_call(module, parameters, (data(4, 3, 3),))[0]
            y.tanh_()
            return y.sum()

        results.append(torch.func.grad(loss)(parameters))
    torch.testing.assert_close(*results)


ARGUMENTS = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
FROZEN = ("nothing", "states", "weights", "all but weight_ih", "all but bias_hh")


def change(module: nn.Module, name: str, frozen: str, T: int) -> object:
    """The gradients after changing one argument in place between forward and backward, or the error."""
    weights = dict(module.named_parameters())
    for key, weight in weights.items():
        kept = {"weights": False, "all but weight_ih": "weight_ih" in key, "all but bias_hh": "bias_hh" in key}
        weight.requires_grad_(kept.get(frozen, True))
    P = getattr(module, "proj_size", 0) or 4
    leaves = {"x": data(T, 2, 3), "h0": data(1, 2, P, seed=1), "c0": data(1, 2, 4, seed=2)}
    if isinstance(module, (nn.LSTMCell, fastlstm.LSTMCell)):
        leaves = {key: leaf[0] for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(frozen in ("nothing", "weights"))
    copies = {key: leaf * 1 for key, leaf in leaves.items()}  # leaves must not be changed in place
    y, states = module(copies["x"], (copies["h0"], copies["c0"]))
    with torch.no_grad():
        ({key.removesuffix("_l0"): weight for key, weight in weights.items()} | copies)[name].mul_(2)
    wanted = [t for t in (*leaves.values(), *weights.values()) if t.requires_grad]
    c_n = states[1] if isinstance(states, tuple) else states
    try:
        return torch.autograd.grad(y.pow(2).sum() + c_n.sum(), wanted, allow_unused=True)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("kind", ["plain", "projected", "cell"])
def test_argument_changed_in_place(kind, T, backend):
    """Equal gradients if nn.LSTM allows the change, an error if it refuses it."""
    if kind == "cell" and T > 1:
        pytest.skip("a cell is one step")
    for name in [name for name in ARGUMENTS if name != "weight_hr" or kind == "projected"]:
        for frozen in FROZEN:
            kwargs = {"cell": True} if kind == "cell" else KINDS[kind]
            mine, expected = (change(module, name, frozen, T) for module in module_pair(**kwargs))
            assert isinstance(mine, str) == isinstance(expected, str), (name, frozen, mine, expected)
            if isinstance(mine, str):
                assert MESSAGE in mine, (name, frozen)
            else:
                torch.testing.assert_close(mine, expected, msg=lambda m, at=(name, frozen): f"{at}: {m}")


@pytest.mark.parametrize("kind", ["plain", "cell"])
def test_double_backward_allows_the_same_in_place_changes(kind, backend):
    """Backward does not read biases, as in nn.LSTM."""
    results = []
    for module in module_pair(cell=kind == "cell"):
        x = data(4, 3, 3).requires_grad_()
        y = module(x[0] if kind == "cell" else x)[0]
        with torch.no_grad():
            next(p for name, p in module.named_parameters() if "bias_ih" in name).add_(1)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.pow(2).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_double_backward_refuses_changes_of_recomputed_inputs(backend):
    module, _ = module_pair()
    module.recompute = 2
    x = data(4, 3, 3).requires_grad_()
    y = module(x)[0]
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_recompute_reads_copies_of_the_states(backend):
    results = []
    for in_place in (False, True):
        module, _ = module_pair(bidirectional=True)
        module.recompute = 2
        leaves = [data(5, 2, 3), data(2, 2, 4, seed=1), data(2, 2, 4, seed=2)]
        x, h0, c0 = (leaf.requires_grad_() * 1 for leaf in leaves)
        y = module(x, (h0, c0))[0]
        if in_place:
            with torch.no_grad():
                h0.mul_(2), c0.mul_(2)
        first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), [*leaves, *module.parameters()]))
    torch.testing.assert_close(*results)


def test_cell_states_changed_in_place_are_an_error(backend):
    """Backward reads them. nn.LSTM does not return them; here return_cell_states does."""
    module, _ = module_pair()
    _, _, cells = module(data(4, 3, 3), return_cell_states=True)
    cells.mul_(2)
    with pytest.raises(RuntimeError, match=MESSAGE):
        cells.sum().backward()


def test_input_changed_in_place_does_not_leak_the_graph(backend):
    """After x += y, x references the layer's node, which must not reference x: the cycle would leak."""
    module, _ = module_pair(proj_size=3)
    module.requires_grad_(False)
    x = data(4, 3, 3).requires_grad_() * 1
    x += module(x)[0]
    x.sum().backward()
    alive = weakref.ref(x)
    del x
    assert alive() is None
