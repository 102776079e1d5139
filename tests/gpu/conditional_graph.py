"""A captured CUDA graph inside a conditional node, by CUDA runtime functions that torch does not wrap."""

from __future__ import annotations

import ctypes

import torch

CONDITIONAL, IF, ASSIGN_DEFAULT = (
    13,
    0,
    1,
)  # cudaGraphNodeTypeConditional, cudaGraphCondTypeIf, cudaGraphCondAssignDefault


class NodeParams(ctypes.Structure):
    """cudaGraphNodeParams with the union's member `conditional`: 256 bytes."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("reserved0", ctypes.c_int * 3),
        ("handle", ctypes.c_ulonglong),
        ("condition", ctypes.c_int),
        ("size", ctypes.c_uint),
        ("bodies", ctypes.POINTER(ctypes.c_void_p)),
        ("padding", ctypes.c_longlong * 26),
        ("reserved2", ctypes.c_longlong),
    ]


class ConditionalGraph:
    """`captured` (with keep_graph=True) as the body of an IF node whose condition is `taken` at every launch.

    `captured` must outlive this object, which uses the memory of its capture.
    """

    def __init__(self, captured: torch.cuda.CUDAGraph, taken: bool) -> None:
        self.runtime = ctypes.CDLL(None)  # torch has loaded libcudart
        graph, handle, node = ctypes.c_void_p(), ctypes.c_ulonglong(), ctypes.c_void_p()
        self.check("cudaGraphCreate", ctypes.byref(graph), 0)
        self.check("cudaGraphConditionalHandleCreate", ctypes.byref(handle), graph, int(taken), ASSIGN_DEFAULT)
        params = NodeParams(type=CONDITIONAL, handle=handle, condition=IF, size=1)
        # Edge data precede the number of dependencies in CUDA 12's _v2, the only signature of CUDA 13.
        add = "cudaGraphAddNode_v2" if hasattr(self.runtime, "cudaGraphAddNode_v2") else "cudaGraphAddNode"
        nothing = (None, None, ctypes.c_size_t(0))
        self.check(add, ctypes.byref(node), graph, *nothing, ctypes.byref(params))
        body = ctypes.c_void_p(params.bodies[0])
        inner = ctypes.c_void_p(captured.raw_cuda_graph())
        self.check("cudaGraphAddChildGraphNode", ctypes.byref(node), body, None, ctypes.c_size_t(0), inner)
        self.executable = ctypes.c_void_p()
        self.check("cudaGraphInstantiate", ctypes.byref(self.executable), graph, ctypes.c_ulonglong(0))

    def check(self, name: str, *arguments: object) -> None:
        status = getattr(self.runtime, name)(*arguments)
        if status != 0:
            self.runtime.cudaGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {self.runtime.cudaGetErrorString(status).decode()}")

    def launch(self) -> None:
        self.check("cudaGraphLaunch", self.executable, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
