"""Every backend against nn.LSTM in float64: outputs and gradients, no further than rounding explains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastlstm
from fastlstm import dispatch

from .cases import OUTPUTS, Case
from .runners import check, require, run_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One option each, then the combinations that share code.
OPTIONS = (
    Case(),
    Case(hx="tuple"),
    Case(bias=False),
    Case(proj=3),
    Case(proj=3, bias=False, bidirectional=True, hx="tuple"),
    Case(bidirectional=True, hx="tuple"),
    Case(layers=3, bidirectional=True, hx="list"),
    Case(layers=2, proj=1, bidirectional=True, batch_first=True),
    Case(batch_first=True, hx="tuple"),
    Case(unbatched=True, B=1, hx="tuple"),
    Case(unbatched=True, B=1, batch_first=True, layers=2),
    Case(hx="expanded", layers=2),
    Case(hx="strided", bidirectional=True),
    Case(hx="shared"),
    Case(strided=("x", "weights", "grads"), bidirectional=True, proj=2, hx="tuple"),
    Case(x_grad=False, hx="tuple", hx_grad=False),
    Case(x_scale=100.0, T=9),  # saturated gates
    Case(T=7, B=4, lengths=(3, 7, 0, 1), hx="tuple"),
    Case(T=7, B=4, lengths=(3, 7, 0, 1), hx="tuple", bidirectional=True, layers=2, batch_first=True),
    Case(T=7, B=4, lengths=(3, 7, 2, 1), packed=True, bidirectional=True, hx="tuple", proj=2),
    Case(T=7, B=2, resets=((0, 0), (3, 0), (4, 0), (6, 1)), hx="tuple", bidirectional=True, layers=2),
    Case(T=7, B=2, lengths=(4, 6), resets=((2, 0), (4, 0), (5, 1)), cells=True, hx="tuple", bidirectional=True),
    Case(cells=True, layers=2, proj=2, bidirectional=True),
)

# (T, B, I, H) around the widths of vector registers and the blocks of matrix products; one of everything; long; wide.
SIZES = (
    (1, 1, 1, 1),
    (1, 1, 64, 64),
    (1, 9, 5, 33),
    (2, 1, 3, 100),
    (3, 17, 8, 65),
    (7, 5, 9, 31),
    (20, 8, 10, 32),
    (5, 64, 20, 128),
    (3, 3, 300, 5),
    (200, 3, 4, 16),
    (12, 33, 50, 257),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, dtype, backend):
    case = case.to(dtype)
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, backend):
    case = Case(*size, hx="tuple", dtype=dtype)
    if dtype in (torch.bfloat16, torch.float16) and size[1] * size[3] > 4000:
        pytest.skip("nn.LSTM takes seconds in backward at this size and dtype on CPU")
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("size", [(7, 5, 9, 31), (12, 17, 50, 130)], ids=str)
def test_sizes_with_everything_on(size, backend):
    T, B = size[:2]
    lengths = tuple((7 * b) % (T + 1) for b in range(B))
    resets = tuple((t, b) for t in range(T) for b in range(B) if (t * 5 + b * 3) % 7 == 0)
    case = Case(*size, layers=2, bidirectional=True, proj=9, hx="tuple", lengths=lengths, resets=resets, cells=True)
    require(backend, case)
    check(case, backend)


def test_hidden_size_2048(backend):
    case = Case(T=2, B=2, I=3, H=2048, hx="tuple")
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("case", [OPTIONS[i] for i in (0, 4, 8, 13, 14, 18, 19, 20, 21, 22)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_before_it_is_written(case, dtype, backend, poisoned_empty):
    case = case.to(dtype)
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("case", [OPTIONS[i] for i in (0, 6, 9, 18, 21)], ids=str)
def test_no_grad_gives_the_same_numbers(case, backend):
    require(backend, case)
    trained = run_backend(case, backend)
    with torch.no_grad():
        inferred = run_backend(replace(case, used=()), backend)
    for name in inferred.keys() & set(OUTPUTS):
        torch.testing.assert_close(inferred[name], trained[name], rtol=1e-6, atol=1e-7)


def test_repeated_runs_are_bitwise_equal(backend):
    case = Case(T=9, B=5, H=33, layers=2, bidirectional=True, hx="tuple", lengths=(9, 2, 5, 0, 7))
    require(backend, case)
    first, second = run_backend(case, backend), run_backend(case, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", list(dispatch.BACKENDS), indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_state_is_carried_in_float32(dtype, backend):
    """c grows by 1/128 a step under an open forget gate; added up in bfloat16 it would stand still at 2."""
    lstm = fastlstm.LSTM(1, 8, dtype=dtype)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.zero_()
        i, f, g, _ = lstm.bias_ih_l0.view(4, 8)
        i.fill_(20), f.fill_(20), g.fill_(1 / 128)
        _, (_, c_n) = lstm(torch.zeros(800, 2, 1, dtype=dtype))
    torch.testing.assert_close(c_n.double(), torch.full((1, 2, 8), 800 / 128, dtype=torch.float64), rtol=1e-2, atol=0)
