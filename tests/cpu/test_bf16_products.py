"""bfloat16 products of float32 layers (csrc/cpu/engine_bf16.h), requested by torch's flag.

The flag is torch.backends.mkldnn.rnn.fp32_precision; docs/numerics.md, "float32 on a CPU", has the rule. On a CPU whose
bfloat16 instructions are no faster, ATEN_CPU_CAPABILITY=avx512 selects them all the same: such tests run in a process
of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastlstm
from fastlstm import backends
from fastlstm.accuracy import Precision

from ..cases import Case
from ..machine import cpuinfo
from ..runners import check, check_elsewhere, require
from .plans import MACHINES, plan_of

FACTORS = Precision.of(torch.float32, "bf16")
WITH_KERNELS, WITHOUT = MACHINES["AVX-512, L2 2 MiB"], MACHINES["AVX2, L2 1 MiB"]
# From 2 steps, 32 units, 16 features of h and 32 rows on. Around tiles of 16 rows, 32 inputs, 16 and 32 units; groups
# of 128 rows; in weight gradients blocks of 1024 terms, 128 rows and 64 columns; chunks of a quarter of the steps.
CASES = (
    Case(T=2, B=33, I=1, H=32),
    Case(T=40, B=1, I=33, H=65, hx="tuple"),
    Case(T=3, B=15, I=31, H=47, hx="tuple", batch_first=True),
    Case(T=4, B=17, I=33, H=97, hx="tuple", bidirectional=True),
    Case(T=5, B=33, I=65, H=127, hx="tuple", strided=("x", "weights", "grads")),
    Case(T=3, B=145, I=7, H=40, hx="tuple", bias=False),
    Case(T=2, B=300, I=130, H=96),
    Case(T=20, B=256, I=20, H=64, bidirectional=True, layers=2),  # four chunks
    Case(T=20, B=256, I=20, H=64, bidirectional=True, hx="tuple", frozen=("weight_ih_l0",)),
    Case(T=8, B=20, I=20, H=64, bidirectional=True, hx="tuple", frozen=("weight_hh_l0", "weight_hh_l0_reverse")),
    Case(T=33, B=32, I=20, H=64, hx="tuple"),  # the last chunk is one step
    Case(T=40, B=12, I=128, H=256, hx="tuple"),  # threads split units
    Case(T=12, B=96, I=256, H=64, hx="tuple"),  # threads split rows; a block of 1152 rows
    Case(T=9, B=20, I=5, H=67, lengths=tuple(k % 10 for k in range(20)), hx="tuple", bidirectional=True),
    Case(T=9, B=20, I=5, H=67, lengths=tuple(1 + k % 9 for k in range(20)), packed=True, layers=2),
    Case(T=7, B=18, I=3, H=33, resets=((0, 0), (3, 0), (4, 17), (6, 16)), hx="tuple", bidirectional=True),
    Case(
        T=20, B=2, lengths=(14, 19), H=64, resets=((2, 0), (4, 0), (5, 1)), cells=True, hx="tuple", bidirectional=True
    ),
    Case(T=12, B=3, I=3, H=80, x_grad=False, hx="tuple", hx_grad=False),
    Case(T=12, B=3, I=5, H=64, hx="tuple", used=("h_n",)),
    # With projection: around 32 and 64 features.
    Case(T=2, B=33, I=1, H=32, proj=16),
    Case(T=4, B=17, I=33, H=97, proj=33, hx="tuple", bidirectional=True, frozen=("weight_hr_l0",)),
    Case(T=5, B=33, I=65, H=127, proj=64, hx="tuple", strided=("x", "weights", "grads")),
    Case(T=33, B=32, I=20, H=64, proj=40, hx="tuple"),  # the last chunk is one step
    Case(T=40, B=12, I=128, H=256, proj=96, hx="tuple"),  # threads split units and features
    Case(T=9, B=20, I=5, H=67, proj=34, lengths=tuple(k % 10 for k in range(20)), resets=((2, 3), (4, 17)), layers=2),
)

BEGIN = """
import torch, fastlstm
from fastlstm import backends
from tests.cpu.plans import plan_of
from tests.runners import run, run_backend
rnn = torch.backends.mkldnn.rnn
assert backends.native.extension.bfloat16_isa() == "avx512_bf16", backends.native.extension.bfloat16_isa()
"""
PARITY = """
results = []
for case in cases:
    rnn.fp32_precision = "bf16"
    plan = plan_of(case)
    assert {phase["engine"] for phase in plan.values()} == {"bf16_products"}, plan
    results.append([])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[-1].append(run_backend(case, "native"))
    rnn.fp32_precision = "none"
    float32 = run_backend(case, "native")["output"]
    assert not torch.equal(float32, results[-1][0]["output"]), case
save(results)
"""


@contextmanager
def flags(rnn: str = "bf16") -> Iterator[None]:
    torch.backends.mkldnn.rnn.fp32_precision = rnn
    try:
        yield
    finally:
        torch.backends.mkldnn.rnn.fp32_precision = "none"


@pytest.fixture(autouse=True)
def native():
    require("native", Case())


def run_on_avx512_bf16(program: str) -> str:
    """Run a program on the AVX512_BF16 kernels, whether they are the fastest here or not; return its output."""
    require_avx512_bf16()
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx512"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def require_avx512_bf16() -> None:
    if "avx512_bf16" not in cpuinfo("flags"):
        pytest.skip("this CPU has no AVX512_BF16")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, threads):
    """On the best kernels of this CPU, of float32 if it has no faster ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with flags():
            if plan_of(case)["forward"]["engine"] != "bf16_products":
                if case is not CASES[3]:
                    pytest.skip("this CPU has no faster kernels: float32's run, as one case shows")
                return check(case, "native")
            check(case, "native", FACTORS)
    finally:
        torch.set_num_threads(before)


def test_parity_on_avx512_bf16():
    require_avx512_bf16()
    check_elsewhere(CASES, "native", BEGIN + PARITY, rounding=FACTORS, ATEN_CPU_CAPABILITY="avx512")


def test_flag_may_change_before_backward():
    """It is read at every call: the kernels of both read what forward saved."""
    require_avx512_bf16()
    cases = [Case(T=20, B=6, I=9, H=81, hx="tuple", bidirectional=True), Case(T=20, B=6, I=9, H=64)]
    program = """
from unittest import mock
from tests import runners
gradients = runners.gradients
results = []
for case in cases:
    results.append([])
    for forward, backward in (("bf16", "none"), ("none", "bf16")):
        rnn.fp32_precision = forward
        def switched(*args):
            rnn.fp32_precision = backward
            return gradients(*args)
        with mock.patch.object(runners, "gradients", switched):
            results[-1].append(run_backend(case, "native"))
save(results)
"""
    check_elsewhere(cases, "native", BEGIN + program, rounding=FACTORS, ATEN_CPU_CAPABILITY="avx512")


def test_exact_factors_give_float32_results():
    """A first step of factors that bfloat16 holds: only float32 rounds, so sums, gates and states are float32."""
    run_on_avx512_bf16("""
torch.manual_seed(0)
exact = lambda t: t.bfloat16().float()
lstm = fastlstm.LSTM(100, 96)
for p in lstm.parameters():
    p.data = exact(4 * p.data)
x, h0, c0 = exact(torch.randn(2, 40, 100)), exact(torch.randn(1, 40, 96)), torch.randn(1, 40, 96)
with torch.no_grad():
    float32 = lstm(x, (h0, c0))[0]
    rnn.fp32_precision = "bf16"
    y, (h, _), cells = lstm(x, (h0, c0), return_cell_states=True)
    expected, (_, c) = torch.nn.LSTM.forward(lstm.double(), x[:1].double(), (h0.double(), c0.double()))
assert torch.equal(y[1:], h)
assert (y[1] - float32[1]).abs().max() > 1e-5  # h of the first step is rounded
assert (y[:1] - expected).abs().max() < 1e-6, (y[:1] - expected).abs().max()
assert (cells[:1] - c).abs().max() < 2e-6, (cells[:1] - c).abs().max()
""")


def test_3_000_steps_drift_no_further_than_factors_explain():
    """The state is rounded as a factor only. Forget gates near 1 keep c for up to 3,000 steps.

    The rule takes roundings for independent. Those of weights are the same in every step, so the layers that remember
    have weights and inputs which bfloat16 holds.
    """
    run_on_avx512_bf16("""
from fastlstm.accuracy import Precision, compare, error_bounds
named = lambda y, states: {"output": y, "h_n": states[0], "c_n": states[1]}
for forget, exact in ((0, False), (8, True)):
    torch.manual_seed(0)
    lstm, x = fastlstm.LSTM(4, 32), torch.randn(3_000, 2, 4)
    lstm.bias_ih_l0.data[32:64] += forget
    if exact:
        lstm, x = lstm.bfloat16().float(), x.bfloat16().float()
    rnn.fp32_precision = "bf16"
    with torch.no_grad():
        results = named(*lstm(x))
        lstm.double()
        run = lambda: named(*torch.nn.LSTM.forward(lstm, x.double()))
        expected, bounds = error_bounds(run, Precision.of(torch.float32, "bf16"))
    wrong = [str(found) for found in compare(results, expected, bounds) if not found.ok]
    assert not wrong, (forget, exact, wrong)
""")


def test_only_float32_layers_follow_the_flag():
    run_on_avx512_bf16("""
torch.manual_seed(0)
x, steps, cell = torch.randn(6, 6, 70), torch.randn(300, 70), fastlstm.LSTMCell(70, 256)
def autocast(steps):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cell(steps)
calls = {
    "float64": (fastlstm.LSTM(70, 64).double(), x.double()),
    "float16": (fastlstm.LSTM(70, 64).half(), x.half()),
    "bfloat16": (fastlstm.LSTM(70, 64).bfloat16(), x.bfloat16()),
    "small": (fastlstm.LSTM(70, 31), x),
    "small projection": (fastlstm.LSTM(70, 64, proj_size=15), x),
    "few rows": (fastlstm.LSTM(70, 64), x[:2, :2]),
    "one step": (fastlstm.LSTM(70, 64), x.reshape(1, 36, 70)),
    "LSTMCell": (cell, steps),
    "LSTMCell compiled": (torch.compile(cell, backend="aot_eager", fullgraph=True), steps),
    "LSTMCell mapped": (torch.vmap(cell), steps),
    "LSTMCell in autocast": (autocast, steps),
    "frozen": (fastlstm.freeze(fastlstm.LSTM(70, 64)), x),
}
for name, (module, given) in calls.items():
    def call():
        out = module(given)
        out = [out[0], *out[1]] if isinstance(out[1], tuple) else list(out)
        weights = list((module if isinstance(module, torch.nn.Module) else cell).parameters())
        return out + (list(torch.autograd.grad(out[0].float().sum(), weights)) if weights else [])
    results = []
    for precision in ("none", "bf16"):
        rnn.fp32_precision = precision
        results.append(call())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
""")


def test_flags_that_decide():
    """The rnn flag; if unset oneDNN's, then the generic one; not matmul's, and only while nn.LSTM may use oneDNN."""
    run_on_avx512_bf16("""
torch.manual_seed(0)
lstm, x = fastlstm.LSTM(70, 64), torch.randn(6, 6, 70)
def uses_bf16():
    used = not torch.equal(lstm(x)[0], float32)
    assert ("products of bfloat16" in fastlstm.explain(lstm, x).forward) == used
    return used
float32 = lstm(x)[0]
assert not uses_bf16()
with torch.backends.mkldnn.flags(enabled=True, fp32_precision="bf16"):
    assert rnn.fp32_precision == "bf16" and uses_bf16()
assert not uses_bf16()
for precision, expected in (("bf16", True), ("tf32", False), ("ieee", False), ("none", False)):
    rnn.fp32_precision = precision
    assert uses_bf16() == expected, precision
torch.backends.fp32_precision = "bf16"
assert rnn.fp32_precision == "bf16" and uses_bf16()
rnn.fp32_precision = "ieee"
assert not uses_bf16()
torch.backends.fp32_precision = rnn.fp32_precision = "none"
torch.set_float32_matmul_precision("medium")
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16" and not uses_bf16()
torch.set_float32_matmul_precision("highest")
rnn.fp32_precision = "bf16"
torch._C._set_mkldnn_enabled(False)
assert not uses_bf16()
""")


def test_results_are_bitwise_deterministic():
    run_on_avx512_bf16("""
torch.manual_seed(0)
rnn.fp32_precision = "bf16"
torch.set_num_threads(2)
for T, B, I, H, P in ((40, 24, 64, 256, 0), (40, 96, 64, 64, 0), (40, 24, 64, 256, 96)):
    lstm, x = fastlstm.LSTM(I, H, proj_size=P), torch.randn(T, B, I, requires_grad=True)
    def call():
        y = lstm(x)[0]
        return [y, *torch.autograd.grad(y.pow(2).sum(), [x, *lstm.parameters()])]
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
""")


@pytest.mark.parametrize(
    ("case", "machine", "reason"),
    [
        (Case(T=11, B=3, H=32), WITHOUT, "no bfloat16 instructions that are faster"),
        (Case(T=11, B=3, H=32, lengths=(11, 11, 9)), WITH_KERNELS, "of so few rows"),
        (Case(T=11, B=3, H=31), WITH_KERNELS, "of so few units"),
        (Case(T=11, B=3, H=32, proj=15), WITH_KERNELS, "or features of h save"),
        (Case(T=11, B=3, H=32, I=0), WITH_KERNELS, "at least one input feature"),
        (Case(T=1, B=33, I=1, H=32), WITH_KERNELS, "a single step has float32 products"),
    ],
    ids=str,
)
def test_reason_of_float32_products(case, machine, reason):
    with flags():
        plan = plan_of(case, 1, **machine)
    assert plan["forward"]["engine"] == plan["backward"]["engine"] == "float_panels"
    assert "bfloat16 products requested but not used (" in plan["forward"]["text"]
    assert reason in plan["forward"]["text"]
    unchanged = plan_of(case, 1, **machine)
    assert "requested" not in unchanged["forward"]["text"]


@pytest.mark.parametrize("proj", [0, 16])
def test_plan_of_bf16_products(proj):
    with flags():
        plan = plan_of(Case(T=8, B=4, I=64, H=32, proj=proj), 1, **WITH_KERNELS)
    assert plan["forward"]["engine"] == plan["backward"]["engine"] == "bf16_products"
    backward = plan["backward"]
    products = [backward["dx"], *(backward[w]["gemm"] for w in ("dw_ih", "dw_hh", "dw_hr") if w in backward)]
    assert products == ["bf16"] * (4 if proj else 3)
    assert "products of bfloat16" in plan["forward"]["text"]
    assert "requested" not in plan["forward"]["text"]


@pytest.mark.parametrize("rnn", ["none", "bf16"])
def test_plan_of_frozen_bfloat16_weights(rnn):
    """Their products are bfloat16 where these are faster, whatever the flag says and however few rows there are."""
    reasons = [
        (Case(T=1, B=1, H=32), WITH_KERNELS, None),
        (Case(T=1, B=1, H=32, proj=16), WITH_KERNELS, None),
        (Case(T=20, B=12, H=31), WITH_KERNELS, "of so few units"),
        (Case(T=20, B=12, H=64, proj=15), WITH_KERNELS, "of so few units"),
        (Case(T=20, B=12, H=64, I=0), WITH_KERNELS, "at least one input feature"),
        (Case(T=20, B=12, H=64), WITHOUT, "no bfloat16 instructions that are faster"),
    ]
    for case, machine, reason in reasons:
        with flags(rnn):
            plan = plan_of(case, 1, frozen="bfloat16", **machine)["forward"]
        assert plan["engine"] == ("bf16_panels" if reason else "bf16_products"), case
        assert ("requested" in plan["text"]) == bool(rnn == "bf16" and reason)
        if rnn == "bf16" and reason:
            assert reason in plan["text"]


@pytest.mark.parametrize("form", ["stored", "int8"])
def test_other_frozen_weights_are_multiplied_as_packed(form):
    with flags():
        plan = plan_of(Case(T=20, B=12, H=64), 1, frozen=form, **WITH_KERNELS)["forward"]
    assert "not used (frozen weights are multiplied as they were packed)" in plan["text"]


def test_explain_reads_the_flag():
    lstm, x = fastlstm.LSTM(8, 64), torch.zeros(12, 3, 8)
    with flags():
        text = fastlstm.explain(lstm, x).forward
    kernels = backends.native.extension.bfloat16_isa() != backends.native.extension.isa()
    assert ("products of bfloat16" if kernels else "bfloat16 products requested but not used") in text
    with flags("tf32"):
        assert "bfloat16" not in fastlstm.explain(lstm, x).forward
    for other in (lstm.double(), lstm.bfloat16()):
        with flags():
            assert "requested" not in fastlstm.explain(other, x.to(other.weight_ih_l0.dtype)).forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_has_float32_products(dtype):
    """The bfloat16 kernels do not compute it, of float32 layers with the flag or of bfloat16 layers."""
    x = torch.zeros(20, 8, 32, dtype=dtype)
    plans = {}
    with flags():
        for norm in (False, True):
            weights = list(fastlstm.LSTM(32, 64, layer_norm=norm, dtype=dtype).parameters())
            plans[norm] = backends.native.cpu_plan(fastlstm.dispatch.describe(x, weights), 20, 8, **WITH_KERNELS)
    for phase in ("forward", "backward"):
        assert plans[True][phase]["engine"] in ("float_panels", "bf16_panels")
        assert plans[False][phase]["engine"] == "bf16_products"
    if dtype == torch.float32:
        assert "do not support layer normalization" in plans[True]["forward"]["text"]
