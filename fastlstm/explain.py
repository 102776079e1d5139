"""`explain`: which backend runs a call, and why each other one does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch
from .backends import native
from .cell import LSTMCell
from .frozen import FrozenLSTM, FrozenLSTMCell
from .functional import check_lengths
from .masks import Masks
from .modules import LSTM


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `print` shows it as text.

    Attributes:
        backend: the name of the backend that runs the call; empty if the requested one cannot.
        reasons: for each backend "runs", or why it does not.
        kernels: which CUDA kernels the native backend runs, and why; empty on other devices.
        forward: the CPU plan of the first layer: number of threads, how they divide the work, which weights are packed,
            how products are computed, and why. Empty on other devices, and with recompute, which runs segments.
        backward: the same of the backward pass; empty for a frozen layer.
    """

    backend: str
    reasons: dict[str, str]
    kernels: str = ""
    forward: str = ""
    backward: str = ""

    def __str__(self) -> str:
        lines = dict(self.reasons)
        if self.forward:
            lines[self.backend] += f": {self.forward}"
        width = max(map(len, lines))
        text = []
        for name, reason in lines.items():
            text.append(f"{name:<{width}}  {reason}")
            if name == self.backend and self.backward:
                text.append(f"{'':<{width}}  training: forward the same; backward: {self.backward}")
        if self.kernels:
            text.append(f"{'kernels':<{width}}  {self.kernels}")
        return "\n".join(text)


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Any = None,
    reset_mask: Any = None,
    return_cell_states: bool = False,
) -> Explanation:
    """Tell which backend would run `module(input, hx, ...)`, and why, without running it.

    Args:
        module: a fastlstm.LSTM or fastlstm.LSTMCell, frozen or not.
        input: as in the call.
        hx: as in the call.
        lengths: as in the call.
        reset_mask: as in the call.
        return_cell_states: as in the call.

    Returns:
        An Explanation.

    Raises:
        TypeError: `module` is neither class.
        ValueError, TypeError: lengths are invalid, as in the call.

    Example:
        >>> import torch, fastlstm
        >>> with fastlstm.use_backend("eager"):
        ...     explanation = fastlstm.explain(fastlstm.LSTM(8, 16), torch.randn(5, 3, 8))
        >>> explanation.backend, explanation.reasons["eager"]
        ('eager', 'runs')
    """
    if isinstance(module, (FrozenLSTM, FrozenLSTMCell)):
        weights = module.first_layer()
    elif isinstance(module, LSTM):
        weights = module._current_weights()[: len(module._all_weights[0]) * (2 if module.bidirectional else 1)]
    elif isinstance(module, LSTMCell):
        weights = [weight for weight in module._current_weights() if weight is not None] + module._norm_weights()
    else:
        raise TypeError(f"module must be a fastlstm.LSTM or fastlstm.LSTMCell, got {type(module).__name__}")
    packed = isinstance(input, PackedSequence)
    data = input.data if isinstance(input, PackedSequence) else input
    T, B = _sizes(module, input)
    known = _lengths(input, lengths, T, B)
    variant = None if type(module)._is_frozen else module._variant
    masks = Masks.of(variant.recurrent_dropout, variant.zoneout, module.training) if variant else None
    call = dispatch.describe(
        data, weights, data if packed or lengths is not None else None, reset_mask,
        *(data if used else None for used in (masks.used if masks else ())),
    )  # fmt: skip
    reasons = dispatch.choices(call)
    form = module.form if isinstance(module, (FrozenLSTM, FrozenLSTMCell)) else "no"
    if form != "no":
        reasons = {
            name: reason if name == "native" else "cannot run a frozen layer" for name, reason in reasons.items()
        }
    backend = next((name for name, reason in reasons.items() if reason == "runs"), "")
    if backend != "native":
        return Explanation(backend, reasons)
    unknown = isinstance(known, FakeTensor) or getattr(module, "recompute", False) is not False
    steps = None if known is None or unknown else known.tolist()
    cell = isinstance(module, LSTMCell)
    plan = {} if unknown else native.cpu_plan(call, T, B, steps, packed, hx is not None, cell=cell, frozen=form)
    forward, backward = (plan[phase]["text"] if phase in plan else "" for phase in ("forward", "backward"))
    return Explanation(backend, reasons, native.kernels(call, B), forward, backward)


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() != 3:
        return input.shape[0], 1
    return (input.shape[1], input.shape[0]) if module.batch_first else (input.shape[0], input.shape[1])


def _lengths(input: Tensor | PackedSequence, lengths: Any, T: int, B: int) -> Tensor | None:
    """The lengths [B] of a call, checked as the call would check them."""
    if isinstance(input, PackedSequence):
        steps = input.batch_sizes
        return (steps[:, None] > torch.arange(int(steps[0]))).sum(0)
    if lengths is None:
        return None
    if input.dim() == 2:  # unbatched
        lengths = torch.as_tensor(lengths).unsqueeze(0)
    return check_lengths(lengths, torch.empty(T, B, 0))
