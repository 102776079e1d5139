"""Frozen modules in every form: values for every option of a call, cells, and what must not change them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import accuracy
from fastlstm.accuracy import Precision

from ..cases import Case, tensors
from ..module_pairs import naming
from ..ops.test_parity import OPTIONS
from ..runners import assert_accurate, call_module
from .forms import FORMS, NO_EXTENSION, check_frozen, frozen, in_form, multiplies_bf16, run_frozen
from .int8_reference import Direction

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

CASES = {
    **OPTIONS,
    "no row has a step": Case(T=4, B=2, lengths=(0, 0), hx="tuple", bidirectional=True, layers=2),
    "packed, cell states": Case(T=7, B=4, lengths=(3, 7, 2, 1), packed=True, layers=2, cells=True, batch_first=True),
    "packed, sorted": Case(T=7, B=4, lengths=(7, 3, 2, 1), packed=True, hx="tuple"),
    "resets in projected layers": Case(T=6, B=3, proj=3, layers=2, resets=((0, 1), (2, 0), (5, 2)), bidirectional=True),
    "unbatched with lengths and resets": Case(
        T=6, B=1, unbatched=True, lengths=(4,), resets=((2, 0),), cells=True, hx="tuple"
    ),
    "no rows": Case(B=0, layers=2),
}
# (T, B, I, H, P): one step, one row, tails of vectors and of blocks of four, long T, and more rows than are hoisted.
SIZES = (
    (1, 1, 1, 1, 0),
    (1, 1, 64, 64, 0),
    (1, 9, 5, 33, 17),
    (1, 130, 7, 20, 0),
    (2, 1, 3, 100, 0),
    (3, 17, 8, 65, 64),
    (40, 1, 100, 33, 0),
    (40, 3, 9, 31, 5),
    (5, 70, 17, 48, 0),
    (2, 3, 515, 5, 1),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", CASES)
def test_options(option, form):
    check_frozen(in_form(CASES[option], form), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, form):
    for bidirectional in (False, True):
        T, B, I, H, proj = size  # noqa: E741
        case = Case(T=T, B=B, I=I, H=H, proj=proj, bidirectional=bidirectional, hx="tuple")
        check_frozen(in_form(case, form), form)
        if B > 1:
            lengths = tuple((7 * b) % (T + 1) for b in range(B))
            check_frozen(in_form(replace(case, lengths=lengths), form), form)


@pytest.mark.parametrize("form", FORMS)
def test_sequences_packed_as_sorted_equal_padded_ones(form):
    case = in_form(Case(T=7, B=4, lengths=(7, 5, 5, 1), packed=True, bidirectional=True), form)
    case_tensors = tensors(case)
    module, lengths = frozen(case, form, case_tensors), torch.tensor(case.lengths)
    results = []
    for is_sorted in (True, False):
        packed = pack_padded_sequence(case_tensors.input, lengths, enforce_sorted=is_sorted)
        output, states = module(packed)
        results.append([output.data, *states])
    assert [torch.equal(a, b) for a, b in zip(*results, strict=True)] == [True] * 3


@pytest.mark.parametrize("form", FORMS)
def test_results_own_their_memory(form, poisoned_empty):
    """No value is left uninitialized, and writing to a result or to the input changes no other result."""
    case = in_form(Case(T=5, B=3, I=5, H=17, layers=2, bidirectional=True, lengths=(5, 0, 2), cells=True), form)
    check_frozen(case, form)
    case_tensors = tensors(case)
    module = frozen(case, form, case_tensors)
    arguments = {"lengths": case_tensors.lengths, "return_cell_states": True}
    output, (h, c), cells = module(case_tensors.input, **arguments)
    copies = [t.clone() for t in (output, h, c, cells)]
    again = module(case_tensors.input, **arguments)
    case_tensors.input.zero_()
    for t in (again[0], *again[1], again[2]):
        t.zero_()
    for name, before, now in zip(("output", "h_n", "c_n", "cells"), copies, (output, h, c, cells), strict=True):
        assert torch.equal(before, now), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_cell(form, bias, batched):
    dtype, weights = FORMS[form]
    torch.manual_seed(0)
    cell = fastlstm.LSTMCell(5, 33, bias=bias, dtype=dtype)
    own = {name: w.detach().clone() for name, w in cell.named_parameters()}
    shape = (4,) if batched else ()
    x, h, c = (torch.randn(*shape, n).to(dtype) for n in (5, 33, 33))
    fastlstm.freeze(cell, weights)
    assert type(cell) is fastlstm.FrozenLSTMCell
    for name, hx in {"zeros": None, "states": (h, c)}.items():
        results = dict(zip(("h", "c"), cell(x, hx), strict=True))
        assert all((t.dtype, t.shape) == (dtype, (*shape, 33)) for t in results.values()), name
        if form == "int8":
            states = [torch.zeros_like(t) if hx is None else t for t in (h, c)]
            rows = [t.double().view(-1, t.shape[-1]) for t in (x, *states)]
            for (what, value), (exact, bound) in zip(results.items(), Direction.of(own, "").step(*rows), strict=True):
                assert ((value.double().view_as(exact) - exact).abs() <= bound).all(), f"{what} of {name}"
            continue
        exact_cell = nn.LSTMCell(5, 33, bias=bias, dtype=torch.float64)
        rounded = {n: w.bfloat16() if form == "bfloat16 weights" and w.dim() == 2 else w for n, w in own.items()}
        exact_cell.load_state_dict(rounded)
        wide = x.double(), None if hx is None else (h.double(), c.double())

        def run(exact_cell=exact_cell, wide=wide):
            return dict(zip(("h", "c"), exact_cell(*wide), strict=True))

        bf16_products = form == "bfloat16 weights" and multiplies_bf16(Case(T=1, B=1, I=5, H=33))
        precision = Precision.of(dtype, "bf16" if bf16_products else "ieee")
        assert_accurate(results, *accuracy.error_bounds(run, precision), f"frozen {form} cell, {name}")


@pytest.mark.parametrize("form", FORMS)
def test_dropout_and_mode_change_nothing(form):
    dtype, weights = FORMS[form]
    lstm = fastlstm.freeze(fastlstm.LSTM(5, 9, 2, dropout=0.5, dtype=dtype), weights)
    x = torch.randn(6, 3, 5, dtype=dtype)
    assert lstm.training
    results = [lstm(x)[0], lstm(x)[0], lstm(x, lengths=[6, 6, 6])[0], lstm.eval()(x)[0]]
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("form", ["float32", "bfloat16 weights", "int8"])
def test_autocast_changes_nothing(form):
    weights = FORMS[form][1]
    torch.manual_seed(0)
    lstm = fastlstm.freeze(fastlstm.LSTM(5, 9, 2, bidirectional=True), weights)
    cell = fastlstm.freeze(fastlstm.LSTMCell(5, 9), weights)
    x, h, c = torch.randn(6, 3, 5), torch.randn(4, 3, 9), torch.randn(4, 3, 9)
    calls = {
        "lstm": lambda x: lstm(x, (h, c)),
        "lengths": lambda x: lstm(x, lengths=[6, 0, 3]),
        "cell": lambda x: cell(x[0], (h[0], c[0])),
        "unbatched cell": lambda x: cell(x[0, 0]),
    }
    for name, call in calls.items():
        expected = call(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(x), expected, rtol=0, atol=0, msg=naming(name))
    # The layer before the LSTM gives bfloat16 under autocast.
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lstm(half, (h.bfloat16(), c.bfloat16()))[0], cell(half[0])[0]
    expected = lstm(half.float(), (h.bfloat16().float(), c.bfloat16().float()))[0], cell(half[0].float())[0]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_leaves_the_others_alone(form, value):
    case = in_form(Case(T=3, B=5, I=20, H=18, proj=7), form)
    case_tensors = tensors(case)
    module = frozen(case, form, case_tensors)
    x = case_tensors.input.clone()
    expected = module(x)[0]
    x[1, 2, 3] = value
    output = module(x)[0]
    other = torch.arange(5) != 2
    assert torch.equal(output[:, other], expected[:, other])
    assert torch.equal(output[0], expected[0])
    if form == "int8" or value != value:
        assert output[1:, 2].isnan().all()
    # As without freezing: a gate is 0 or 1, or NaN of a difference of infinities.
    assert not torch.equal(output[1, 2], expected[1, 2])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "int8"])
@pytest.mark.parametrize("matrix", ["ih", "hh", "hr"])
def test_planted_fault_is_found(matrix, form):
    """One weight is larger by 1 %, or 30 times as large in bfloat16. test_int8.py plants those of int8."""
    case = in_form(Case(T=1, B=5, I=12, H=33, proj=9, hx="tuple"), form)
    case_tensors = tensors(case)
    module = frozen(case, form, case_tensors)
    portable = module._portable(0)
    weight = portable.weights[{"ih": 0, "hh": 1, "hr": 4}[matrix]]
    row = weight.abs().amax(1).argmax()
    weight[row, weight[row].abs().argmax()] *= 30 if form == "bfloat16" else 1.01
    module._pack(0, portable)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check_frozen(case, form, call_module(case, case_tensors, module))


def test_the_forms_differ():
    """Otherwise the tests of one form would be those of another."""
    case = Case(T=5, B=3, I=20, H=33)
    results = {form: run_frozen(in_form(case, form), form)["output"].double() for form in FORMS}
    for form in ("bfloat16 weights", "int8"):
        difference = float((results[form] - results["float32"]).abs().max())
        assert 1e-4 < difference < 1e-2, (form, difference)


@pytest.mark.parametrize("form", [form for form, (dtype, _) in FORMS.items() if dtype == torch.float32])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_autocast_casts_each_tensor_by_itself(cell, form):
    """Any of x, h and c may be of 16 bits and is not rounded further; what autocast leaves as it is raises."""
    torch.manual_seed(0)
    module = fastlstm.freeze(nn.LSTMCell(5, 9) if cell else nn.LSTM(5, 9), FORMS[form][1])
    x, h, c = torch.randn(6, 3, 5), torch.randn(1, 3, 9), torch.randn(1, 3, 9)
    inputs = (x[0], h[0], c[0]) if cell else (x, h, c)
    for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=3):
        x, h, c = (t.to(dtype) for t, dtype in zip(inputs, dtypes, strict=True))
        expected = module(x.float(), (h.float(), c.float()))
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x, (h, c))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=naming(dtypes))
    x, h, c = inputs
    for dtype in (torch.float64, torch.int64):
        calls = {
            "x": (x.to(dtype), (h, c)),
            "x alone": (x.to(dtype), None),
            "h": (x, (h.to(dtype), c)),
            "c": (x, (h, c.to(dtype))),
            "all": (x.to(dtype), (h.to(dtype), c.to(dtype))),
        }
        if not cell:
            calls["packed"] = (pack_padded_sequence(x.to(dtype), torch.tensor([6, 4, 1])), None)
        for name, args in calls.items():
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"must |which is fixed"):
                pytest.fail(f"{name} of {dtype}: {module(*args)}")
