"""Which backend runs a call, and why: `layer` runs one, `use_backend` names one, `choices` tells.

The choice rests on device, dtype and sizes of the weights, never on T or B, so that torch.compile does not specialise.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from . import reference, transforms
from .backends import BACKENDS, native
from .ops import flops
from .ops import frozen as _frozen  # noqa: F401 - defines its op
from .ops import recompute as _recompute  # noqa: F401 - defines its ops
from .ops.check import check
from .ops.modes import forward_ad_active, recording, transform_active
from .ops.schema import (
    LayerCall,
    LayerInputs,
    arguments,
)

NAMES = ("auto", *BACKENDS, "reference")
flops.register(tuple(BACKENDS))

_requested = os.environ.get("FASTLSTM_BACKEND", "auto")


class use_backend:
    """Run every later call on the backend `name`; in a `with` statement, until the block ends.

    Args:
        name: "auto" (for each call the first backend that supports it), "native", "triton", "eager" or "reference".

    Raises:
        ValueError: for an unknown name. A named backend that cannot run a call raises RuntimeError with the reason
            when called; only "auto" falls back.

    Example:
        >>> import torch, fastlstm
        >>> with fastlstm.use_backend("eager"):
        ...     output, _ = fastlstm.LSTM(8, 16)(torch.randn(5, 3, 8))
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_name(name, "backend")
        self._name, self._previous = name, _requested
        _requested = name

    def __enter__(self) -> use_backend:
        global _requested
        _requested = self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def _check_name(name: str, what: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{what} must be one of {', '.join(NAMES)}, got {name!r}")


def _supports(name: str, call: LayerCall) -> str | None:
    return None if name == "reference" else BACKENDS[name].supports(call)


def select(call: LayerCall) -> str:
    """The name of the backend that runs `call`."""
    if _requested == "auto":
        for name, backend in BACKENDS.items():
            if backend.supports(call) is None:
                return name
    _check_name(_requested, "FASTLSTM_BACKEND")
    reason = _supports(_requested, call)
    if reason is not None:
        raise RuntimeError(f"backend {_requested!r} cannot run this call: {reason}")
    return _requested


def check_native(reason: str) -> None:
    """Raise RuntimeError with the reason if a backend other than native was asked for."""
    if _requested not in ("auto", "native"):
        raise RuntimeError(f"backend {_requested!r} cannot run this call: {reason}")


def choices(call: LayerCall) -> dict[str, str]:
    """For every backend, in order of preference: "runs", or why it does not run `call`."""
    try:
        chosen, refusal = select(call), ""
    except RuntimeError as error:
        chosen, refusal = "", str(error)
    reasons = {}
    for name in NAMES[1:]:
        reason = _supports(name, call)
        if name == chosen:
            reasons[name] = "runs"
        elif reason is not None:
            reasons[name] = reason
        elif refusal or _requested != "auto":
            reasons[name] = f"can run it, but backend {_requested!r} was asked for"
        else:
            reasons[name] = f"can run it, but {chosen!r} is preferred"
    return reasons


def describe(x: Tensor, weights: list[Tensor], *options: Tensor | None) -> LayerCall:
    """What `select` needs to know of a call; the options of LayerInputs in its order."""
    return LayerCall.of(LayerInputs(x, None, None, weights, *options))


def _transforming() -> bool:
    """Return True under torch.func or forward-mode AD, for which the ops have no rule of their own."""
    return transform_active() or forward_ad_active()


# torch.compile enters the transforms it traces for real, so that the answer is a constant of the graph, and it guards
# on those it is called under. torch.compiler.assume_constant_result does this too, but imports the compiler (2 s).
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


# A choice depends on its key alone, and making it costs as much as a tiny layer. Bounded by the kinds of layer in use.
_chosen: dict[tuple[object, ...], str] = {}


def _choose(inputs: LayerInputs) -> str:
    if recording():  # sizes are tensors
        return select(LayerCall.of(inputs))
    x, weights = inputs.x, inputs.weights
    # The dimensions tell four weights with biases from four of two directions, and both from layer normalization.
    n = len(weights)
    key = (
        _requested, x.device, x.dtype, weights[0].shape, weights[1].shape, n, weights[n // 2].dim(), weights[-1].dim(),
        *map(type, inputs[4:]),  # which options are given
    )  # fmt: skip
    try:
        name = _chosen.get(key)
    except TypeError:  # sizes that are symbols have no hash
        return select(LayerCall.of(inputs))
    if name is None:
        name = _chosen[key] = select(LayerCall.of(inputs))
    return name


def layer(inputs: LayerInputs, keep_cells: bool, recompute: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and cells of one layer (fastlstm/ops/schema.py), on the backend chosen for it.

    With `recompute` > 0 only the states at intervals of that many steps are kept for backward (ops/recompute.py).
    """
    name = _choose(inputs)
    if name == "reference" or _transforming():
        check(inputs)
        # Under torch.compile the reference's ops are what a graph can hold and fuse.
        if name == "reference" or is_compiling() or transforms.plain_ops_only():
            return reference.layer(*inputs)
        return transforms.layer(name, inputs, keep_cells)
    # Whether to keep what backward reads each op decides for itself: a trace may be called in another grad mode.
    if recompute and (_any_length(inputs.x) or (torch.is_grad_enabled() and inputs.x.shape[0] > recompute)):
        op = torch.ops.fastlstm.recomputed_layer.default
        y, h_n, c_n, cells, _, _ = op(name, recompute, *arguments(inputs, keep_cells, False))
        return y, h_n, c_n, cells
    found = None
    # The shortcut around the boxed call sees no __torch_function__, of a subclass or a mode.
    if name == "native" and not (
        is_compiling() or has_torch_function((inputs.x, inputs.h0, inputs.c0, *inputs.weights))
    ):
        found = native.extension.layer(*(inputs + (keep_cells,)))  # type: ignore[union-attr] # noqa: RUF005 - faster
        if found is None:
            check(inputs)
    if found is None:
        op = getattr(torch.ops.fastlstm, f"{name}_layer").default
        found = op(*arguments(inputs, keep_cells, False))
    y, h_n, c_n, cells, _ = found
    return y, h_n, c_n, cells


def _any_length(x: Tensor) -> bool:
    """Return True if a graph for any T is recorded; a comparison would make T a constant of it."""
    return recording() or isinstance(x.shape[0], torch.SymInt)


def fast_path(module: Any, call: str, frozen_call: str | None, *args: Any) -> tuple[Any, Any]:
    """Run a whole call of LSTM or LSTMCell in the extension: (its result, None), or (None, weights) if it may not.

    For plain CPU tensors without lengths, resets, autocast, a transform or a tangent: a tiny call would spend most of
    its time in Python otherwise. Results and errors are those of functional.lstm and `layer`, which handle everything
    else, with the weights of this call, read once. call, frozen_call: names of the extension's functions, the second of
    frozen modules; None if their forward has asked the extension already. args: input, hx and of LSTM batch_sizes, None
    or those of a PackedSequence: input is then its data and the first result the output's, and the rows stay packed.
    """
    result = weights = None
    name = frozen_call if type(module)._is_frozen else call
    if name is not None and _extension_may_run():
        run = getattr(native.extension, name)
        result = run(module, None, *args)
        if result is NotImplemented:  # the recorded weights are stale
            weights = module._current_weights()
            result = run(module, weights, *args)
    if result is None and weights is None:
        weights = module._current_weights()
    return result, weights


def _extension_may_run() -> bool:
    """Return True if the extension may be asked for a whole call; it refuses what is not plain by itself."""
    return not (is_compiling() or native.extension is None or _requested not in ("auto", "native"))
