"""bfloat16 on the CPU: which kernels support it, and the accuracy of those of csrc/cpu/bf16.h.

tests/cpu/test_isa.py runs these cases on the kernels that are not selected on a CPU with AMX.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import fastlstm
from fastlstm import backends

from ..cases import Case
from ..machine import cpuinfo
from ..runners import check, require
from .plans import MACHINES, assert_path

# Around the small-batch kernels, up to 4 rows unpacked, and the tiles: 16 rows, 32 inputs, 16 and 32 units, groups of
# 128 rows; chunks of a quarter of the steps.
CASES = (
    Case(T=1, B=1, I=1, H=1),
    Case(T=3, B=15, I=31, H=15, hx="tuple"),
    Case(T=4, B=16, I=32, H=16, hx="tuple", bidirectional=True),
    Case(T=4, B=17, I=33, H=17, hx="tuple", bidirectional=True),
    Case(T=5, B=33, I=65, H=47, hx="tuple"),
    Case(T=3, B=145, I=7, H=40, hx="tuple", bias=False),
    Case(T=2, B=300, I=40, H=96),
    Case(T=160, B=32, I=20, H=64, hx="tuple"),  # several chunks
    Case(T=160, B=32, I=20, H=64, bidirectional=True, layers=2),
    Case(T=160, B=32, I=20, H=64, bidirectional=True, hx="tuple", frozen=("weight_ih_l0",)),
    Case(T=33, B=32, I=20, H=64),  # the last chunk is one step
    Case(T=33, B=32, I=20, H=64, bidirectional=True, hx="tuple"),
    Case(T=40, B=12, I=128, H=256, hx="tuple"),  # threads split units
    Case(T=40, B=96, I=64, H=64, hx="tuple"),  # threads split rows
    Case(T=9, B=20, I=5, H=35, lengths=tuple(k % 10 for k in range(20)), hx="tuple", bidirectional=True),
    Case(T=9, B=20, I=5, H=35, lengths=tuple(1 + k % 9 for k in range(20)), packed=True, layers=2),
    Case(T=7, B=18, I=3, H=33, resets=((0, 0), (3, 0), (4, 17), (6, 16)), hx="tuple", bidirectional=True),
    Case(T=7, B=2, lengths=(4, 6), resets=((2, 0), (4, 0), (5, 1)), cells=True, hx="tuple", bidirectional=True),
    Case(T=9, B=4, I=3, H=33, x_scale=100.0),
    *(
        Case(T=T, B=B, I=I, H=H, hx="tuple")
        for T, B in ((1, 2), (1, 4), (4, 1), (2, 3), (13, 1))
        for I, H in ((31, 33), (32, 64), (70, 29))  # noqa: E741
    ),
    Case(T=6, B=2, I=300, H=400, hx="tuple"),  # W_hh is unpacked, W_ih is packed
    Case(T=30, B=3, I=40, H=720, hx="tuple"),  # panels of bfloat16
    Case(T=12, B=5, I=40, H=48, proj=20, hx="tuple", bidirectional=True),
    Case(T=2, B=2, I=40, H=48, proj=20, hx="tuple"),
    Case(T=5, B=3, I=3, H=20, x_grad=False, hx="tuple", hx_grad=False),
)


@pytest.fixture(autouse=True)
def native():
    require("native", Case())


def test_bfloat16_support_depends_on_the_cpu():
    expected = backends.native.extension.isa()
    if "avx512_bf16" in cpuinfo("flags") and expected == "avx512":
        if "ATEN_CPU_CAPABILITY" not in os.environ and {"amx_bf16", "amx_tile"} <= cpuinfo("flags"):
            expected = "amx"
        elif "ATEN_CPU_CAPABILITY" in os.environ or "GenuineIntel" not in cpuinfo("vendor_id"):
            expected = "avx512_bf16"
    assert backends.native.extension.bfloat16_isa() == expected


@pytest.mark.parametrize("proj", [0, 16])
def test_h_is_rounded_between_steps(proj):
    """As in nn.LSTM's kernels, which do not keep h in float32."""
    torch.manual_seed(0)
    x = torch.randn(30, 4, 8, dtype=torch.bfloat16)
    lstm = fastlstm.LSTM(8, 64, proj_size=proj).bfloat16()
    with torch.no_grad():
        y = lstm(x)[0]
        in_float32 = lstm.float()(x.float())[0].bfloat16()
    assert not torch.equal(y, in_float32)
    torch.testing.assert_close(y, in_float32, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "machine", "path"),
    [
        ((160, 32, 20, 64), "AVX-512, L2 2 MiB", {"engine": "bf16_products", "split": "rows"}),
        ((40, 12, 128, 256), "AVX-512, L2 2 MiB", {"engine": "bf16_products", "split": "units"}),
        ((40, 96, 64, 64), "AVX-512, L2 2 MiB", {"engine": "bf16_products", "split": "rows"}),
        ((1, 4, 31, 33), "AVX-512, L2 2 MiB", {"engine": "float_panels", "w_ih": "unpacked"}),
        ((6, 2, 300, 400), "AVX2, L2 1 MiB", {"w_ih": "pack_on_use", "w_hh": "unpacked"}),
        ((30, 3, 40, 720), "AVX2, L2 1 MiB", {"engine": "bf16_panels"}),
    ],
    ids=str,
)
def test_paths_of_the_cases(sizes, machine, path):
    """On a machine with the bfloat16 kernels, and on one without."""
    case = next(c for c in CASES if sizes == (c.T, c.B, c.I, c.H) and c.layers == 1)
    assert_path(replace(case, dtype=torch.bfloat16), "forward", at=2, on=MACHINES[machine], **path)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(replace(case, dtype=torch.bfloat16), "native")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_checks_lengths_before_reading_them(dtype):
    weights = [w.detach() for w in fastlstm.LSTM(3, 4).to(dtype).parameters()]
    x, y, reserve = (torch.zeros(*shape, dtype=dtype) for shape in ((5, 2, 3), (5, 2, 4), (1, 5, 2, 16)))
    backward, lengths = torch.ops.fastlstm.native_layer_backward, torch.tensor([5, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="lengths must be Long on cpu, got Int on cpu"):
        backward(y, None, None, None, x, None, None, weights, lengths, None, y, y, reserve, [True] * 7)


def test_empty_batch():
    lstm = fastlstm.LSTM(5, 7).bfloat16()
    x = torch.zeros(3, 0, 5, dtype=torch.bfloat16, requires_grad=True)
    y, (h_n, c_n) = lstm(x)
    assert y.shape == (3, 0, 7)
    assert h_n.shape == c_n.shape == (1, 0, 7)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in lstm.parameters())


def test_nan_stays_in_its_row():
    lstm = fastlstm.LSTM(5, 20).bfloat16()
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    x[1, 1, 2] = float("nan")
    y = lstm(x)[0]
    assert y[1:, 1].isnan().all()
    assert not y[0].isnan().any()
    assert not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("shape", [(40, 24, 64, 256), (40, 96, 64, 64)], ids=str)
def test_results_are_bitwise_deterministic(shape):
    T, B, I, H = shape  # noqa: E741
    lstm = fastlstm.LSTM(I, H).bfloat16()
    x = torch.randn(T, B, I, dtype=torch.bfloat16, requires_grad=True)

    def run():
        y = lstm(x)[0]
        return [y, *torch.autograd.grad(y.float().pow(2).sum(), [x, *lstm.parameters()])]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(("lengths", "hx"), [((300, *[1] * 127), "tuple"), (None, "none")], ids=["ragged", "dense"])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_weight_gradients_are_rounded_once(lengths, hx, backend):
    """Over many chunks of few rows, and h0's part: sums in bfloat16 would lose a tenth of the ragged gradient."""
    T, B = (300, 128) if lengths else (40, 3)
    check(Case(T=T, B=B, I=32, H=128, dtype=torch.bfloat16, lengths=lengths, hx=hx), backend)
