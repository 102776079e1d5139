"""The persistent kernels in CUDA graphs beyond one plain capture, which tests/gpu/test_gpu_execution.py has.

Not run on a GPU yet. RNN-T decoders have a cooperative kernel in a conditional node.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastlstm
from fastlstm.backends import native

from .conditional_graph import ConditionalGraph, NodeParams
from .gpu_support import gpu

on_gpu = [
    *gpu,
    pytest.mark.skipif("cuda" not in native.devices, reason=f"fastlstm._C: {native.devices or native.load_error}"),
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# H of the cluster and grid variants on an H100.
SIZES = pytest.mark.parametrize("H", [128, 1024])


def marked(test):
    for mark in on_gpu:
        test = mark(test)
    return test


def layer(H: int) -> tuple[fastlstm.LSTM, torch.Tensor]:
    torch.manual_seed(0)
    return (
        fastlstm.LSTM(64, H, device="cuda", dtype=torch.bfloat16),
        torch.randn(24, 16, 64, device="cuda", dtype=torch.bfloat16),
    )


FIRST_CALL = """
import sys, torch, fastlstm
H = int(sys.argv[1])
lstm = fastlstm.LSTM(64, H, device="cuda", dtype=torch.bfloat16)
x = torch.randn(24, 16, 64, device="cuda", dtype=torch.bfloat16)
(x[0] @ x[0].mT).sum().item()  # loads cuBLAS, which is not allowed within a capture
graph = torch.cuda.CUDAGraph()
with fastlstm.use_backend("native"):
    with torch.cuda.graph(graph):
        y = lstm(x)[0]
        grads = torch.autograd.grad(y.sum(), list(lstm.parameters()))
    graph.replay()
    expected = lstm(x)[0]
    wanted = torch.autograd.grad(expected.sum(), list(lstm.parameters()))
torch.cuda.synchronize()
assert torch.equal(y, expected), float((y - expected).abs().max())
for got, grad in zip(grads, wanted, strict=True):
    assert float((got - grad).abs().max()) <= 0.05 * float(grad.abs().max())
print("replayed")
"""


@marked
@SIZES
def test_first_call_of_a_process_inside_a_capture(H):
    """One-time work, such as loading kernels and querying occupancy, may happen within a capture."""
    ran = subprocess.run([sys.executable, "-c", FIRST_CALL, str(H)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "replayed" in ran.stdout


@marked
@SIZES
def test_two_branches_of_a_graph(H):
    """Concurrent cooperative kernels: each gets all its blocks or waits."""
    lstm, x = layer(H)
    other = x.flip(0).contiguous()
    with torch.no_grad(), fastlstm.use_backend("native"):
        expected = lstm(x)[0].clone(), lstm(other)[0].clone()
        torch.cuda.synchronize()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                second = lstm(other)[0]
            first = lstm(x)[0]
            torch.cuda.current_stream().wait_stream(side)
        for _ in range(20):
            first.fill_(float("nan")), second.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(first, expected[0])
            assert torch.equal(second, expected[1])


@marked
@SIZES
@pytest.mark.parametrize("taken", [True, False])
def test_capture_in_a_conditional_node(H, taken):
    lstm, x = layer(H)
    with torch.no_grad(), fastlstm.use_backend("native"):
        expected = lstm(x)[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            y = lstm(x)[0]
        inside = ConditionalGraph(graph, taken)
        for _ in range(5):
            y.fill_(3)
            inside.launch()
            torch.cuda.synchronize()
            assert torch.equal(y, expected if taken else torch.full_like(y, 3))


def test_node_parameters_have_the_runtimes_layout():
    """cudaGraphNodeParams of driver_types.h: the union at 16, 232 bytes of it, and a reserved word."""
    import ctypes

    assert ctypes.sizeof(NodeParams) == 256
    assert (NodeParams.handle.offset, NodeParams.condition.offset, NodeParams.size.offset) == (16, 24, 28)
    assert (NodeParams.bodies.offset, NodeParams.reserved2.offset) == (32, 248)
