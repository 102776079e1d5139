"""The contract on the Triton kernels, run by Triton's interpreter on CPU tensors: TRITON_INTERPRET=1 pytest this file.

tests/gpu/test_triton.py runs it in a new process, because the interpreter is selected when Triton is imported. Every
kernel runs every H, with tiles so small that H = 70 takes two tiles of units and two iterations over K.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastlstm
from fastlstm import backends, dispatch
from fastlstm.backends.triton import plan

from ..cases import Case, tensors
from ..module_pairs import data, flat, naming
from ..runners import check

if not backends.triton.INTERPRETED:
    pytest.skip("requires TRITON_INTERPRET=1", allow_module_level=True)

TILES = plan.Tiles(16, 64, 64, warps=4)
EVERYTHING = {
    "lengths": (3, 0, 1),
    "resets": ((0, 2), (1, 0), (1, 1)),
    "bidirectional": True,
    "cells": True,
    "hx": "tuple",
}

# Options that select variants of the kernels.
OPTIONS = (
    Case(T=3, B=2),
    Case(T=1, B=1, I=1, H=1, hx="tuple"),
    Case(T=2, B=17, H=3, cells=True),  # two tiles of the batch
    Case(T=2, B=2, used=("h_n",), hx="tuple"),
    Case(T=4, B=4, lengths=(2, 4, 0, 1)),
    Case(T=4, B=4, lengths=(2, 4, 0, 1), hx="tuple", bidirectional=True),
    Case(T=4, B=2, resets=((0, 0), (2, 0), (3, 0), (3, 1)), hx="tuple"),
    Case(T=4, B=2, resets=((0, 0), (2, 0), (3, 0), (3, 1)), hx="tuple", bidirectional=True),
)
# Options of the code outside the kernels, common to all of them.
AROUND = (
    Case(T=2, B=0, H=5, hx="tuple"),
    Case(T=2, B=4, bias=False, bidirectional=True),
    Case(T=2, B=5, layers=2, bidirectional=True, batch_first=True, hx="list"),
    Case(T=2, B=3, hx="expanded"),
    Case(T=2, B=3, strided=("x", "weights", "grads"), hx="strided", bidirectional=True),
    Case(T=2, B=2, x_grad=False, hx="tuple", hx_grad=False, frozen=("weight_hh_l0", "bias_ih_l0")),
    Case(T=2, B=2, used=("cells", "c_n"), cells=True),
    Case(T=6, B=2, x_scale=100.0),  # saturated gates
    Case(T=4, B=3, lengths=(4, 2, 1), packed=True, bidirectional=True),
)


KERNELS = ("resident", "streamed", "step")
TWO = pytest.mark.parametrize("kernel", ["resident", "streamed"], indirect=True)  # step consists of streamed's tiles


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run once per kernel, for every H."""
    rows = (plan.Row(request.param, plan.ANY, 0, TILES, TILES),)
    monkeypatch.setattr(plan, "TABLE", dict.fromkeys(plan.TABLE, rows))
    with fastlstm.use_backend("triton"):
        yield request.param


@TWO
@pytest.mark.parametrize(
    ("H", "dtype"),
    [
        *((H, torch.float32) for H in (1, 5, 16, 33, 70)),
        (33, torch.bfloat16),
        (70, torch.bfloat16),
        (33, torch.float16),
    ],
    ids=str,
)
def test_sizes_with_all_options(H, dtype):
    check(Case(T=3, B=3, I=2, H=H, dtype=dtype, **EVERYTHING), "triton")


@pytest.mark.parametrize("kernel", ["step"], indirect=True)
@pytest.mark.parametrize(("H", "dtype"), [(70, torch.float32), (33, torch.bfloat16), (5, torch.float16)], ids=str)
def test_steps_with_all_options(H, dtype):
    check(Case(T=3, B=3, I=2, H=H, dtype=dtype, **EVERYTHING), "triton")


@TWO
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case):
    check(case, "triton")


@pytest.mark.parametrize("kernel", ["resident"], indirect=True)
@pytest.mark.parametrize("case", AROUND, ids=str)
def test_options_outside_the_kernels(case):
    check(case, "triton")


@pytest.mark.parametrize("case", [Case(T=2, B=3, **{**EVERYTHING, "lengths": (2, 0, 1)}), Case(T=2, B=2)], ids=str)
def test_no_uninitialized_memory_is_read(case, poisoned_empty):
    check(case, "triton")


@TWO
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_is_ignored(value):
    ours = fastlstm.LSTM(3, 4, bidirectional=True)
    lengths, collected = torch.tensor([2, 3, 0]), []
    padding = (torch.arange(3)[:, None] >= lengths)[..., None]
    for fill in (0.0, value):
        ours.zero_grad()
        x = data(3, 3, 3).float().masked_fill(padding, fill).requires_grad_()
        results = flat(ours(x, lengths=lengths, return_cell_states=True))
        grads = [torch.ones_like(r) for r in results]
        for k in (0, 3):  # gradients of the output and cell states also have NaN in the padding
            grads[k] = grads[k].masked_fill(padding, fill)
        torch.autograd.backward(results, grads)
        collected.append([*results, x.grad, *(w.grad for w in ours.parameters())])
    for clean, dirty in zip(*collected, strict=True):
        assert torch.equal(dirty, clean)


@TWO
def test_infinite_and_nan_inputs_propagate_as_in_nn_lstm():
    case = Case(T=3, B=3, bidirectional=True)
    case_tensors, results = tensors(case), []
    case_tensors.input.data[1, 0, 0], case_tensors.input.data[1, 1, 0] = float("inf"), float("nan")
    for cls in (torch.nn.LSTM, fastlstm.LSTM):
        results.append(flat(case.module(cls, case_tensors.weights)(case_tensors.input)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_backward_twice_and_inference_are_bitwise_equal():
    case = Case(T=3, B=2, H=33, hx="tuple")
    case_tensors = tensors(case)
    module = case.module(fastlstm.LSTM, case_tensors.weights)
    outputs = flat(module(case_tensors.input, case_tensors.hx))
    leaves, loss = list(case_tensors.grad_leaves().values()), sum(o.square().sum() for o in outputs)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(outputs, flat(module(case_tensors.input, case_tensors.hx)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["resident"], indirect=True)
def test_opcheck():
    """Check schema, fake kernels and autograd formula, forward and backward."""
    case = Case(T=2, B=2, hx="tuple", lengths=(2, 1), resets=((1, 0),), cells=True)
    case_tensors = tensors(case)
    forward, backward = torch.ops.fastlstm.triton_layer.default, torch.ops.fastlstm.triton_layer_backward.default
    x, (h0, c0) = case_tensors.input.detach(), [t.detach() for t in case_tensors.hx]
    weights = [w.detach() for w in case_tensors.weights.values()]
    arguments = [x.nan_to_num(), h0, c0, weights, torch.tensor(case.lengths), case_tensors.reset_mask]
    torch.library.opcheck(forward, [*arguments, True, False])
    y, h_n, c_n, cells, reserve = forward(*arguments, True, True)
    grads = [torch.ones_like(t) for t in (y, h_n, c_n, cells)]
    needs = [True] * (3 + len(weights))
    torch.library.opcheck(backward, [*grads, *arguments, y, cells, reserve, needs])


@pytest.mark.parametrize("kernel", ["step"], indirect=True)
def test_torch_compile_makes_one_graph():
    lstm = fastlstm.LSTM(3, 4)
    x = torch.randn(2, 2, 3)
    try:
        compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(flat(compiled(x)), flat(lstm(x)))
    finally:
        torch._dynamo.reset()


def test_auto_never_selects_the_interpreter(kernel):
    with fastlstm.use_backend("auto"):
        assert fastlstm.explain(fastlstm.LSTM(3, 4), data(2, 1, 3)).backend != "triton"
    assert list(dispatch.BACKENDS)[-1] == "triton"


def test_requested_kernel_runs(kernel, monkeypatch):
    """Otherwise every test here could pass on one kernel."""
    from fastlstm.backends.triton import launch

    ran = []
    for name in ("launch_resident", "launch_tiled"):
        real = getattr(launch._Layer, name)

        def noting(self, *args, real=real, **options):
            ran.append(self.row.kernel)
            real(self, *args, **options)

        monkeypatch.setattr(launch._Layer, name, noting)
    check(Case(T=2, B=1, seed=1), "triton")
    assert ran == [kernel, kernel]


def test_per_sample_gradients():
    ours, theirs = (cls(3, 5) for cls in (fastlstm.LSTM, torch.nn.LSTM))
    theirs.load_state_dict(ours.state_dict())
    inputs, weights = data(2, 3, 1, 3).float(), {name: w.detach() for name, w in ours.named_parameters()}
    with fastlstm.use_backend("triton"):
        one = torch.func.grad(lambda w, x: torch.func.functional_call(ours, w, (x,))[0].pow(2).sum())
        got = torch.func.vmap(one, in_dims=(None, 0))(weights, inputs)
    for k, x in enumerate(inputs):
        expected = torch.autograd.grad(theirs(x)[0].pow(2).sum(), list(theirs.parameters()))
        torch.testing.assert_close([g[k] for g in got.values()], list(expected), msg=naming(f"sample {k}"))
