"""In-place changes between forward and backward: what nn.LSTM's float64 layers allow is allowed, and right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .twins import data, twins

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
    """The output after `edit`, and the gradients of it and of the final states by x and every parameter."""
    x = data(4, 3, 3).requires_grad_()
    output, (h_n, c_n) = (module if call is None else call)(x if form == "padded" else packed(x))
    y = output if form == "padded" else output.data
    edit(y)
    loss = (y * y).sum() + h_n.sin().sum() + c_n.sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output(kind, edit, form, backend):
    if kind == "deep" and form == "packed":
        pytest.skip("pack_padded_sequence is given [T, B, I]")
    ours, theirs = twins(**KINDS[kind])
    torch.testing.assert_close(gradients(ours, EDITS[edit], form), gradients(theirs, EDITS[edit], form))


@pytest.mark.parametrize("lengths", [None, (6, 0, 4)], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "bidirectional", "projected"])
def test_the_output_in_every_dtype(kind, dtype, lengths, backend):
    """Some of these nn.LSTM refuses. As far from the truth as the change out of place, twice at most."""
    ours, _ = twins(24, 40, **({"proj_size": 18} if kind == "projected" else KINDS[kind]), dtype=dtype)
    found = []
    for precision, in_place in ((dtype, True), (dtype, False), (torch.float64, False)):
        x = data(6, 3, 24).to(dtype).to(precision).requires_grad_()
        y = ours.to(precision)(x, lengths=lengths)[0]
        y = y.relu_() if in_place else y.relu()
        found.append(torch.autograd.grad(y.double().sum(), [x, *ours.parameters()]))
        ours.to(dtype)
    for mine, plain, truth in zip(*found, strict=True):
        off, bar = ((g - truth).abs().max() for g in (mine, plain))
        assert off <= 2 * bar + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("option", ["lengths", "reset_mask", "return_cell_states", "recompute"])
def test_the_output_with_every_option(option, backend):
    """The final states and c of every step, edited as well, are no part of what is read again."""
    ours, _ = twins(bidirectional=True)
    ours.recompute = 2 if option == "recompute" else False
    kwargs = {
        "lengths": {"lengths": [4, 0, 2]},
        "reset_mask": {"reset_mask": data(4, 3) > 0.5},
        "return_cell_states": {"return_cell_states": True},
    }.get(option, {})
    found = []
    for in_place in (True, False):
        x = data(4, 3, 3).requires_grad_()
        y, (h_n, c_n), *_ = ours(x, **kwargs)
        if in_place:
            y.tanh_(), h_n.mul_(2), c_n.relu_()
        else:
            y, h_n, c_n = y.tanh(), h_n * 2, c_n.relu()
        found.append(torch.autograd.grad(y.sum() + (h_n * c_n).sum(), [x, *ours.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_under_compile(kind, where, backend):
    ours, theirs = twins(**KINDS[kind])

    def inside(x):
        y, states = ours(x)
        y.relu_()
        return y, states

    torch._dynamo.reset()
    call = torch.compile(ours if where == "outside" else inside, backend="aot_eager", fullgraph=True)
    edit = EDITS["relu_"] if where == "outside" else lambda y: None
    torch.testing.assert_close(gradients(ours, edit, call=call), gradients(theirs, EDITS["relu_"]))


def test_the_output_with_saved_tensor_hooks_and_checkpoints(backend):
    ours, theirs = twins(bidirectional=True)
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


def test_the_output_keeps_its_second_derivatives(backend):
    ours, theirs = twins(bidirectional=True)
    found = []
    for module in (ours, theirs):
        x = data(4, 3, 3).requires_grad_()
        y = module(x)[0]
        y.tanh_()
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*found)


# What is changed, of a layer whose x or weights may be frozen: (the tensor, what requires a gradient, T).
TABLE = [
    (name, frozen, T)
    for name in ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")
    for frozen in ("nothing", "x", "weights", "all but weight_ih", "all but bias_hh")
    for T in (1, 4)
]


def change(module: nn.Module, name: str, frozen: str, T: int, cell: bool = False):
    """The gradients after an in-place change of one argument between forward and backward, or the error."""
    for key, weight in module.named_parameters():
        kept = {"weights": False, "all but weight_ih": "weight_ih" in key, "all but bias_hh": "bias_hh" in key}
        weight.requires_grad_(kept.get(frozen, True))
    P = getattr(module, "proj_size", 0) or 4
    leaves = {"x": data(T, 2, 3), "h0": data(1, 2, P, seed=1), "c0": data(1, 2, 4, seed=2)}
    given = {}
    for key, leaf in leaves.items():
        leaf.requires_grad_(frozen in ("nothing", "weights"))
        given[key] = leaf * 1  # no leaf, and not the caller's memory
    if cell:
        y, c_n = module(given["x"][0].clone(), (given["h0"][0].clone(), given["c0"][0].clone()))
    else:
        y, (_, c_n) = module(given["x"], (given["h0"], given["c0"]))
    target = given.get(name)
    with torch.no_grad():
        (dict(module.named_parameters())[name] if target is None else target).mul_(2)
    wanted = [t for t in (*leaves.values(), *module.parameters()) if t.requires_grad]
    try:
        return torch.autograd.grad(y.pow(2).sum() + c_n.sum(), wanted, allow_unused=True)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("proj", [0, 2])
def test_an_argument(proj, backend):
    """Whatever nn.LSTM allows, with its gradients. What it refuses is refused, or what it reads needlessly is right."""
    refused = []
    for name, frozen, T in TABLE:
        if name == "weight_hr_l0" and not proj:
            continue
        ours, theirs = twins(proj_size=proj)
        expected = change(theirs, name, frozen, T)
        found = change(ours, name, frozen, T)
        if not isinstance(expected, str):
            assert not isinstance(found, str), (name, frozen, T)
            torch.testing.assert_close(found, expected, msg=lambda m, at=(name, frozen, T): f"{at}: {m}")
        elif not isinstance(found, str):
            refused.append((name, frozen, T, expected[:60]))
    print(refused)
