"""Every backend against nn.LSTM in float64: outputs and gradients, to within rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastlstm
from fastlstm import dispatch

from ..cases import OUTPUTS, Case
from ..module_pairs import naming
from ..runners import check, require, run_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Single options, then combinations that share code.
OPTIONS = {
    "default": Case(),
    "hx": Case(hx="tuple"),
    "no bias": Case(bias=False),
    "projection": Case(proj=3),
    "projection without bias": Case(proj=3, bias=False, bidirectional=True, hx="tuple"),
    "bidirectional": Case(bidirectional=True, hx="tuple"),
    "three layers": Case(layers=3, bidirectional=True, hx="list"),
    "two layers with projection": Case(layers=2, proj=1, bidirectional=True, batch_first=True),
    "batch_first": Case(batch_first=True, hx="tuple"),
    "unbatched": Case(unbatched=True, B=1, hx="tuple"),
    "unbatched batch_first": Case(unbatched=True, B=1, batch_first=True, layers=2),
    "expanded hx": Case(hx="expanded", layers=2),
    "strided hx": Case(hx="strided", bidirectional=True),
    "shared hx": Case(hx="shared"),
    "strided": Case(strided=("x", "weights", "grads"), bidirectional=True, proj=2, hx="tuple"),
    "no input gradients": Case(x_grad=False, hx="tuple", hx_grad=False),
    "saturated gates": Case(x_scale=100.0, T=9),
    "lengths": Case(T=7, B=4, lengths=(3, 7, 0, 1), hx="tuple"),
    "two layers with lengths": Case(
        T=7, B=4, lengths=(3, 7, 0, 1), hx="tuple", bidirectional=True, layers=2, batch_first=True
    ),
    "packed": Case(T=7, B=4, lengths=(3, 7, 2, 1), packed=True, bidirectional=True, hx="tuple", proj=2),
    "resets": Case(T=7, B=2, resets=((0, 0), (3, 0), (4, 0), (6, 1)), hx="tuple", bidirectional=True, layers=2),
    "lengths and resets": Case(
        T=7, B=2, lengths=(4, 6), resets=((2, 0), (4, 0), (5, 1)), cells=True, hx="tuple", bidirectional=True
    ),
    "cell states": Case(cells=True, layers=2, proj=2, bidirectional=True),
}
# Those that differ in the buffers that kernels write, and in what inference computes.
BUFFER_OPTIONS = (
    "default",
    "projection without bias",
    "batch_first",
    "shared hx",
    "strided",
    "two layers with lengths",
    "packed",
    "resets",
    "lengths and resets",
    "cell states",
)
NO_GRAD_OPTIONS = (
    "default",
    "three layers",
    "unbatched",
    "two layers with lengths",
    "lengths and resets",
)

# (T, B, I, H) around the widths of vector registers and the blocks of GEMMs; all 1; long T; large I.
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
@pytest.mark.parametrize("case", OPTIONS.values(), ids=str)
def test_options(case, dtype, backend):
    case = case.to(dtype)
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, backend):
    case = Case(*size, hx="tuple", dtype=dtype)
    if dtype in (torch.bfloat16, torch.float16) and size[1] * size[3] > 4000:
        pytest.skip("nn.LSTM's backward takes seconds at this size and dtype on CPU")
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("size", [(7, 5, 9, 31), (12, 17, 50, 130)], ids=str)
def test_sizes_with_all_options(size, backend):
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


@pytest.mark.parametrize("case", [OPTIONS[name] for name in BUFFER_OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_uninitialized_memory_is_read(case, dtype, backend, poisoned_empty):
    case = case.to(dtype)
    require(backend, case)
    check(case, backend)


@pytest.mark.parametrize("case", [OPTIONS[name] for name in NO_GRAD_OPTIONS], ids=str)
def test_no_grad_equals_training(case, backend):
    require(backend, case)
    trained = run_backend(case, backend)
    with torch.no_grad():
        inferred = run_backend(replace(case, used=()), backend)
    for name in inferred.keys() & set(OUTPUTS):
        torch.testing.assert_close(inferred[name], trained[name], rtol=1e-6, atol=1e-7, msg=naming(name))


def test_runs_are_bitwise_deterministic(backend):
    case = Case(T=9, B=5, H=33, layers=2, bidirectional=True, hx="tuple", lengths=(9, 2, 5, 0, 7))
    require(backend, case)
    first, second = run_backend(case, backend), run_backend(case, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", list(dispatch.BACKENDS), indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_is_accumulated_in_float32(dtype, backend):
    """c grows by 1/128 per step with an open forget gate; accumulated in bfloat16 it would stop at 2."""
    lstm = fastlstm.LSTM(1, 8, dtype=dtype)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.zero_()
        i, f, g, _ = lstm.bias_ih_l0.view(4, 8)
        i.fill_(20), f.fill_(20), g.fill_(1 / 128)
        _, (_, c_n) = lstm(torch.zeros(800, 2, 1, dtype=dtype))
    torch.testing.assert_close(c_n.double(), torch.full((1, 2, 8), 800 / 128, dtype=torch.float64), rtol=1e-2, atol=0)
