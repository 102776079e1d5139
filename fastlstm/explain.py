"""`explain`: which backend runs a call, and why each other one does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import dispatch
from .backends import native
from .modules import LSTM, LSTMCell


@dataclass(frozen=True)
class Explanation:
    """The backend that runs a call ("" if the one asked for cannot), and for each backend "runs" or why not.

    `kernels`: which CUDA kernels of the native backend run it, and why; "" elsewhere.
    """

    backend: str
    reasons: dict[str, str]
    kernels: str = ""

    def __str__(self) -> str:
        told = {**self.reasons, "kernels": self.kernels} if self.kernels else self.reasons
        width = max(map(len, told))
        return "\n".join(f"{name:<{width}}  {reason}" for name, reason in told.items())


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Any = None,
    reset_mask: Any = None,
    return_cell_states: bool = False,
) -> Explanation:
    """Which backend would run `module(input, hx, ...)`, without running it.

    Args:
        module: a fastlstm.LSTM or fastlstm.LSTMCell; the other arguments are those of its call.

    Raises:
        TypeError: for another module.
    """
    if isinstance(module, LSTM):
        weights = module.current_weights()[: len(module._all_weights[0]) * (2 if module.bidirectional else 1)]
    elif isinstance(module, LSTMCell):
        weights = [w for w in (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh) if w is not None]
    else:
        raise TypeError(f"module must be a fastlstm.LSTM or fastlstm.LSTMCell, got {type(module).__name__}")
    packed = isinstance(input, PackedSequence)
    data = input.data if isinstance(input, PackedSequence) else input
    call = dispatch.describe(data, weights, data if packed or lengths is not None else None, reset_mask)
    reasons = dispatch.choices(call)
    backend = next((name for name, reason in reasons.items() if reason == "runs"), "")
    return Explanation(backend, reasons, native.kernels(call, _rows(module, input)) if backend == "native" else "")


def _rows(module: nn.Module, input: Tensor | PackedSequence) -> int:
    """B of a call."""
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return input.shape[0] if input.dim() == 2 else 1
    return input.shape[0 if module.batch_first else 1] if input.dim() == 3 else 1
