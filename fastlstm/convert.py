"""Swapping classes: `convert` a model's LSTMs in place, `patch_torch` for code that names torch.nn.LSTM itself."""

from __future__ import annotations

import copyreg
import functools
import pkgutil
import warnings
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .cell import LSTMCell, TorchLSTMCell
from .module_state import mark_as_leaf
from .modules import LSTM, TorchLSTM

Module = TypeVar("Module", bound=nn.Module)

_TO_FASTLSTM: dict[type, type] = {TorchLSTM: LSTM, TorchLSTMCell: LSTMCell}
_TO_TORCH: dict[type, type] = {ours: theirs for theirs, ours in _TO_FASTLSTM.items()}


def convert(module: Module, to: str = "fastlstm") -> Module:
    """Convert every torch.nn.LSTM and torch.nn.LSTMCell in `module`, itself included, to fastlstm's, in place.

    Only the class of the module objects changes. Parameters, hooks, parametrizations, buffers and train/eval mode
    stay. Subclasses have code of their own, which may call the base class by name or by super(): they are not
    converted, and a warning names them.

    Args:
        module: the model.
        to: "fastlstm", or "torch" to convert back (before exporting to ONNX, for example).

    Returns:
        `module`.

    Raises:
        ValueError: for another value of `to`, or a module that is to become torch's and computes what torch's class
            does not: a frozen one, or one with recurrent_dropout, zoneout or layer_norm. Nothing is converted then.

    Example:
        >>> import torch, fastlstm
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16))
        >>> isinstance(fastlstm.convert(model)[0], fastlstm.LSTM)
        True
        >>> isinstance(fastlstm.convert(model, to="torch")[0], torch.nn.LSTM)
        True
    """
    if to not in ("fastlstm", "torch"):
        raise ValueError(f'to must be "fastlstm" or "torch", got {to!r}')
    classes = _TO_FASTLSTM if to == "fastlstm" else _TO_TORCH
    skipped = []
    if to == "torch":
        _check_may_be_torch(module)
    for name, child in module.named_modules():
        cls = type(child)
        if getattr(cls, "_is_frozen", False):
            continue
        if cls in classes:
            child.__class__ = classes[cls]
        elif parametrize.is_parametrized(child) and cls.__bases__ and cls.__bases__[0] in classes:
            # torch.nn.utils.parametrize gave this one module a class of its own, which holds the properties.
            own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
            child.__class__ = type(cls.__name__, (classes[cls.__bases__[0]],), own)
        else:
            if isinstance(child, tuple(classes)):
                skipped.append(f"{name or 'the module itself'} ({cls.__module__}.{cls.__qualname__})")
            continue
        if to == "fastlstm":
            mark_as_leaf(child)
        else:
            child.__dict__.pop("__module__", None)
    if skipped:
        theirs, ours = ("torch.nn", "fastlstm") if to == "fastlstm" else ("fastlstm", "torch.nn")
        warnings.warn(
            f"convert leaves subclasses of {theirs}.LSTM and {theirs}.LSTMCell as they are: {', '.join(skipped)}. "
            f"Derive them from {ours}'s classes"
            + (", or define them while patch_torch() is active." if to == "fastlstm" else "."),
            stacklevel=2,
        )
    return module


def _check_may_be_torch(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if not isinstance(child, (LSTM, LSTMCell)):
            continue
        cls, where = type(child), name or "the module itself"
        if cls._is_frozen:
            raise ValueError(f"{where} is frozen: call fastlstm.thaw(model) before convert")
        if parametrize.is_parametrized(child):
            cls = cls.__bases__[0]
        if cls in _TO_TORCH and child._variant:  # other subclasses are not converted
            names = ", ".join(child._variant.used())
            raise ValueError(f"{where} has {names}, which torch.nn.{cls.__name__} cannot compute")


class _ClassByName:
    """Pickles as whatever the name of `cls` stands for where the pickle is read."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls

    def __reduce__(self) -> tuple[Any, ...]:
        return pkgutil.resolve_name, (f"{self.cls.__module__}:{self.cls.__qualname__}",)


class _NewInstance:
    """Makes a module of `cls` without state, with which copying and unpickling begin; pickles with the class's name."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls

    def __call__(self) -> nn.Module:
        return self.cls.__new__(self.cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (copyreg.__newobj__, _ClassByName(self.cls))  # type: ignore[attr-defined]


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    """Pickle a module of torch's class while its name, by which pickle would look the class up, is fastlstm's.

    The pickle names torch and the standard library alone, and loads as one that was made without the patch.
    """
    return _NewInstance(type(module)), (), module.__reduce_ex__(2)[2]


class patch_torch:
    """Replace torch.nn.LSTM and torch.nn.LSTMCell by fastlstm.LSTM and fastlstm.LSTMCell.

    Models built afterwards by code that names torch's classes get fastlstm's, and `isinstance(m, nn.LSTM)` is True for
    them. A plain call lasts until the process ends; in a `with` statement it is undone at the end. It has no effect on
    modules that were built before, or on a name that other code imported before (`from torch.nn import LSTM`): patch
    first, then import such code. Whole models that are unpickled meanwhile get fastlstm's classes, too.

    Example:
        >>> import torch, fastlstm
        >>> with fastlstm.patch_torch():
        ...     lstm = torch.nn.LSTM(8, 16)
        >>> isinstance(lstm, fastlstm.LSTM)
        True
    """

    def __init__(self) -> None:
        places = (nn, nn.modules, torch.nn.modules.rnn)
        self._before = [(place, place.LSTM, place.LSTMCell) for place in places]
        self._reductions = {cls: copyreg.dispatch_table.get(cls) for cls in _TO_FASTLSTM}
        for place in places:
            place.LSTM, place.LSTMCell = LSTM, LSTMCell  # type: ignore[misc, attr-defined]
        for cls in _TO_FASTLSTM:
            copyreg.pickle(cls, _reduce)  # type: ignore[arg-type]

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place, lstm, cell in self._before:
            place.LSTM, place.LSTMCell = lstm, cell  # type: ignore[attr-defined]
        for cls, reduction in self._reductions.items():
            copyreg.dispatch_table.pop(cls, None)
            if reduction is not None:
                copyreg.dispatch_table[cls] = reduction
