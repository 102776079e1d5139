"""Class changes of inference: `freeze` a model's LSTMs in place, `thaw` makes them trainable again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .backends import native
from .cell import LSTMCell, TorchLSTMCell
from .frozen import Frozen, FrozenLSTM, FrozenLSTMCell
from .module_state import mark_as_leaf
from .modules import LSTM, TorchLSTM
from .portable import as_float, in_form, pack

Module = TypeVar("Module", bound=nn.Module)

_FORMS = {None: "stored", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def freeze(model: Module, weights: torch.dtype | None = None) -> Module:
    """Make every LSTM and LSTMCell in `model`, itself included, an inference module on CPU, in place.

    torch.nn's classes and fastlstm's are frozen, parametrized ones with their present weights. Weights are packed once,
    for this machine; later changes of the original tensors have no effect. Subclasses are left as they are, and a
    warning names them. Layers that are frozen already stay as they are: `weights` must name their form.

    Args:
        model: a model on CPU.
        weights: None for the weights as they are (float32, float64 or bfloat16); torch.bfloat16 for bfloat16 weights,
            torch.int8 for int8 products, of layers in float32. Input, output and states keep the module's dtype.

    Returns:
        `model`.

    Raises:
        ValueError: another value of `weights`, a layer of another dtype, with zoneout or layer_norm, or a layer frozen
            in another form: call `thaw` first.
        RuntimeError: a layer that is not on CPU, whose weights are not parameters, or there is no extension.

    Example:
        >>> import torch, fastlstm
        >>> model = fastlstm.freeze(torch.nn.Sequential(torch.nn.LSTM(8, 16)), weights=torch.int8)
        >>> output, _ = model(torch.randn(5, 3, 8))
    """
    if weights not in _FORMS:
        raise ValueError(f"weights must be None, torch.bfloat16 or torch.int8, got {weights!r}")
    if native.extension is None:
        raise RuntimeError(f"freeze needs the extension fastlstm._C, which is not available: {native.load_error}")
    form = _FORMS[weights]
    skipped: list[str] = []
    found = list(_layers_of(model, skipped))
    packed = []
    for name, layer in model.named_modules():  # before any is changed
        if isinstance(layer, Frozen) and layer.form != form:
            raise ValueError(
                f"{name or 'the module itself'} is frozen in the form {layer.form!r}, got weights={weights}: call "
                "fastlstm.thaw(model) first, or freeze a copy of the trained model"
            )
    for name, layer in found:
        _check_may_freeze(name or type(layer).__name__, layer, form)
    for _, layer in found:
        stored = [[getattr(layer, own) for own in names] for names in _names(layer)]
        packed.append([pack(stored[0][0].dtype, form, in_form(of_layer, form)) for of_layer in stored])
    for (_, layer), of_layers in zip(found, packed, strict=True):
        _freeze(layer, form, of_layers)
    if skipped:
        warnings.warn(f"freeze leaves subclasses of LSTM and LSTMCell as they are: {', '.join(skipped)}", stacklevel=2)
    return model


def thaw(model: Module) -> Module:
    """Make every frozen LSTM and LSTMCell in `model`, itself included, trainable again, in place.

    They become fastlstm.LSTM and fastlstm.LSTMCell with parameters of the module's dtype, which require a gradient as
    before `freeze`; what rounding to bfloat16 or int8 took from the weights is lost.

    Args:
        model: a model, frozen in part or as a whole.

    Returns:
        `model`.

    Example:
        >>> import torch, fastlstm
        >>> model = fastlstm.thaw(fastlstm.freeze(fastlstm.LSTM(8, 16)))
        >>> len(list(model.parameters()))
        4
    """
    for layer in list(model.modules()):
        if isinstance(layer, Frozen):
            _thaw(layer)
    return model


def _layers_of(model: nn.Module, skipped: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules to freeze; the names of subclasses go to `skipped`."""
    classes = (LSTM, LSTMCell, TorchLSTM, TorchLSTMCell)
    for name, child in model.named_modules():
        cls = type(child)
        if cls in classes or (parametrize.is_parametrized(child) and cls.__bases__[0] in classes):
            yield name, child
        elif isinstance(child, classes) and not isinstance(child, Frozen):
            skipped.append(f"{name or 'the module itself'} ({cls.__module__}.{cls.__qualname__})")


def _names(layer: Any) -> list[list[str]]:
    """Names of the weights of each layer, those of its directions one after the other."""
    if isinstance(layer, (nn.RNNBase, TorchLSTM)):
        D = 2 if layer.bidirectional else 1
        names = layer._all_weights
        return [[name for d in range(D) for name in names[k * D + d]] for k in range(layer.num_layers)]
    return [["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]]


def _check_may_freeze(name: str, layer: nn.Module, form: str) -> None:
    used = layer._variant.used() if isinstance(layer, (LSTM, LSTMCell)) and layer._variant else {}
    unsupported = ", ".join(own for own in used if own != "recurrent_dropout")  # which does nothing in evaluation
    if unsupported:
        raise ValueError(f"{name} has {unsupported}, which a frozen layer does not compute")
    computed = set(layer.parametrizations) if parametrize.is_parametrized(layer) else set()  # type: ignore[arg-type]
    weights = [own for names in _names(layer) for own in names]
    others = computed - set(weights)
    if others:
        raise RuntimeError(
            f"{name}.{min(others)} is parametrized and not a weight, which a frozen layer cannot keep: call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    for own in weights:
        if own not in layer._parameters and own not in computed:
            raise RuntimeError(
                f"{name}.{own} must be a parameter, or computed by torch.nn.utils.parametrize: make older weight "
                "normalization and pruning permanent first (torch.nn.utils.remove_weight_norm, prune.remove)"
            )
        weight = getattr(layer, own)
        if weight.device.type != "cpu":
            raise RuntimeError(f"{name}.{own} must be on cpu, got {weight.device}: frozen layers run there")
        if weight.dtype not in (_DTYPES if form == "stored" else (torch.float32,)):
            expected = ", ".join(map(str, _DTYPES)) if form == "stored" else f"torch.float32 for {form} weights"
            raise ValueError(f"{name}.{own} must be {expected}, got {weight.dtype}")


def _freeze(layer: Any, form: str, packed: list[Tensor]) -> None:
    names, dtype = _names(layer), getattr(layer, _names(layer)[0][0]).dtype
    trainable = [own for of_layer in names for own in of_layer if _requires_grad(layer, own)]
    for own in list(getattr(layer, "parametrizations", ())):
        parametrize.remove_parametrizations(layer, own, leave_parametrized=True)
    for own in (own for of_layer in names for own in of_layer):
        delattr(layer, own)  # parametrize leaves a buffer where there is no gradient
    is_cell = isinstance(layer, (LSTMCell, TorchLSTMCell))
    for own in () if is_cell else ("_flat_weights_names", "_flat_weights", "_flat_weight_refs"):
        layer.__dict__[own] = []
    if is_cell:
        for own in ("bias_ih", "bias_hh"):  # None where there is no bias
            layer._parameters.pop(own, None)
    layer.__class__ = FrozenLSTMCell if is_cell else FrozenLSTM
    layer._form, layer._dtype, layer._layer_names, layer._trainable = form, dtype, names, trainable
    for k, of_layer in enumerate(packed):
        layer.register_buffer(f"packed_l{k}", of_layer, persistent=False)
    mark_as_leaf(layer)


def _requires_grad(layer: Any, name: str) -> bool:
    """Return True if a weight is trained, or what it is computed from."""
    if name in layer._parameters:
        return layer._parameters[name].requires_grad
    return any(original.requires_grad for original in layer.parametrizations[name].parameters())


@torch.inference_mode(False)  # so that the parameters can be trained
def _thaw(layer: Any) -> None:
    layers = range(len(layer._layer_names))
    weights = [[w.to(layer._packed(k).device) for w in as_float(layer._portable(k), layer.dtype)] for k in layers]
    names, trainable = layer.__dict__.pop("_layer_names"), layer.__dict__.pop("_trainable")
    del layer.__dict__["_form"], layer.__dict__["_dtype"]
    for k in range(len(names)):
        delattr(layer, f"packed_l{k}")
    is_cell = isinstance(layer, LSTMCell)
    layer.__class__ = LSTMCell if is_cell else LSTM
    for of_layer, values in zip(names, weights, strict=True):
        for name, value in zip(of_layer, values, strict=True):
            layer.register_parameter(name, nn.Parameter(value, requires_grad=name in trainable))
    if is_cell and not layer.bias:
        layer.register_parameter("bias_ih", None)
        layer.register_parameter("bias_hh", None)
    if not is_cell:
        layer._flat_weights_names = [name for of_direction in layer._all_weights for name in of_direction]
        layer._init_flat_weights()
