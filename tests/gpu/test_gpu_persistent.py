"""The persistent kernels on a GPU: against cuDNN and, over many launches, the step-wise kernels; no hang."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

import fastlstm
from fastlstm.accuracy import max_error
from fastlstm.backends import native

from ..cases import Case
from .gpu_support import BFLOAT16, HALF, TF32, Arithmetic, check, gpu, require, run, same

pytestmark = gpu

COUNT = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "250"))
PRECISIONS = (TF32, HALF, BFLOAT16)
VARIANTS = {"A": "cluster variant", "B": "grid variant", "D": "with data flags", "S": "single-block variant"}  # by tier
RAGGED = {"lengths": (4, 0, 7, 1, 6), "resets": ((0, 0), (3, 0), (5, 0), (2, 2), (6, 2), (6, 3), (4, 4))}
# Fast enough for compute-sanitizer: one block and several, both directions, masks.
SMALL = (
    Case(T=5, B=3, I=4, H=8, hx="tuple"),
    Case(T=6, B=19, I=4, H=70, hx="tuple", cells=True),
    Case(T=7, B=5, I=4, H=40, hx="tuple", bidirectional=True, cells=True, **RAGGED),
)
# Every configuration of csrc/cuda/plan.h on an H100, batch tiles of 8 and 16 rows, one per group and several.
SIZES = [(H, B) for H in (31, 128, 256, 500, 512, 640, 768, 1024, 1536, 2048) for B in (1, 16, 100)]


@pytest.fixture(autouse=True, params=["A", "B", "D", "S"])
def persistent(request: pytest.FixtureRequest) -> Iterator[str]:
    """Enable the persistent kernels of one tier for all layers that it supports."""
    if "cuda" not in native.devices:
        pytest.skip(f"fastlstm._C was built for {native.devices or native.load_error}")
    if request.param == "A" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no thread-block clusters")
    before = native.extension.persistent_enabled()
    native.set_persistent(True, tier=request.param)
    yield request.param
    native.set_persistent(before)


def kernels(case: Case) -> str:
    x = torch.empty(1, case.B, case.I, dtype=case.dtype, device="cuda")
    return fastlstm.explain(fastlstm.LSTM(**case.arguments(), dtype=case.dtype, device="cuda"), x).kernels


def require_data_flags(case: Case, precision: Arithmetic) -> None:
    """In forward and backward; a layer that the variant does not support would run with flags."""
    with precision.flags(), fastlstm.use_backend("native"):
        text = kernels(case)
    assert text.count(f"{VARIANTS['D']}: requested") == 2, text


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case, precision):
    check(case, precision, "native")


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(("H", "B"), SIZES)
def test_parity_with_cudnn(H, B, precision, persistent):
    case = Case(T=24, B=B, I=64, H=H, hx="tuple", dtype=precision.dtype)
    with precision.flags(), fastlstm.use_backend("native"):
        if f"{VARIANTS[persistent]}: requested" not in kernels(case):
            pytest.skip(kernels(case))
    check(case, precision, "native")


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_results_are_bitwise_deterministic(precision, persistent):
    # Data flags: a group per batch tile and direction, of up to 32 CTAs.
    B = 16 if persistent == "D" else 64
    case = Case(T=200, B=B, I=64, H=512, bidirectional=True, dtype=precision.dtype)
    if persistent == "D":
        require_data_flags(case, precision)
    first = run(case, precision, "native")
    for _ in range(20):
        same(run(case, precision, "native"), first)


def against_steps(case: Case, precision: Arithmetic) -> None:
    """Results equal the step-wise kernels' up to the order of sums, because h and dgates are rounded equally."""
    tier = native.extension.persistent_tier()
    native.set_persistent(False)
    steps = run(case, precision, "native")
    native.set_persistent(True, tier=tier)
    for name, got in run(case, precision, "native").items():
        scale = float(steps[name].double().abs().max()) if got.numel() else 0.0
        off = max_error(got, steps[name])
        assert off <= 16 * precision.eps * scale, f"{case!r} {precision}, {name}: {off:.3g} at scale {scale:.3g}"


def test_random_launches():
    """FASTLSTM_FUZZ_COUNT random layers per tier, forward and backward, with masks: no hang and no mismatch."""
    rng = random.Random(20240229)
    for index in range(COUNT):
        T, B = rng.choice((4, 5, 16, 33)), rng.choice((1, 3, 8, 9, 16, 17, 40, 130))
        H = rng.choice((1, 8, 31, 32, 33, 64, 100, 128, 200, 256, 300, 384, 512, 600, 768, 1024))
        lengths = tuple(rng.randint(0, T) for _ in range(B)) if rng.random() < 0.3 else None
        resets = None
        if rng.random() < 0.3:
            resets = tuple((t, b) for t in range(T) for b in range(B) if rng.random() < 0.1)
        precision = rng.choice(PRECISIONS)
        case = Case(
            T=T, B=B, I=8, H=H, bidirectional=rng.random() < 0.3, hx=rng.choice(("none", "tuple")), lengths=lengths,
            resets=resets, dtype=precision.dtype, seed=index,
        )  # fmt: skip
        require("native", case)
        against_steps(case, precision)
    torch.cuda.synchronize()


@pytest.mark.parametrize("sms", [8, 32])
def test_green_context(sms, persistent):
    """The stream has fewer SMs than the device: the cooperative launch does not fit, and the layer runs step by step.

    Not run on a GPU yet. The expected status is cudaErrorCooperativeLaunchTooLarge, or for clusters
    cudaErrorInvalidClusterSize; csrc/cuda/layer_persistent.cpp uses the step-wise path for no other.
    """
    green_contexts = pytest.importorskip("torch.cuda.green_contexts")
    case = Case(T=24, B=16 if persistent == "D" else 64, I=64, H=1024, hx="tuple", dtype=torch.bfloat16)
    if persistent == "D":
        require_data_flags(case, BFLOAT16)
    expected = run(case, BFLOAT16, "native")
    torch.cuda.synchronize()
    try:
        context = green_contexts.GreenContext.create(num_sms=sms, device_id=0)
    except RuntimeError as error:
        pytest.skip(str(error))
    context.set_context()
    try:
        results = run(case, BFLOAT16, "native")
        torch.cuda.synchronize()
    finally:
        context.pop_context()
    for name, value in results.items():
        scale = float(expected[name].double().abs().max()) if value.numel() else 0.0
        assert max_error(value, expected[name]) <= 16 * BFLOAT16.eps * scale, name


def test_launches_on_many_streams():
    """Concurrent launches: a cluster, or all groups of the grid variant, get all their CTAs or wait, never a part."""
    case = Case(T=64, B=64, I=64, H=512, dtype=torch.bfloat16)
    expected = run(case, BFLOAT16, "native")
    collected = []
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                collected.append(run(case, BFLOAT16, "native"))
    torch.cuda.synchronize()
    for results in collected:
        same(results, expected)


@pytest.mark.parametrize("persistent", ["D"], indirect=True)
def test_graph_replays_begin_with_empty_words(persistent):
    """Data flags: the fill of the exchange buffer is a node of the graph. Not run on a GPU yet."""
    case = Case(T=24, B=16, I=64, H=256, dtype=torch.bfloat16)
    require_data_flags(case, BFLOAT16)
    lstm = fastlstm.LSTM(64, 256, device="cuda", dtype=torch.bfloat16)
    x, parameters = torch.randn(24, 16, 64, device="cuda", dtype=torch.bfloat16), list(lstm.parameters())
    with fastlstm.use_backend("native"):
        expected = lstm(x)[0]
        torch.autograd.grad(expected.sum(), parameters)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lstm(x)[0]
            grads = torch.autograd.grad(y.sum(), parameters)
    first = []
    for _ in range(10):
        y.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        first = first or [grad.clone() for grad in grads]
        assert all(map(torch.equal, grads, first))
