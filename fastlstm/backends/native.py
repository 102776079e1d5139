"""The `native` backend: the C++/CUDA extension fastlstm._C (csrc/), loaded here and nowhere else."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..ops import register
from ..ops.schema import LayerCall

NAME = "native"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

extension: ModuleType | None = None
devices: tuple[str, ...] = ()
load_error = ""

try:
    register.define(NAME)  # the schemas first: the extension attaches its kernels to them
    extension = importlib.import_module("fastlstm._C")
    devices = tuple(extension.devices())  # asked once: torch.compile cannot trace a call into the extension
except ImportError as error:  # not built, or built for another torch
    load_error = str(error)


def supports(call: LayerCall) -> str | None:
    """None when this backend can run `call`, else why not, in words a user can act on."""
    if extension is None:
        return (
            f"the extension fastlstm._C is not available ({load_error}); install fastlstm with a C++ compiler at hand: "
            "pip install --no-build-isolation ."
        )
    if call.device.type not in devices:
        return f"fastlstm._C was built for {', '.join(devices)} tensors, got {call.device.type}"
    if call.dtype not in DTYPES:
        return f"dtype must be one of {', '.join(map(str, DTYPES))}, got {call.dtype}"
    return None
