"""The `native` backend: the C++/CUDA extension fastlstm._C (csrc/), loaded here and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ..ops import register
from ..ops.schema import LayerCall

NAME = "native"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BUILT_FOR = rb"fastlstm\._C was built for torch ([^\0 ]+)(?: with CUDA ([^\0]+))?\0"  # csrc/built_for.cpp

extension: ModuleType | None = None
devices: tuple[str, ...] = ()


def _why_not_loaded() -> str:
    """Return why the extension must not be loaded into this process, "" if it may. Reads the file, loads nothing.

    torch's C++ ABI changes between versions: an extension built for another version may load and crash later.
    """
    spec = importlib.util.find_spec("fastlstm._C")
    if spec is None or spec.origin is None:
        return "it was not built"
    with open(spec.origin, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(BUILT_FOR, content)  # type: ignore[arg-type, call-overload]
        if found is None:
            return "it does not say which torch it was built for"
        built, cuda = (group.decode() for group in found.groups(b""))
    if built.split("+")[0] != torch.__version__.split("+")[0]:  # what follows the + names the variant: cpu, cu130
        return f"it was built for torch {built} and this is torch {torch.__version__}"
    if cuda and cuda != torch.version.cuda:
        return f"it was built for torch {built} with CUDA {cuda} and this is torch {torch.__version__}"
    return ""


register.define(NAME)  # the schemas first: the extension attaches its kernels to them
load_error = _why_not_loaded()
if not load_error:
    try:
        extension = importlib.import_module("fastlstm._C")
        devices = tuple(extension.devices())  # asked once: torch.compile cannot trace a call into the extension
    except ImportError as error:
        load_error = str(error)


def set_persistent(on: bool, tier: str = "") -> None:
    """Turn the persistent CUDA kernels on or off, for every later call of the process; they are on by default.

    If on, float16, bfloat16 and float32 at TF32 precision run many steps in one launch where the layer fits the GPU
    and this is predicted to be faster (`fastlstm.explain` tells); everything else runs step by step. Experimental, for
    measurements and tests (docs/gpu-kernels.md).

    Args:
        on: whether to use them.
        tier: "A" (cluster variant), "B" (grid variant), "D" (grid variant with data flags) or "S" (single-block
            variant, for H up to 128 in 16 bits): use this one wherever the layer fits, whatever is predicted; "" for
            the faster of "A" and "B" ("D" and "S" have not been measured).

    Raises:
        RuntimeError: the extension was built without CUDA, or there is no such tier.

    Example:
        >>> from fastlstm.backends import native
        >>> native.set_persistent(False)
        >>> if "cuda" in native.devices:
        ...     native.set_persistent(True)
    """
    if on and "cuda" not in devices:
        raise RuntimeError(f"fastlstm._C must be built for cuda, got {', '.join(devices) or load_error}")
    if extension is not None:
        extension.enable_persistent(on, tier)


def kernels(call: LayerCall, B: int) -> str:
    """Tell which CUDA kernels run `call` of B rows on this backend, and why; "" on other devices.

    Planned from the device's sizes; the plan may change if the runtime has room for fewer clusters.
    """
    if extension is None or call.device.type != "cuda":
        return ""
    if call.variant:
        return f"step by step: {call.variant} is not implemented in the persistent kernels"
    if not extension.persistent_enabled():
        return "step by step: persistent kernels were turned off (fastlstm.backends.native.set_persistent)"
    gpu = torch.cuda.get_device_properties(call.device)
    sms = gpu.multi_processor_count if gpu.major >= 8 else 0
    phases = []
    for phase in ("forward", "backward"):
        reason, layout, description = extension.persistent_plan(
            phase, call.shape.H, call.shape.P, B, call.shape.D, _element(call.dtype), sms,
            gpu.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            16 if gpu.major >= 9 else 0,  # max CTAs of a cluster, as in csrc/cuda/device.cpp
            extension.persistent_tier(),
        )  # fmt: skip
        groups = f"{'clusters' if layout['cluster'] else 'groups'} of {layout['ctas_per_group']} CTAs"
        groups = "single CTAs" if layout["single"] else groups
        phases.append(f"{phase} step by step: {reason}" if reason else f"{phase} in {groups} ({description})")
    return f"persistent from 4 steps on: {'; '.join(phases)}"


def cpu_plan(
    call: LayerCall,
    T: int,
    B: int,
    lengths: Sequence[int] | None = None,
    packed: bool = False,
    h0: bool = False,
    cell: bool = False,
    frozen: str = "no",
    **machine: Any,
) -> dict[str, dict[str, Any]]:
    """How the CPU kernels run `call`: what they decide about "forward" and "backward", by name, and in words as "text".

    {} on other devices and for empty batches. csrc/cpu/plan.h has the plan, csrc/python_plan.cpp the names.

    Args:
        lengths: of the B rows; None if all have T steps.
        packed: rows of x past the lengths are absent.
        h0: an initial state is given.
        cell: LSTMCell makes the call.
        frozen: the form of weights packed before the call, "stored", "bfloat16" or "int8"; there is no backward then.
        machine: threads, and names of `cpu_machine()`, that differ from what a call would find here.
    """
    if extension is None or call.device.type != "cpu" or T < 1 or B < 1:
        return {}
    found = {"threads": torch.get_num_threads(), **extension.cpu_machine(), **machine}
    dtype = str(torch.float32 if call.dtype == torch.float16 else call.dtype).removeprefix("torch.")
    H, P, D = call.shape.H, call.shape.P, call.shape.D
    mkldnn = torch.backends.mkldnn
    flag = mkldnn.rnn.fp32_precision  # type: ignore[attr-defined]
    bf16_requested = call.dtype == torch.float32 and mkldnn.enabled and flag == "bf16"
    if cell and frozen == "no" and call.dtype in (torch.float32, torch.float64):
        machine = {name: found[name] for name in ("threads", "l2_bytes", "vector_bytes")}
        return extension.cpu_cell_plan(dtype, B, call.I, H, **machine)
    return extension.cpu_plan(
        dtype, T, B, call.I, H, P, D,
        lengths=None if lengths is None else list(lengths), packed=packed, resets=call.reset_mask, h0=h0,
        frozen=frozen, norm=call.shape.norm, bf16_requested=bf16_requested, **found,
    )  # fmt: skip


def _element(dtype: torch.dtype) -> int:
    """Bytes of an element that tensor cores multiply, 0 where they do not: float32 follows nn.LSTM's precision."""
    if dtype == torch.float32:
        cuda = torch.backends.cudnn.rnn if torch.backends.cudnn.enabled else torch.backends.cuda.matmul
        return 4 if cuda.fp32_precision == "tf32" else 0  # type: ignore[attr-defined]
    return 2 if dtype in (torch.float16, torch.bfloat16) else 0


def supports(call: LayerCall) -> str | None:
    """None when this backend can run `call`, else why not, in words a user can act on."""
    if extension is None:
        return (
            f"the extension fastlstm._C is not available: {load_error}; install fastlstm again, with this torch and a "
            "C++ compiler at hand: pip install --no-build-isolation ."
        )
    if call.device.type not in devices:
        return f"fastlstm._C was built for {', '.join(devices)} tensors, got {call.device.type}"
    if call.dtype not in DTYPES:
        return f"dtype must be one of {', '.join(map(str, DTYPES))}, got {call.dtype}"
    return None
