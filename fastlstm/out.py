"""Results of a frozen layer in tensors that the caller gives, `out`: what they must be, and the copy into them.

The extension writes into them itself where a call is plain (csrc/frozen_path.cpp, by the same rules); any other call
makes its results first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .dispatch import _transforming
from .ops.modes import recording


def check_sequence(module: Any, out: Any, input: Any, hx: Any) -> None:
    """Raise unless a call of a FrozenLSTM may write into `out`, (output, (h_n, c_n))."""
    if isinstance(input, PackedSequence):
        raise ValueError(f"out must be None with a PackedSequence, got {type(out).__name__}")
    _check_pair("out", out, "(output, (h_n, c_n))")
    _check_pair("out[1]", out[1], "(h_n, c_n)")
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return  # to the error of every call
    rows = list(input.shape[:-1])
    B = [] if len(rows) == 1 else rows[:1] if module.batch_first else rows[1:]
    D, H, P = 2 if module.bidirectional else 1, module.hidden_size, module.proj_size or module.hidden_size
    states = [module.num_layers * D, *B]
    h_n, c_n = (out[1][0], [*states, P]), (out[1][1], [*states, H])
    _check(module, {"out[0]": (out[0], [*rows, D * P]), "out[1][0]": h_n, "out[1][1]": c_n}, input, hx)


def check_step(module: Any, out: Any, input: Any, hx: Any) -> None:
    """Raise unless a call of a FrozenLSTMCell may write into `out`, (h, c)."""
    _check_pair("out", out, "(h, c)")
    if not isinstance(input, Tensor) or input.dim() not in (1, 2):
        return
    sizes = [*input.shape[:-1], module.hidden_size]
    _check(module, {"out[0]": (out[0], sizes), "out[1]": (out[1], sizes)}, input, hx)


def _check_pair(name: str, value: Any, expected: str) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{name} must be a tuple {expected}, got {type(value).__name__}")
    if len(value) != 2:
        raise TypeError(f"{name} must be a tuple {expected}, got a tuple of {len(value)}")


def _check(module: Any, results: dict[str, tuple[Any, list[int]]], input: Any, hx: Any) -> None:
    """Check the results by name, of which the last two are the new state."""
    states = tuple(hx) if isinstance(hx, (tuple, list)) else ()
    _check_may_write((input, *states))
    replaced = {f"hx[{k}]": t for k, t in enumerate(states)}
    packed = {name: t for name, t in module._buffers.items() if name.startswith("packed_l")}
    _check_results(
        results,
        module.dtype,
        {"input": input, **replaced, **packed},
        dict(zip(list(results)[-2:], replaced, strict=False)),
    )


def _check_may_write(inputs: tuple[Any, ...]) -> None:
    """Raise RuntimeError where a call cannot write into given tensors."""
    if recording():
        raise RuntimeError(
            "out must be None under torch.compile, torch.export and torch.jit.trace: a graph makes its results itself"
        )
    if _transforming():
        raise RuntimeError("out must be None under torch.func and forward-mode AD")
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError("out must be None if an input requires a gradient: call the layer under torch.no_grad()")


def _check_results(
    results: Mapping[str, tuple[Any, list[int]]], dtype: torch.dtype, inputs: Mapping[str, Any], same: Mapping[str, str]
) -> None:
    """Raise TypeError, ValueError or RuntimeError unless `results` can be written.

    Args:
        results: by name, each tensor and its expected sizes; they must not share memory.
        dtype: of the layer.
        inputs: by name; a result must share no memory with one.
        same: the input that a result may be: the state that it replaces.
    """
    for name, (t, sizes) in results.items():
        if type(t) not in (Tensor, nn.Parameter):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if list(t.shape) != sizes:
            raise ValueError(f"{name} must be {sizes}, got {list(t.shape)}")
        if t.dtype != dtype or t.device.type != "cpu" or t.layout != torch.strided:
            raise ValueError(f"{name} must be {dtype} on cpu, got {t.dtype} on {t.device} ({t.layout})")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(t.stride())} of {list(t.shape)}")
        if t.requires_grad:
            raise RuntimeError(f"{name} must not require a gradient: give {name}.detach()")
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} is an inference tensor, which only torch.inference_mode() may write")
    spans = {name: _span(t) for name, (t, _) in results.items()}
    names = list(spans)
    for k, name in enumerate(names):
        for other in names[:k]:
            if _overlap(spans[name], spans[other]):
                raise ValueError(f"{name} must share no memory with {other}")
        for other, t in inputs.items():
            if not (isinstance(t, Tensor) and t.device.type == "cpu" and t.layout == torch.strided):
                continue
            span = _span(t)
            if not _overlap(spans[name], span):
                continue
            if same.get(name) != other:
                raise ValueError(f"{name} must share no memory with {other}")
            if span != spans[name] or not t.is_contiguous():
                raise ValueError(f"{name} must be {other} itself or share no memory with it")


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses at which the first element of `t` begins and the last ends."""
    begin = t.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size() if t.numel() else begin


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
