"""Execution on the GPU: graphs, streams, devices, determinism, no host synchronization, memory."""

from __future__ import annotations

import threading

import pytest
import torch

import fastlstm

from ..cases import Case
from .gpu_support import (
    BFLOAT16,
    HALF,
    IEEE,
    TF32,
    Arithmetic,
    backends,
    cudnn,
    gpu,
    on_device,
    ours,
    require,
    run,
    same,
    with_gradients,
)

pytestmark = gpu

# MIXED is torch's default: TF32 in RNNs, IEEE in other GEMMs.
MIXED = Arithmetic(torch.float32, "tf32", "ieee")
STACKED = Case(T=12, B=9, I=16, H=64, hx="tuple", bidirectional=True, layers=2, proj=16, cells=True)
CASES = (
    Case(T=12, B=9, I=16, H=64, hx="tuple"),
    STACKED,
    Case(T=12, B=9, I=16, H=64, bidirectional=True, lengths=(12, 0, 3, 7, 12, 1, 9, 4, 5), resets=((3, 0), (5, 3))),
    Case(T=1, B=9, I=16, H=64, hx="tuple"),
)
# Long enough for several chunks of x W_ih^T and of dgates (csrc/cuda/layer.h).
LONG = Case(T=700, B=64, I=128, H=512, bidirectional=True)


@backends
@pytest.mark.parametrize("precision", [IEEE, TF32, MIXED, HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_capture(case, precision, backend):
    """Forward and backward in one CUDA graph; a replay on new inputs equals an eager run."""
    case = case.to(precision.dtype)
    require(backend, case)
    case_tensors = on_device(case, precision.dtype)
    call = ours(case, case_tensors)
    with precision.flags(), fastlstm.use_backend(backend):
        first = with_gradients(case, case_tensors, call)
        arriving = {name: torch.ones_like(first[name]) for name in ("output", "h_n", "c_n")}
        leaves = case_tensors.grad_leaves()

        def step():
            results = call()
            grads = torch.autograd.grad([results[n] for n in arriving], list(leaves.values()), list(arriving.values()))
            return [*(results[n].detach() for n in arriving), *grads]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.copy_(leaf.nan_to_num() * 0.5 + 0.01)
        graph.replay()
        plain = step()
    torch.cuda.synchronize()
    names = [*arriving, *(f"d {name}" for name in leaves)]
    eps = precision.eps
    for name, a, b in zip(
        names, captured, plain, strict=True
    ):  # a capture may use another workspace, and so another order of sums
        assert float((a.double() - b.double()).abs().max()) <= 8 * eps * float(b.double().abs().max()), name


@backends
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("H", [64, 300])
def test_torch_compile(H, mode, backend):
    """One graph without a break, also as a CUDA graph, equals an eager call, forward and backward."""
    case = Case(T=12, B=9, I=16, H=H, bidirectional=True, dtype=torch.bfloat16)
    require(backend, case)
    case_tensors = on_device(case, torch.bfloat16)
    module = case.module(fastlstm.LSTM, case_tensors.weights)
    leaves = list(case_tensors.grad_leaves().values())

    def step(f):
        output = f(case_tensors.input)[0]
        return [output.detach().clone(), *torch.autograd.grad(output.square().mean(), leaves)]

    with fastlstm.use_backend(backend):
        plain = step(module)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, mode=mode)
        for _ in range(3):  # a CUDA graph is recorded on the second call, replayed on the third
            torch.compiler.cudagraph_mark_step_begin()
            results = [t.clone() for t in step(compiled)]
    torch._dynamo.reset()
    for a, b in zip(results, plain, strict=True):
        assert float((a - b).abs().max()) <= 8 * BFLOAT16.eps * float(b.abs().max())


@backends
@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
@pytest.mark.parametrize("precision", [IEEE, MIXED, BFLOAT16], ids=str)
def test_determinism(case, precision, backend):
    """Ten runs are bitwise equal."""
    case = case.to(precision.dtype)
    require(backend, case)
    first = run(case, precision, backend)
    for _ in range(9):
        same(run(case, precision, backend), first)


@backends
@pytest.mark.parametrize("precision", [IEEE, MIXED, BFLOAT16], ids=str)
def test_two_streams(precision, backend):
    """Two concurrent calls on two streams share no buffer and use the current stream only."""
    cases = [Case(T=60, B=16, I=64, H=256, dtype=precision.dtype, seed=seed, bidirectional=True) for seed in (1, 2)]
    for case in cases:
        require(backend, case)
    expected = [run(case, precision, backend) for case in cases]
    case_tensors = [on_device(case, precision.dtype) for case in cases]
    calls = [ours(case, g) for case, g in zip(cases, case_tensors, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    with precision.flags(), fastlstm.use_backend(backend):
        for _ in range(5):
            results = []
            for case, g, call, stream in zip(cases, case_tensors, calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(100_000)
                    results.append(with_gradients(case, g, call))
            torch.cuda.synchronize()
            for got, value in zip(results, expected, strict=True):
                same(got, value)


@backends
def test_two_threads(backend):
    """Threads with separate streams: precision flags are read and never set."""
    case = Case(T=30, B=16, I=64, H=128)
    require(backend, case)
    expected = run(case, MIXED, backend)
    collected, failed = {}, []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                case_tensors = on_device(case, torch.float32)
                torch.cuda.current_stream().synchronize()
                for _ in range(20):
                    collected[index] = with_gradients(case, case_tensors, ours(case, case_tensors))
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    with MIXED.flags(), fastlstm.use_backend(backend):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for results in collected.values():
        same(results, expected)


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, there are {torch.cuda.device_count()}")
@pytest.mark.parametrize("precision", [IEEE, MIXED, BFLOAT16], ids=str)
def test_two_devices(precision, backend):
    """A call runs on its tensors' device, not on the current one."""
    case = STACKED.to(precision.dtype)
    require(backend, case)
    with torch.cuda.device(0):
        first = run(case, precision, backend, "cuda:0")
        second = run(case, precision, backend, "cuda:1")
        assert torch.cuda.current_device() == 0
    assert second["output"].device == torch.device("cuda:1")
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        same(first, second)


@backends
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", [IEEE, MIXED, BFLOAT16], ids=str)
def test_no_host_synchronization(case, precision, backend):
    case = case.to(precision.dtype)
    require(backend, case)
    case_tensors = on_device(case, precision.dtype)
    call = ours(case, case_tensors)
    with precision.flags(), fastlstm.use_backend(backend):
        with_gradients(case, case_tensors, call)  # one-time work, such as loading cuBLAS
        leaves = list(case_tensors.grad_leaves().values())
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = call()
            used = list(results.values())
            torch.autograd.grad(used, leaves, [torch.ones_like(r) for r in used])
            with torch.no_grad():
                call()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@backends
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("precision", [IEEE, TF32, HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=256, B=64, I=512, H=1024),
        Case(T=256, B=64, I=512, H=512, layers=2, bidirectional=True),
        Case(T=1024, B=16, I=256, H=256),
    ],
    ids=str,
)
def test_memory(case, precision, training, backend):
    """Peak memory of a training step and of inference is at most 1.1 times nn.LSTM's."""
    case = case.to(precision.dtype)
    require(backend, case)
    peaks = {}
    for kind, make in (("ours", ours), ("theirs", cudnn)):
        case_tensors = on_device(case, precision.dtype)
        call = make(case, case_tensors)
        leaves = list(case_tensors.grad_leaves().values())

        def step(call=call, leaves=leaves):
            if not training:
                with torch.no_grad():
                    return call()
            return torch.autograd.grad(call()["output"].sum(), leaves)

        with precision.flags(), fastlstm.use_backend(backend):
            step()  # cuBLAS's and cuDNN's workspaces stay
            torch.cuda.synchronize()
            resting = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
        peaks[kind] = torch.cuda.max_memory_allocated() - resting
    assert peaks["ours"] <= 1.1 * peaks["theirs"], {kind: f"{peak / 2**20:.1f} MiB" for kind, peak in peaks.items()}
