"""Weights and rows of int8: rounding, memory, and small planted faults, which int8_reference.py must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.backends import native
from fastlstm.portable import Portable, quantized

from ..cases import Case, tensors
from ..runners import call_module
from .forms import NO_EXTENSION, check_frozen, frozen, in_form
from .int8_reference import ZERO_BELOW, Rows

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

CASE = in_form(Case(T=1, B=4, I=20, H=33, proj=9, bidirectional=True, hx="tuple", cells=True), "int8")


def altered(case: Case, alter: Callable[[Portable], None]) -> dict[str, Tensor]:
    """Results of the case's module after a change of its packed weights."""
    case_tensors = tensors(case)
    module = frozen(case, "int8", case_tensors)
    portable = module._portable(0)
    alter(portable)
    module._pack(0, portable)
    return call_module(case, case_tensors, module)


def one_more(matrix: int, row: int, column: int) -> Callable[[Portable], None]:
    def alter(portable: Portable) -> None:
        weight = portable.weights[matrix]
        weight[row, column] += 1 if weight[row, column] < 127 else -1

    return alter


def larger_scale(matrix: int, row: int, by: float) -> Callable[[Portable], None]:
    def alter(portable: Portable) -> None:
        portable.scales[matrix][row] *= 1 + by

    return alter


def exchanged(matrix: int, rows: tuple[int, int]) -> Callable[[Portable], None]:
    def alter(portable: Portable) -> None:
        for t in (portable.weights[matrix], portable.scales[matrix]):
            t[list(rows)] = t[list(reversed(rows))]

    return alter


def without_bias(portable: Portable) -> None:
    portable.weights[3][7] = 0


# A change of the gate o may vanish where a projection quantizes h, so the rows are of i, f and g.
# weights: ih, hh, bias_ih, bias_hh, hr of the forward direction, then the reverse one's; scales: ih, hh, hr, ...
FAULTS = {
    "one weight of W_ih more by one": one_more(0, 40, 19),
    "one weight of W_hh more by one": one_more(1, 70, 8),
    "one weight of W_hr more by one": one_more(4, 8, 32),
    "one weight of the reverse W_hh more by one": one_more(6, 65, 0),
    "a scale of W_ih larger by 2^-10": larger_scale(0, 64, 2.0**-10),
    "a scale of W_hh larger by 2^-10": larger_scale(1, 64, 2.0**-10),
    "a scale of W_hr larger by 2^-10": larger_scale(2, 3, 2.0**-10),
    "a scale of the reverse W_hr larger by 2^-10": larger_scale(5, 0, 2.0**-10),
    "two rows of W_hh exchanged": exchanged(1, (31, 32)),
    "an element of a bias lost": without_bias,
}


def test_unaltered_weights_are_right():
    check_frozen(CASE, "int8", altered(CASE, lambda portable: None))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    results = altered(CASE, FAULTS[fault])
    with pytest.raises(AssertionError, match="beyond the bound"):
        check_frozen(CASE, "int8", results)


@pytest.mark.parametrize("names", [("output", "h_n"), ("cells", "c_n"), ("h_n",), ("c_n",)], ids=str)
def test_error_of_2_to_the_minus_14_is_found(names):
    """In a state and where the caller sees it again, or in the last state alone."""
    results = altered(CASE, lambda portable: None)
    for name in names:
        results[name].view(-1)[-1] += 2.0**-14
    with pytest.raises(AssertionError, match=f"{names[0]}, direction 1"):
        check_frozen(CASE, "int8", results)


def test_late_error_of_a_long_run_is_found():
    """The bound does not grow with the steps."""
    case = replace(CASE, T=200, proj=0, bidirectional=False)
    results = altered(case, lambda portable: None)
    check_frozen(case, "int8", results)
    results["cells"][150, 2, 5] += 1e-4
    with pytest.raises(AssertionError, match="cells"):
        check_frozen(case, "int8", results)


def test_the_bound_is_a_few_roundings():
    """Where no element is near the middle between two integers: the flips are what makes it larger."""
    torch.manual_seed(0)
    q, scale = quantized(torch.randn(64, 100))
    rows = Rows.of(torch.randn(500, 100).double())
    product, bound = rows.times(q.double(), scale.double())
    assert float(rows.flips.mean()) < 2e-4
    clear = rows.flips.sum(1) == 0
    assert clear.double().mean() > 0.97
    assert float((bound[clear] / product[clear].abs().amax(1, keepdim=True)).max()) < 1e-6


def test_quantized_weights():
    """Integers within half a step of weight / scale, of which the largest is 127; rows of zeros have scale 0."""
    torch.manual_seed(0)
    weight = torch.randn(40, 33) * torch.logspace(-20, 20, 40)[:, None]
    weight[7] = 0
    q, scale = quantized(weight)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (40,))
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    other = torch.arange(40) != 7
    assert (q[other].abs().amax(1) == 127).all()
    assert not q[7].any()
    error = (q.double() * scale.double()[:, None] - weight.double()).abs() / scale.double()[:, None]
    assert float(error[other].max()) <= 0.5 + 127 * 2.0**-23
    assert torch.equal(quantized(-weight)[0], -q)


@pytest.mark.parametrize("largest", [1e-30, 1e-37, 1e-40, 190 * 2.0**-149, 2.0**-149, 0.0], ids=str)
def test_tiny_weights_stay_within_127(largest):
    q, scale = quantized(torch.tensor([[largest, -largest, 0.0]]))
    assert q.min() >= -127
    assert torch.equal(q[0, 0], -q[0, 1]), q
    assert q[0, 0] >= 0, q
    assert float(q[0, 0] * scale) <= 2 * largest


# Rows of scale 1, and what they are quantized to: exact in float32.
ROWS = {
    "ties round to even": ([255.0, 0.5, 1.5, 2.5, 254.5, 253.5], [255, 0, 2, 2, 254, 254]),
    "negative ties": ([-255.0, -0.5, -1.5, -2.5, -254.5, 0.0], [-255, 0, -2, -2, -254, 0]),
    "both signs": ([-100.0, 155.0, -0.5, 0.5, -1.5, 77.0], [-100, 155, 0, 0, -2, 77]),
    "the largest would be 256": ([-1.5, 253.5, 253.4, 252.5, 1.5, 0.0], [-2, 253, 253, 252, 2, 0]),
    "zero is in the range of positive numbers": (
        [255.0, 200.0, 200.5, 255.0, 254.0, 201.5],
        [255, 200, 200, 255, 254, 202],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_rounded_to_even_between_their_ends(name):
    row, expected = ROWS[name]
    x = torch.tensor(row)
    assert Rows.of(x[None].double()).q.tolist() == [expected]
    eye = [torch.eye(36, 6, dtype=torch.int8), torch.zeros(36, 9, dtype=torch.int8)]
    packed = native.extension.pack_layer(torch.float32, "int8", eye, [torch.ones(36)] * 2)
    sums, scale = native.extension.int8_sums(x, packed)
    assert scale.item() == 1
    assert sums[:6].tolist() == expected


def test_finite_rows_stay_finite():
    """Also where the difference of the largest and the least element is infinite."""
    lstm = fastlstm.freeze(fastlstm.LSTM(2, 3), torch.int8)
    x = torch.tensor([[[3e38, -3e38]]])
    assert torch.equal(lstm(x)[0], lstm(x / 2)[0])
    assert lstm(x)[0].isfinite().all()


@pytest.mark.parametrize("largest", [ZERO_BELOW / 2, 1e-40, 2.0**-149], ids=str)
def test_rows_of_tiny_numbers_count_as_zeros(largest):
    lstm = fastlstm.freeze(fastlstm.LSTM(5, 9), torch.int8)
    x = torch.full((1, 1, 5), largest)
    assert torch.equal(lstm(x)[0], lstm(torch.zeros(1, 1, 5))[0])
    assert not torch.equal(lstm(x / largest)[0], lstm(torch.zeros(1, 1, 5))[0])


@pytest.mark.parametrize(("weights", "limit"), [(torch.int8, 0.27), (torch.bfloat16, 0.51), (None, 1.01)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_memory(weights, limit, kwargs):
    lstm = nn.LSTM(512, 512, **kwargs)
    stored = sum(w.nbytes for w in lstm.parameters())
    fastlstm.freeze(lstm, weights)
    packed = sum(b.nbytes for b in lstm.buffers())
    assert not list(lstm.parameters())
    assert packed <= limit * stored, packed / stored
    assert packed >= 0.9 * stored * (0.25 if weights == torch.int8 else 0.5 if weights else 1)
