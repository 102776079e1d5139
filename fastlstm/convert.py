"""Swapping classes: `convert` a model's LSTMs in place, `patch_torch` for code that names torch.nn.LSTM itself."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .modules import LSTM, LSTMCell, TorchLSTM, TorchLSTMCell

Module = TypeVar("Module", bound=nn.Module)

_TO_FASTLSTM: dict[type, type] = {TorchLSTM: LSTM, TorchLSTMCell: LSTMCell}
_TO_TORCH: dict[type, type] = {ours: theirs for theirs, ours in _TO_FASTLSTM.items()}


def convert(module: Module, to: str = "fastlstm") -> Module:
    """Turn every torch.nn.LSTM and torch.nn.LSTMCell in `module`, itself included, into fastlstm's, in place.

    The module objects stay the same, and with them parameters, hooks, parametrizations, buffers and train/eval mode:
    only their class changes. Subclasses with code of their own are left alone.

    Args:
        module: the model.
        to: "fastlstm", or "torch" for the way back (before exporting to ONNX, say).

    Returns:
        `module`.

    Raises:
        ValueError: for another value of `to`.
    """
    if to not in ("fastlstm", "torch"):
        raise ValueError(f'to must be "fastlstm" or "torch", got {to!r}')
    classes = _TO_FASTLSTM if to == "fastlstm" else _TO_TORCH
    for child in module.modules():
        cls = type(child)
        if cls in classes:
            child.__class__ = classes[cls]
        elif parametrize.is_parametrized(child) and cls.__bases__ and cls.__bases__[0] in classes:
            # torch.nn.utils.parametrize gave this one module a class of its own, which holds the properties.
            own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
            child.__class__ = type(cls.__name__, (classes[cls.__bases__[0]],), own)
    return module


class patch_torch:
    """Put fastlstm.LSTM and fastlstm.LSTMCell in the place of torch.nn.LSTM and torch.nn.LSTMCell.

    Models built afterwards by code that names torch's classes get fastlstm's, and `isinstance(m, nn.LSTM)` holds for
    them. Called plainly it stays; in a `with` statement it is undone at the end. Modules that were built before, and
    names that other code imported before, are untouched.
    """

    def __init__(self) -> None:
        places = (nn, nn.modules, torch.nn.modules.rnn)
        self._before = [(place, place.LSTM, place.LSTMCell) for place in places]
        for place in places:
            place.LSTM, place.LSTMCell = LSTM, LSTMCell  # type: ignore[misc, attr-defined]

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place, lstm, cell in self._before:
            place.LSTM, place.LSTMCell = lstm, cell  # type: ignore[attr-defined]
