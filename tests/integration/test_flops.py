"""torch.utils.flop_counter: 2 * 4H * (I + P) FLOPs per row and step, as for nn.LSTM's products."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastlstm

from ..module_pairs import data, module_pair

T, B, I, H = 5, 3, 7, 4  # noqa: E741
LENGTHS = (T, 1, T - 1)
pytestmark = pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)


def count(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def both(module: nn.Module, args: tuple, inputs: list[torch.Tensor] | None = None, **kwargs) -> tuple[int, int]:
    """FLOPs of a forward call and of its backward."""
    kept = []
    forward = count(lambda: kept.append(module(*args, **kwargs)))
    output, states = kept[0][0], kept[0][1]
    y = output if isinstance(output, torch.Tensor) else output.data
    loss = y.sum() + sum(s.sum() for s in (states if isinstance(states, tuple) else (states,)))
    return forward, count(lambda: loss.backward(inputs=inputs))


def formula(rows: int, P: int = H, D: int = 1, features: int = I) -> int:
    return D * 2 * rows * (4 * H * (features + P) + (H * P if P != H else 0))


@pytest.mark.parametrize("needs_grad", ["nothing", "x", "hx"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"bidirectional": True}, {"proj_size": 2}, {"num_layers": 2, "bidirectional": True, "bias": False}],
    ids=str,
)
def test_flops_of_a_layer_equal_nn_lstms(kwargs, form, needs_grad, backend):
    """In float64, where nn.LSTM runs step by step."""
    ours, theirs = module_pair(I, H, **kwargs)
    found = []
    for module in (ours, theirs):
        x = data(T, B, I).requires_grad_(needs_grad != "nothing")
        S = (2 if module.bidirectional else 1) * module.num_layers
        hx = (
            [data(S, B, n, seed=n).requires_grad_() for n in (module.proj_size or H, H)] if needs_grad == "hx" else None
        )
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        found.append(both(module, (x if form == "padded" else packed, hx)))
    # In reverse, nn.LSTM passes a gradient to the zero states of rows that begin before the last step.
    needless = 0
    if form == "packed" and needs_grad != "hx" and ours.bidirectional:
        needless = ours.num_layers * 2 * 4 * H * H * sum(n < T for n in LENGTHS)
    assert found[0] == (found[1][0], found[1][1] - needless)
    if kwargs == {}:
        rows = T * B if form == "padded" else sum(LENGTHS)
        assert found[0][0] == formula(rows)
        if needs_grad == "hx":
            assert found[0][1] == 2 * formula(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flops_are_equal_in_other_dtypes(dtype, backend):
    """nn.LSTM's float32 layer counts as zero FLOPs, because oneDNN runs it."""
    ours, _ = module_pair(I, H, bidirectional=True, dtype=dtype)
    reference, _ = module_pair(I, H, bidirectional=True)
    x = data(T, B, I)
    found = both(ours, (x.to(dtype),))
    assert found == both(reference, (x,))
    assert found[0] == formula(T * B, D=2)


def test_unneeded_gradients_have_no_flops(backend):
    found = []
    for module in module_pair(I, H):
        x = data(T, B, I).requires_grad_()
        module.weight_ih_l0.requires_grad_(False)
        found.append(both(module, (x,)))
        module.requires_grad_(False)
        found.append(both(module, (x,)))
    assert found[:2] == found[2:]
    assert found[1][1] == 2 * T * B * 4 * H * I + 2 * (T - 1) * B * 4 * H * H


def test_flops_follow_known_lengths(backend):
    ours, _ = module_pair(I, H)
    assert both(ours, (data(T, B, I),), lengths=[5, 0, 2])[0] == formula(7)
    with FakeTensorMode() as mode:
        fake = fastlstm.LSTM(I, H)
        lengths = mode.from_tensor(torch.tensor([5, 0, 2]))
        assert count(lambda: fake(torch.empty(T, B, I), lengths=lengths)) == formula(T * B)


def test_recompute_counts_its_second_forward(backend):
    ours, _ = module_pair(I, H, proj_size=2)
    plain = both(ours, (data(T, B, I),))
    ours.recompute = 2
    forward = formula(T * B, P=2)
    assert both(ours, (data(T, B, I),)) == (forward, forward + plain[1])


@pytest.mark.parametrize("inside", ["both", "backward alone"])
@pytest.mark.parametrize("states", [False, True])
def test_flops_of_a_cell_equal_nn_lstm_cells(states, inside, backend):
    """A small one bypasses the dispatcher unless a dispatch mode is active."""
    found = []
    for module in module_pair(I, H, cell=True):
        x = data(B, I).requires_grad_()
        hx = (data(B, H).requires_grad_(), data(B, H, seed=1).requires_grad_()) if states else None
        if inside == "both":
            found.append(both(module, (x, hx)))
        else:
            h, c = module(x, hx)
            found.append(count(lambda h=h, c=c: (h + c).sum().backward()))
    assert found[0] == found[1]
    if inside == "both":
        assert found[0][0] == formula(B)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_per_sample_gradients_count(bidirectional, backend):
    """Equal to an ordinary step of the whole batch.

    Of the two products with the zero states before the first step, the plain op counts one (dW_hh's). Here eager makes
    both, and next to the native op neither is made.
    """
    ours, _ = module_pair(I, H, bidirectional=bidirectional)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x[:, None],))[0].sum()

    of_samples = count(lambda: torch.vmap(torch.func.grad(loss), (None, 1))(parameters, data(T, B, I)))
    forward, backward = both(ours, (data(T, B, I),))
    of_first_steps = (1 + bidirectional) * 2 * B * 4 * H * H
    assert of_samples == forward + backward + (of_first_steps if backend == "eager" else -of_first_steps)


def test_flops_of_an_expanded_input(backend):
    """FLOPs are independent of the strides of x."""
    ours, _ = module_pair(I, H)
    x = data(1, 1, 1).requires_grad_()
    found = both(ours, (x.expand(T, B, I),))
    assert found == both(ours, (data(T, B, I).requires_grad_(),))


def test_importing_fastlstm_does_not_import_the_flop_counter(backend):
    """The counter's import is slow because it imports Triton; either import order registers the formulas."""
    first = "torch" if backend == "native" else "torch.utils.flop_counter"
    lines = (
        f"import sys, {first}, fastlstm",
        "print('torch.utils.flop_counter' in sys.modules)",
        "from torch.utils.flop_counter import FlopCounterMode, torch",
        f"fastlstm.use_backend({backend!r})",
        "mode = FlopCounterMode(display=False)",
        "with mode: fastlstm.LSTM(7, 4)(torch.zeros(5, 3, 7))",
        "print(mode.get_total_flops())",
    )
    ran = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(first != "torch"), str(formula(T * B))]


def test_probes_and_other_modules_of_the_loader_have_no_effect(backend):
    """The formulas are registered when the counter is imported, and not by other imports with its loader."""
    program = """
import importlib.util, sys
import torch, fastlstm
assert "torch.utils.flop_counter" not in sys.modules
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode, flop_registry
import wave
assert torch.ops.fastlstm.eager_layer in flop_registry
fastlstm.use_backend(sys.argv[1])
with FlopCounterMode(display=False) as counter:
    fastlstm.LSTM(3, 4)(torch.zeros(2, 1, 3))
print(counter.get_total_flops())
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", program, backend], capture_output=True, text=True)
    assert found.stdout.split() == [str(2 * 2 * 16 * 7)], found.stderr
