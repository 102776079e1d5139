"""The `triton` backend: portable fused kernels for CUDA, ROCm and XPU tensors (docs/triton.md).

Importing this costs nothing: Triton itself is imported at the first call. Triton's interpreter (TRITON_INTERPRET=1)
runs the kernels on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ...ops import register
from ...ops.schema import LayerCall

NAME = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cuda", "xpu")
MAX_H = 23_170  # 4 * H * H, an offset into W_hh, is an int32 in the kernels
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def supports(call: LayerCall) -> str | None:
    """None when this backend can run `call`, else why not, in words a user can act on."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if call.device.type not in DEVICES and not (INTERPRETED and call.device.type == "cpu"):
        return (
            f"Triton runs on {' and '.join(DEVICES)} tensors (and on cpu in its interpreter, TRITON_INTERPRET=1), "
            f"got {call.device.type}"
        )
    if call.device.type == "cuda" and _too_old(call.device):
        return "Triton needs compute capability 8.0 or later"
    if call.dtype not in DTYPES:
        return f"dtype must be one of {', '.join(map(str, DTYPES))}, got {call.dtype}"
    if call.variant:
        return f"{call.variant} is not implemented in Triton"
    if call.shape.proj:
        return "proj_size > 0 is not implemented in Triton"
    if call.shape.H > MAX_H:
        return f"hidden_size must be at most {MAX_H} in Triton, got {call.shape.H}"
    return None


def _too_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


# All that torch.compiler.assume_constant_result does, which would import the compiler, and Triton with it.
setattr(_too_old, "_dynamo_marked_constant", True)  # noqa: B010


def _forward(*args):
    from . import launch

    return launch.forward(*args)


def _backward(*args):
    from . import launch

    return launch.backward(*args)


register.define(NAME, _forward, _backward)
