"""The ops (fastlstm/ops/schema.py), called directly: opcheck, fake kernels, the contract."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastlstm import dispatch, reference
from fastlstm.ops import register
from fastlstm.ops.schema import BATCH_DIMS, LayerCall, LayerInputs, LayerShape, arguments, bundled

from ..cases import Case, tensors
from ..module_pairs import naming
from ..runners import require

EVERYTHING = {"lengths": (4, 0, 2), "resets": ((1, 0), (2, 0), (1, 2)), "cells": True, "hx": "tuple"}
ALL_OPTIONS = Case(T=4, **EVERYTHING, bidirectional=True, proj=2)
CASES = (
    Case(T=4),
    Case(T=4, hx="tuple", proj=2, bias=False),
    ALL_OPTIONS,
    Case(T=4, lengths=(1, 4, 3)),
    Case(T=1, B=1, I=1, H=1, hx="tuple", bidirectional=True),
    Case(T=3, B=0, hx="tuple"),
    Case(T=2, B=5, I=7, H=13, cells=True, strided=("x", "weights")),
)


@pytest.fixture(params=list(dispatch.BACKENDS))
def op_backend(request):
    """Run once per backend with ops, which the reference has not."""
    require(request.param, Case())
    return request.param


def forward_arguments(case, dtype=torch.float32, keep_reserve=True, requires_grad=False):
    """Arguments of the forward op, in the schema's order."""
    case_tensors = tensors(case.to(dtype))
    x = case_tensors.input.detach().requires_grad_(requires_grad)
    h0, c0 = [t.detach().requires_grad_(requires_grad) for t in case_tensors.hx] if case_tensors.hx else (None, None)
    weights = [w.detach().requires_grad_(requires_grad) for w in case_tensors.weights.values()]
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    return [x, h0, c0, weights, lengths, case_tensors.reset_mask, case.cells, keep_reserve]


def backward_arguments(op, arguments, needs=None, present=(True, True, True, True)):
    """Arguments of the backward op after running the forward op; `present`: which results have a gradient."""
    results = op(*arguments)
    y, h_n, c_n, cells, reserve = results
    if not arguments[6]:
        present = (*present[:3], False)
    grads = [torch.ones_like(r) if g else None for r, g in zip((y, h_n, c_n, cells), present, strict=True)]
    x, h0, c0, weights, lengths, mask = arguments[:6]
    if needs is None:
        needs = [True, h0 is not None, c0 is not None] + [True] * len(weights)
    return [*grads, x, h0, c0, weights, lengths, mask, y, cells, reserve, needs]


@pytest.mark.parametrize("name", ["{}_layer", "{}_layer_backward", "recomputed_layer", "recomputed_layer_backward"])
def test_inputs_have_one_order(op_backend, name):
    """Ops take `arguments(inputs, ...)`, the reference `*inputs`, and `LayerCall` names the options."""
    names = list(LayerInputs._fields)
    op = getattr(torch.ops.fastlstm, name.format(op_backend)).default
    found = [argument.name for argument in op._schema.arguments]
    at = found.index("x")
    others = [name for name in found[at:] if name not in names]
    assert found[at:] == list(arguments(LayerInputs(*names), *others))
    assert bundled(found, len(others), at) == (found[:at], LayerInputs(*names), others)
    assert all(argument.default_value is None for argument in op._schema.arguments[-3:])
    assert list(inspect.signature(reference.layer).parameters)[: len(names)] == names
    assert [field.name for field in fields(LayerCall)][-len(names[4:]) :] == names[4:]


def test_inputs_as_one_list():
    inputs = LayerInputs(*LayerInputs._fields)._replace(weights=["w_ih", "w_hh"])
    assert inputs.flat() == ["x", "h0", "c0", *LayerInputs._fields[4:], "w_ih", "w_hh"]
    assert LayerInputs.from_flat(inputs.flat()) == inputs
    assert inputs.with_differentiable(inputs.differentiable) == inputs
    assert len(BATCH_DIMS.flat()) == len(inputs.flat()) - 2


def ops(name):
    return getattr(torch.ops.fastlstm, f"{name}_layer").default, getattr(
        torch.ops.fastlstm, f"{name}_layer_backward"
    ).default


def flat(results):
    """All tensors of an op's results, those in the list of weight gradients included."""
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_forward(case, requires_grad, op_backend):
    require(op_backend, case)
    forward, _ = ops(op_backend)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not (requires_grad and case.lengths):
        # It compares the reserves of two runs, in which padding may be uninitialized; see test_compile.py instead.
        checks.append("test_aot_dispatch_dynamic")
    opcheck(
        forward, forward_arguments(case, keep_reserve=requires_grad, requires_grad=requires_grad), test_utils=checks
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_backward(case, op_backend):
    require(op_backend, case)
    forward, backward = ops(op_backend)
    opcheck(backward, backward_arguments(forward, forward_arguments(case)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep_reserve", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_kernels_give_the_layout_of_real_results(case, keep_reserve, dtype, op_backend):
    case = case.to(dtype)
    require(op_backend, case)
    forward, backward = ops(op_backend)
    arguments = forward_arguments(case, dtype, keep_reserve)
    calls = [(forward, arguments)]
    if keep_reserve:
        full = backward_arguments(forward, arguments)
        calls.append((backward, full))
        for k in range(len(full[-1])):
            calls.append((backward, [*full[:-1], [need and i == k for i, need in enumerate(full[-1])]]))
    for op, args in calls:
        real = flat(op(*args))
        with FakeTensorMode() as mode:
            convert = lambda a: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a  # noqa: E731
            fake = flat(op(*[[convert(w) for w in a] if isinstance(a, list) else convert(a) for a in args]))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_follows_the_contract(case, op_backend, poisoned_empty):
    """Every result against the reference; unneeded ones have shape [0]."""
    require(op_backend, case)
    forward, _ = ops(op_backend)
    arguments = forward_arguments(case, torch.float64)
    expected = reference.layer(*arguments[:6])
    shape = LayerShape.of(arguments[3])
    for keep_cells, keep_reserve in ((False, False), (True, False), (False, True), (True, True)):
        y, h_n, c_n, cells, reserve = forward(*arguments[:6], keep_cells, keep_reserve)
        kept = f"keep_cells={keep_cells}, keep_reserve={keep_reserve}"
        torch.testing.assert_close((y, h_n, c_n), expected[:3], msg=naming(kept))
        if keep_cells:
            torch.testing.assert_close(cells, expected[3], msg=naming(kept))
        elif not keep_reserve:
            assert cells.shape == (0,), kept
        assert reserve.shape == ((shape.D, case.T, case.B, 4 * case.H) if keep_reserve else (0,)), kept
        for name, result in {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells, "reserve": reserve}.items():
            assert result.is_contiguous(), f"{kept}: {name}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_follows_the_contract(case, op_backend, poisoned_empty):
    """Subsets of arriving gradients and single needed gradients, against autograd through the reference."""
    require(op_backend, case)
    forward, backward = ops(op_backend)
    arguments = forward_arguments(case, torch.float64, requires_grad=True)
    inputs = [t for t in (*arguments[:3], *arguments[3]) if t is not None]
    with torch.no_grad():
        full = backward_arguments(forward, arguments)
    for arriving in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)):
        if arriving == (0, 0, 0, 1) and not case.cells:
            continue
        with torch.no_grad():
            args = backward_arguments(forward, arguments, present=arriving)
        outputs = reference.layer(*arguments[:6])
        pairs = [(out, grad) for out, grad in zip(outputs, args[:4], strict=True) if grad is not None]
        expected = torch.autograd.grad(
            [p[0] for p in pairs], inputs, [p[1] for p in pairs], allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            results = flat(backward(*args))
        present = [g for g, need in zip(results, args[-1], strict=True) if need]
        torch.testing.assert_close(present, list(expected), msg=naming(f"arriving {arriving}"))
        for k, whole in enumerate(results):
            with torch.no_grad():
                alone = flat(backward(*args[:-1], [i == k and need for i, need in enumerate(full[-1])]))
            for i, result in enumerate(alone):
                which = f"arriving {arriving}, needed {k}, result {i}"
                if i == k and full[-1][k]:
                    torch.testing.assert_close(result, whole, msg=naming(which))
                else:
                    assert result.shape == (0,), which


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_the_gates_in_place_of_dx(case, dtype, op_backend, poisoned_empty):
    """One more flag of `needs`: what is left to do for dx is the product with W_ih; the rest does not change."""
    case = case.to(dtype)
    require(op_backend, case)
    forward, backward = ops(op_backend)
    args = backward_arguments(forward, forward_arguments(case, dtype))
    dx, *others = backward(*args)
    assert torch.equal(backward(*args[:-1], [*args[-1], False])[0], dx)
    dgates, *same = backward(*args[:-1], [*args[-1], True])
    torch.testing.assert_close(flat(same), flat(others), rtol=0, atol=0)
    weights = args[7]
    shape = LayerShape.of(weights)
    assert dgates.shape == (*dx.shape[:-1], shape.D * 4 * shape.H)
    product = dgates.double() @ torch.cat(weights[:: shape.per_direction]).double()
    eps = torch.finfo(dtype).eps  # dx is rounded once, dgates in 16 bits as well
    torch.testing.assert_close(dx.double(), product, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("form", ["transposed", "sliced", "expanded"])
def test_arriving_gradients_of_any_strides(form, op_backend):
    case = ALL_OPTIONS
    require(op_backend, case)
    forward, backward = ops(op_backend)
    args = backward_arguments(forward, forward_arguments(case, torch.float64))
    generator = torch.Generator().manual_seed(0)
    for k in range(4):
        dense = torch.randn(args[k].shape, dtype=torch.float64, generator=generator)
        args[k] = dense[..., :1].expand(dense.shape).contiguous() if form == "expanded" else dense
    expected = flat(backward(*args))
    for k in range(4):
        args[k] = {
            "transposed": args[k].transpose(0, 1).contiguous().transpose(0, 1),
            "sliced": args[k].repeat_interleave(2, -1)[..., ::2],
            "expanded": args[k][..., :1].expand(args[k].shape),
        }[form]
        assert not args[k].is_contiguous()
    torch.testing.assert_close(flat(backward(*args)), expected)


def test_arguments_need_not_be_contiguous(op_backend):
    """h0, c0, lengths and reset_mask with strides; batch_first gives a transposed mask."""
    case = replace(ALL_OPTIONS, B=3)
    require(op_backend, case)
    forward, backward = ops(op_backend)
    plain = forward_arguments(case, torch.float64)
    gaps = list(plain)
    gaps[0] = plain[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    gaps[1], gaps[2] = (plain[k].transpose(0, 2).contiguous().transpose(0, 2) for k in (1, 2))
    gaps[3] = [w.repeat_interleave(3, -1)[..., ::3] for w in plain[3]]
    gaps[4] = plain[4].repeat_interleave(2)[::2]
    gaps[5] = plain[5].t().contiguous().t()
    assert not any(t.is_contiguous() for t in (*gaps[:3], *gaps[3], *gaps[4:6]))
    torch.testing.assert_close(forward(*gaps)[:4], forward(*plain)[:4])
    results, expected = (flat(backward(*backward_arguments(forward, a))) for a in (gaps, plain))
    torch.testing.assert_close(results, expected)


def test_ops_have_a_meta_kernel(op_backend):
    forward, _ = ops(op_backend)
    arguments = forward_arguments(Case(T=4))
    meta = [
        [w.to("meta") for w in a] if isinstance(a, list) else a.to("meta") if torch.is_tensor(a) else a
        for a in arguments
    ]
    for real, shape_only in zip(forward(*arguments), forward(*meta), strict=True):
        assert real.shape == shape_only.shape


def test_reserve_is_not_differentiable(op_backend):
    forward, _ = ops(op_backend)
    y, _, _, cells, reserve = forward(*forward_arguments(Case(T=4), requires_grad=True))
    assert y.requires_grad
    assert not reserve.requires_grad
    assert not cells.requires_grad  # saved for backward only
    assert forward(*forward_arguments(Case(T=4, cells=True), requires_grad=True))[3].requires_grad


@pytest.mark.parametrize(
    ("index", "change", "text"),
    [
        (0, lambda x: x[:0], "Expected sequence length to be larger than 0 in RNN"),
        (1, lambda h0: h0[:, :1], "h0 must be"),
        (2, lambda c0: c0.double(), "c0 must be"),
        (4, lambda lengths: lengths[:2], "lengths must be"),
        (4, lambda lengths: lengths.int(), "lengths must be"),
        (4, lambda lengths: lengths.to("meta"), "lengths must be"),
        (5, lambda mask: mask.t(), "reset_mask must be"),
        (5, lambda mask: mask.to("meta"), "reset_mask must be"),
    ],
)
def test_forward_refuses_invalid_shapes(index, change, text, op_backend):
    """The op called directly: a kernel must not read out of bounds."""
    arguments = forward_arguments(Case(T=4, **EVERYTHING))
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=text):
        ops(op_backend)[0](*arguments)


@pytest.mark.parametrize("lengths", [(4, 5, 2), (4, -1, 2)], ids=str)
def test_lengths_out_of_range_are_refused(lengths, op_backend):
    """With the message of the module's check."""
    forward, backward = ops(op_backend)
    arguments = forward_arguments(Case(T=4, **EVERYTHING))
    backwards = backward_arguments(forward, arguments)
    arguments[4] = backwards[8] = torch.tensor(lengths)
    for op, args in ((forward, arguments), (backward, backwards)):
        with pytest.raises(ValueError, match=rf"lengths must lie in \[0, T=4\], got {lengths[1]} in row 1"):
            op(*args)


BACKWARD_NAMES = ("dy", "dh_n", "dc_n", "dcells", None, None, None, None, None, None, "y", "cells", "reserve", "needs")


@pytest.mark.parametrize("name", [name for name in BACKWARD_NAMES if name])
@pytest.mark.parametrize("change", [lambda t: t[:, :1], lambda t: t.double()], ids=["shape", "dtype"])
def test_backward_refuses_invalid_shapes(name, change, op_backend):
    forward, backward = ops(op_backend)
    arguments = backward_arguments(forward, forward_arguments(Case(T=4, **EVERYTHING)))
    index = BACKWARD_NAMES.index(name)
    arguments[index] = arguments[index][:-1] if name == "needs" else change(arguments[index])
    with pytest.raises(RuntimeError, match=f"{name} must"):
        backward(*arguments)


@pytest.mark.parametrize("B", [1, 3, 20])
def test_no_input_features(B, op_backend, poisoned_empty):
    arguments = forward_arguments(Case(T=3, B=B, I=1, H=8))
    arguments[0] = arguments[0][..., :0]
    arguments[3][0] = arguments[3][0][:, :0]
    y = ops(op_backend)[0](*arguments)[0]
    torch.testing.assert_close(y, reference.layer(*arguments[:6])[0])


def test_backward_without_a_reserve_is_refused(op_backend):
    forward, backward = ops(op_backend)
    arguments = backward_arguments(forward, forward_arguments(Case(T=3), keep_reserve=False))
    with pytest.raises(RuntimeError, match="reserve must be"):
        backward(*arguments)


def test_recorded_forward_always_keeps_a_reserve(op_backend):
    forward, _ = ops(op_backend)
    results = []
    for keep in (True, False):
        arguments = forward_arguments(Case(T=3), keep_reserve=keep, requires_grad=True)
        forward(*arguments)[0].sum().backward()
        results.append([w.grad for w in (arguments[0], *arguments[3])])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        assert forward(*arguments)[4].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case(T=9, B=3, H=37, lengths=(9, 2, 5), bidirectional=True)], ids=str)
def test_backward_recomputes_h_if_y_is_missing(case, dtype, op_backend, poisoned_empty):
    """As requested if y was changed in place; tests/ops/test_inplace.py has the other dtypes."""
    case = case.to(dtype)
    require(op_backend, case)
    forward, backward = ops(op_backend)
    arguments = backward_arguments(forward, forward_arguments(case, dtype))
    results = flat(backward(*arguments[:10], arguments[10].new_empty(0), *arguments[11:]))
    torch.testing.assert_close(results, flat(backward(*arguments)))


# Groups of one row and of several; microkernels and, above a million multiply-adds, the BLAS; no row, no step.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("T", "rows", "groups", "m", "n"),
    [(5, 1, 4, 12, 3), (3, 3, 2, 40, 33), (7, 2, 3, 1, 1), (40, 1, 2, 320, 100), (3, 0, 2, 4, 5), (0, 2, 2, 4, 5)],
)
def test_grouped_products(T, rows, groups, m, n, dtype):
    a, b = torch.randn(T, groups * rows, 2 * m, dtype=dtype)[..., m:], torch.randn(T, groups * rows, n, dtype=dtype)
    op = torch.ops.fastlstm.grouped_products.default
    expected = torch.einsum("tgrm,tgrn->gmn", a.unflatten(1, (groups, rows)), b.unflatten(1, (groups, rows)))
    torch.testing.assert_close(op(a, b, groups), expected)
    torch.testing.assert_close(register._grouped_products(a, b, groups), expected)  # without a native kernel
    opcheck(op, (a, b, groups), test_utils=["test_schema", "test_faketensor"])


def test_grouped_products_refuse_invalid_shapes():
    op = torch.ops.fastlstm.grouped_products.default
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    for given in ((a, b, 3), (a, b, 0), (a, b[1:], 2), (a, b[:, 1:], 2), (a[0], b, 2), (a, b.double(), 2)):
        with pytest.raises(RuntimeError):
            op(*given)
