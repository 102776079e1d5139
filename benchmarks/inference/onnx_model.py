"""The ONNX model of an nn.LSTM, one LSTM operator per layer, built from the weights: `onnx_model` and `quantized`."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case

if TYPE_CHECKING:
    import onnx

OPSET = 17
IR_VERSION = 8  # of opset 17; onnx writes its newest version, which older runtimes refuse
# ONNX stacks the gates as i, o, f, c; nn.LSTM as i, f, g, o, where g is ONNX's c.
IOFC = (0, 3, 1, 2)


def onnx_model(case: Case, weights: dict[str, Tensor]) -> onnx.ModelProto:
    """Build the model of a float32 case. T and B are fixed: no runtime is slower for it.

    Inputs: x [T, B, I]; h0, c0 [L*D, B, H] in a streaming case. Outputs: output [T, B, D*H]; h_n, c_n [L*D, B, H].
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    T, B, D, H, L = case.T, case.B, case.D, case.H, case.L
    streaming = case.kind == "stream"
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))

    if L == 1:
        states_in, states_out = [["h0", "c0"]], [["h_n", "c_n"]]
    else:
        states_in = [[f"h0_l{k}", f"c0_l{k}"] for k in range(L)]
        states_out = [[f"h_n_l{k}", f"c_n_l{k}"] for k in range(L)]
    if streaming and L > 1:
        for name, parts in zip(("h0", "c0"), zip(*states_in, strict=True), strict=True):
            node("Split", [name], list(parts), axis=0)
    constant("merged", np.array([1]) if D == 1 else np.array([T, B, D * H]))
    y = "x"
    for k in range(L):
        parameters = [constant(f"{n}_l{k}", value) for n, value in zip("WRB", _layer(case, weights, k), strict=True)]
        optional = ["", *states_in[k]] if streaming else []  # "" stands for the lengths
        direction = "bidirectional" if D == 2 else "forward"
        node("LSTM", [y, *parameters, *optional], [f"Y_l{k}", *states_out[k]], hidden_size=H, direction=direction)
        # From [T, D, B, H] to nn.LSTM's [T, B, D*H].
        y = "output" if k == L - 1 else f"output_l{k}"
        if D == 1:
            node("Squeeze", [f"Y_l{k}", "merged"], [y])
        else:
            node("Transpose", [f"Y_l{k}"], [f"Z_l{k}"], perm=[0, 2, 1, 3])
            node("Reshape", [f"Z_l{k}", "merged"], [y])
    if L > 1:
        for name, parts in zip(("h_n", "c_n"), zip(*states_out, strict=True), strict=True):
            node("Concat", list(parts), [name], axis=0)

    def tensor(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [tensor("x", T, B, case.I)] + [tensor(name, L * D, B, H) for name in ("h0", "c0") if streaming]
    outputs = [tensor("output", T, B, D * H), tensor("h_n", L * D, B, H), tensor("c_n", L * D, B, H)]
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(model, full_check=True)
    return model


def _layer(case: Case, weights: dict[str, Tensor], layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(W [D, 4H, I], R [D, 4H, H], B [D, 8H]) of ONNX's LSTM operator."""
    suffixes = [f"_l{layer}" + ("_reverse" if d else "") for d in range(case.D)]

    def stacked(name: str) -> np.ndarray:
        blocks = [weights[name + suffix].chunk(4) for suffix in suffixes]
        return torch.stack([torch.cat([gates[k] for k in IOFC]) for gates in blocks]).numpy()

    return stacked("weight_ih"), stacked("weight_hh"), np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)


def quantized(model: onnx.ModelProto, per_channel: bool) -> onnx.ModelProto:
    """ONNX Runtime's dynamic int8 of a model, DynamicQuantizeLSTM; the weights have a scale per row or one per matrix.

    Without VNNI, int8 products saturate in 16 bits, which 7-bit weights avoid (reduce_range) at a larger error.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = copy.deepcopy(model)  # quantize_dynamic changes its argument
    logging.disable(logging.WARNING)  # of a preparation that this model does not need
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            reduce_range = not torch.cpu._is_vnni_supported()
            quantize_dynamic(model, path, per_channel=per_channel, reduce_range=reduce_range)
            result = onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)
    if any(node.op_type == "LSTM" for node in result.graph.node):
        raise RuntimeError("quantize_dynamic left an LSTM in float32")
    return result


def constant_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the constants of a model: weights, biases, scales."""
    from onnx import numpy_helper

    return sum(numpy_helper.to_array(constant).nbytes for constant in model.graph.initializer)
