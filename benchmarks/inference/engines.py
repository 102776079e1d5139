"""The engines that are measured (`ENGINES`): a layer with fixed weights, its calls bound to tensors beforehand.

`Engine.build` gives a `Layer`, `Layer.bind` a call without arguments. So each engine prepares what it can: frozen
modules and sessions pack the weights, runtimes read and write buffers they know.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.cases import Case
from benchmarks.inference.onnx_model import constant_bytes, onnx_model, quantized
from benchmarks.measure import Runnable

Outputs = tuple[Tensor, Tensor, Tensor]
States = tuple[Tensor, Tensor]
Setting = dict[str, Any]


class Call(Protocol):
    """A layer bound to its arguments."""

    run: Runnable  # one call

    def outputs(self) -> Outputs:
        """(output, h_n, c_n) of the last run."""
        ...


class Layer(Protocol):
    """A layer in an engine, ready to run."""

    weight_bytes: int  # what stays in memory for the weights, biases and scales

    def bind(self, x: Tensor, hx: States | None, carry: bool = False) -> Call:
        """Bind x [T, B, I] and the states, given in streaming cases; `carry` feeds each call's states to the next."""
        ...


class ModuleCall:
    """A call of an nn.LSTM or of anything that is called like one."""

    def __init__(self, module: nn.Module, x: Tensor, hx: States | None, carry: bool) -> None:
        self.module, self.x, self.hx = module, x, hx
        self.run = self._carrying if carry else self._run

    def _run(self) -> None:
        self.result = self.module(self.x, self.hx)

    def _carrying(self) -> None:
        self.result = self.module(self.x, self.hx)
        self.hx = self.result[1]

    def outputs(self) -> Outputs:
        output, (h_n, c_n) = self.result
        return output, h_n, c_n


class WritingCall:
    """A call of a frozen module that writes into tensors made beforehand (`out`); carried states in place."""

    def __init__(self, module: nn.Module, x: Tensor, hx: States | None, carry: bool) -> None:
        output, (h_n, c_n) = module(x, hx)
        if carry:
            hx = h_n, c_n = tuple(t.clone() for t in hx)
        self.run = partial(module, x, hx, out=(output, (h_n, c_n)))
        self._outputs = (output, h_n, c_n)

    def outputs(self) -> Outputs:
        return self._outputs


class ModuleLayer:
    """A module of torch's kind; `out`: its calls write into given tensors."""

    def __init__(self, module: nn.Module, weight_bytes: int | None = None, out: bool = False) -> None:
        self.module, self.out = module.eval(), out
        tensors = itertools.chain(module.parameters(), module.buffers())
        self.weight_bytes = sum(t.nbytes for t in tensors) if weight_bytes is None else weight_bytes

    def bind(self, x: Tensor, hx: States | None, carry: bool = False) -> Call:
        return (WritingCall if self.out else ModuleCall)(self.module, x, hx, carry)


class BufferCall:
    """A call of a runtime that reads and writes given buffers. Carried states alternate between two sets of them."""

    def __init__(self, layer: BufferLayer, x: Tensor, hx: States | None, carry: bool) -> None:
        first = {"x": x.numpy()} | (dict(zip(("h0", "c0"), (t.numpy().copy() for t in hx), strict=True)) if hx else {})
        self.inputs = [first]  # kept, as the runtimes do not own the memory of the arrays
        self.buffers = [_empty_outputs(layer.case)]
        requests = [layer.request(first, self.buffers[0])]
        if carry:
            written = self.buffers[0]
            self.buffers.append({"output": np.empty_like(written["output"]), "h_n": first["h0"], "c_n": first["c0"]})
            self.inputs.append({"x": first["x"], "h0": written["h_n"], "c0": written["c_n"]})
            requests.append(layer.request(self.inputs[1], self.buffers[1]))
        self.turns = itertools.cycle(zip(requests, self.buffers, strict=True))

    def run(self) -> None:
        request, self.written = next(self.turns)
        request()

    def outputs(self) -> Outputs:
        return tuple(torch.from_numpy(self.written[name]) for name in ("output", "h_n", "c_n"))


def _empty_outputs(case: Case) -> dict[str, np.ndarray]:
    states = (case.L * case.D, case.B, case.H)
    shapes = {"output": (case.T, case.B, case.D * case.H), "h_n": states, "c_n": states}
    return {name: np.empty(shape, np.float32) for name, shape in shapes.items()}


class BufferLayer:
    """A runtime's model; `request` gives its call on input and output buffers, by name."""

    case: Case
    weight_bytes: int

    def request(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Runnable:
        raise NotImplementedError

    def bind(self, x: Tensor, hx: States | None, carry: bool = False) -> Call:
        return BufferCall(self, x, hx, carry)


class OnnxRuntimeLayer(BufferLayer):
    """onnxruntime. IOBinding to buffers made beforehand takes 0.009 ms where run() with arrays takes 0.015 (H = 64)."""

    def __init__(
        self, case: Case, weights: dict[str, Tensor], threads: int, spinning: bool, per_channel: bool | None = None
    ) -> None:
        """per_channel: None for float32, otherwise dynamic int8 with a scale per row of the weights or per matrix."""
        import onnxruntime

        model = onnx_model(case, weights)
        if per_channel is not None:
            model = quantized(model, per_channel)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        self.case, self.weight_bytes = case, constant_bytes(model)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def request(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Runnable:
        binding, run = self.session.io_binding(), self.session.run_with_iobinding
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self.value(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, self.value(array))
        return lambda: run(binding)


class OpenVinoLayer(BufferLayer):
    """openvino, one infer request with its tensors set.

    Float32 only: it converts compressed int8 weights of an LSTM back to float32 when it compiles, and runs a quantized
    (FakeQuantize) one in float32 as well, in the same time (openvino 2026.4).
    """

    def __init__(self, case: Case, weights: dict[str, Tensor], threads: int) -> None:
        import openvino

        model = onnx_model(case, weights)
        self.case, self.weight_bytes, self.tensor = case, constant_bytes(model), openvino.Tensor
        core = openvino.Core()
        self.compiled = core.compile_model(
            core.read_model(io.BytesIO(model.SerializeToString())),
            "CPU",
            {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
        )

    def request(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Runnable:
        request = self.compiled.create_infer_request()
        for name, array in (inputs | outputs).items():
            request.set_tensor(name, self.tensor(array, shared_memory=True))
        return lambda: request.infer(share_outputs=True)


def _lstm(case: Case, weights: dict[str, Tensor], kind: type[nn.LSTM] = nn.LSTM) -> nn.LSTM:
    module = kind(case.I, case.H, case.L, bidirectional=case.bidirectional)
    module.load_state_dict(weights)
    return module.requires_grad_(False).eval()


def _nn(case: Case, weights: dict[str, Tensor], threads: int) -> Layer:
    return ModuleLayer(_lstm(case, weights))


def _fastlstm(case: Case, weights: dict[str, Tensor], threads: int) -> Layer:
    return ModuleLayer(_lstm(case, weights, fastlstm.LSTM))


def _frozen(dtype: torch.dtype | None) -> Callable[..., Layer]:
    def build(case: Case, weights: dict[str, Tensor], threads: int, out: bool) -> Layer:
        return ModuleLayer(fastlstm.freeze(_lstm(case, weights, fastlstm.LSTM), weights=dtype), out=out)

    return build


def _torch_int8(case: Case, weights: dict[str, Tensor], threads: int, kernels: str) -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated; torchao has no LSTM
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, kernels
        try:
            model = nn.Sequential(_lstm(case, weights))
            module = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)[0]
        finally:
            torch.backends.quantized.engine = before
    tensors = (*module.get_weight().values(), *module.get_bias().values())
    return ModuleLayer(module, sum(t.numel() * t.element_size() for t in tensors))


@dataclass(frozen=True)
class Engine:
    """One engine. The settings are tried in every case, and the fastest one is measured."""

    title: str
    weights: str  # float32, bfloat16 or int8
    build_with: Callable[..., Layer]
    settings: tuple[Setting, ...] = ({},)
    packages: tuple[str, ...] = ()
    ours: bool = False  # a wrong result of ours fails the run; another's is reported

    def missing(self) -> str | None:
        """None if the engine can run, otherwise the reason."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed (pip install 'fastlstm[benchmarks]')" if absent else None

    def build(self, case: Case, weights: dict[str, Tensor], threads: int, setting: Setting) -> Layer:
        return self.build_with(case, weights, threads, **setting)

    def version(self) -> str:
        """Name and version of the package that runs it; "" for torch and fastlstm, which have columns of their own."""
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages[:1])


# ONNX Runtime's threads spin this long after a call: longer than the gap to the next one, so that calls one after the
# other are as fast as by default, and not for the 40 ms and more of the default, in which OpenVINO's next calls took
# 1.2 instead of 0.75 ms and torch.ao's 0.5 instead of 0.27 ms (T=1 B=1 I=H=1024, the Xeon below).
SPIN_US = 2000
# A pool that spins between calls wakes sooner: 2.9 instead of 4.6 ms at T=50 B=1 I=H=512 (onnxruntime 1.32, two threads
# of a Xeon with AVX-512). With little work per call it may be slower.
SPINNING: tuple[Setting, ...] = ({"spinning": True}, {"spinning": False})
PER_CHANNEL: tuple[Setting, ...] = tuple({**s, "per_channel": c} for s in SPINNING for c in (True, False))
# Into given tensors, as the runtimes' calls, or into new ones.
OUT: tuple[Setting, ...] = ({"out": True}, {"out": False})
KERNELS: tuple[Setting, ...] = tuple({"kernels": name} for name in ("x86", "onednn"))

ENGINES: dict[str, Engine] = {
    "nn": Engine("nn.LSTM", "float32", _nn),
    "fastlstm": Engine("fastlstm.LSTM", "float32", _fastlstm, ours=True),
    "frozen": Engine("frozen", "float32", _frozen(None), OUT, ours=True),
    "frozen_bf16": Engine("frozen bfloat16", "bfloat16", _frozen(torch.bfloat16), OUT, ours=True),
    "frozen_int8": Engine("frozen int8", "int8", _frozen(torch.int8), OUT, ours=True),
    "ort": Engine("ONNX Runtime", "float32", OnnxRuntimeLayer, SPINNING, ("onnxruntime", "onnx")),
    "openvino": Engine("OpenVINO", "float32", OpenVinoLayer, packages=("openvino", "onnx")),
    "ort_int8": Engine("ONNX Runtime int8", "int8", OnnxRuntimeLayer, PER_CHANNEL, ("onnxruntime", "onnx")),
    "torch_int8": Engine("torch.ao int8", "int8", _torch_int8, KERNELS),
}
# The fastest of these is what our engines are compared with, by the dtype of the weights.
COMPARED_WITH = {"float32": ("ort", "openvino"), "bfloat16": ("ort", "openvino"), "int8": ("ort_int8", "torch_int8")}


def installed() -> dict[str, Engine]:
    """The engines that can run here."""
    return {name: engine for name, engine in ENGINES.items() if engine.missing() is None}


def missing() -> list[str]:
    """One line for each reason why an engine cannot run here."""
    reasons: dict[str, list[str]] = {}
    for engine in ENGINES.values():
        if reason := engine.missing():
            reasons.setdefault(reason, []).append(engine.title)
    return [f"without {' and '.join(titles)}: {reason}" for reason, titles in reasons.items()]
