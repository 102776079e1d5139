"""FLOPs of every op for torch.utils.flop_counter: `formulas`, and `register` as soon as that module is imported.

Only products are counted, as torch counts an LSTM that it runs step by step: 2 * 4H * (I + P) a row and step in
forward, 2 * H * P more with projection; in backward each factor's gradient that is asked for takes as much.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .schema import LayerInputs, LayerShape, bundled, wants_dgates

_COUNTER = "torch.utils.flop_counter"


def _rows(inputs: LayerInputs) -> tuple[int, int]:
    """The steps of all rows, and the rows that have a first step: those of `lengths` where these can be read."""
    x, lengths = inputs.x, inputs.lengths
    if lengths is None or lengths.device.type != "cpu" or isinstance(lengths, (FakeTensor, FunctionalTensor)):
        return x.shape[:-1].numel(), inputs.B
    steps = lengths.tolist()
    return sum(steps), sum(n > 0 for n in steps)


def layer(*args: Any, out_val: Any = None) -> int:
    """Of fastlstm/ops/schema.py's forward op."""
    return _forward(bundled(args, 2)[1])


def _forward(inputs: LayerInputs) -> int:
    s, I, N = LayerShape.of(inputs.weights), inputs.x.shape[-1], _rows(inputs)[0]  # noqa: E741
    return s.D * 2 * N * (4 * s.H * (I + s.P) + s.H * s.P * s.proj)


def layer_backward(*args: Any, out_val: Any = None) -> int:
    """Of the backward op. The gradient of h passes W_hh in every step but the first, there for dh0 alone."""
    _, inputs, others = bundled(args, 4, 4)
    return _backward(inputs, others[-1])


def _backward(inputs: LayerInputs, needs: Sequence[bool]) -> int:
    s, I = LayerShape.of(inputs.weights), inputs.x.shape[-1]  # noqa: E741
    N, first = _rows(inputs)
    flops = 0
    for d in range(s.D):
        need = needs[3 + d * s.per_direction : 3 + (d + 1) * s.per_direction]
        dx = needs[0] and not wants_dgates(inputs, needs)
        flops += 2 * N * 4 * s.H * I * (dx + need[0])
        flops += 2 * 4 * s.H * s.P * (N * need[1] + (N if needs[1] else N - first))
        if s.proj:
            flops += 2 * N * s.H * s.P * (1 + need[-1])
    return flops


def recomputed_layer(*args: Any, out_val: Any = None) -> int:
    """Of fastlstm/ops/recompute.py's forward op, after the backend and the interval."""
    return _forward(bundled(args, 2, 2)[1])


def recomputed_layer_backward(*args: Any, out_val: Any = None) -> int:
    """Of its backward op, which runs forward again."""
    _, inputs, others = bundled(args, 3, 6)
    return _forward(inputs) + _backward(inputs, others[-1])


def frozen_layer(
    x: Tensor, h0: Any, c0: Any, packed: Tensor, sizes: Sequence[int], lengths: Tensor | None, *_: Any,
    out_val: Any = None,
) -> int:  # fmt: skip
    """Of fastlstm/ops/frozen.py's op: as many products as the unfrozen layer has, of whatever numbers."""
    H, P, D = sizes
    N = _rows(LayerInputs(x, None, None, [], lengths))[0]
    return D * 2 * N * (4 * H * (x.shape[-1] + P) + H * P * (P != H))


def grouped_products(a: Tensor, b: Tensor, groups: int, *, out_val: Any = None) -> int:
    """Of fastlstm::grouped_products."""
    return 2 * a.shape[:2].numel() * a.shape[2] * b.shape[2]


def formulas(backends: Sequence[str]) -> dict[Any, Callable[..., int]]:
    """The formula of every op that `backends` and the modules beside this one define."""
    ops = torch.ops.fastlstm
    found: dict[Any, Callable[..., int]] = {}
    for name in backends:
        found[getattr(ops, f"{name}_layer")] = layer
        found[getattr(ops, f"{name}_layer_backward")] = layer_backward
    found[ops.recomputed_layer] = recomputed_layer
    found[ops.recomputed_layer_backward] = recomputed_layer_backward
    found[ops.frozen_layer] = frozen_layer
    found[ops.grouped_products] = grouped_products
    return found


def register(backends: Sequence[str]) -> None:
    """Register the formulas with torch.utils.flop_counter, now if it is imported, otherwise once it is.

    It imports Triton, which takes longer than all of fastlstm.
    """
    if _COUNTER in sys.modules:
        _register_with(sys.modules[_COUNTER], backends)
    else:
        sys.meta_path.insert(0, _Finder(backends))


def _register_with(counter: ModuleType, backends: Sequence[str]) -> None:
    for op, formula in formulas(backends).items():
        counter.register_flop_formula(op, get_raw=True)(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch.utils.flop_counter through the other finders, with a loader that registers the formulas."""

    def __init__(self, backends: Sequence[str]) -> None:
        self._backends = backends

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._backends)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads one module as `loader` does, and registers the formulas with it."""

    def __init__(self, loader: Any, backends: Sequence[str]) -> None:
        self._loader, self._backends = loader, backends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register_with(module, self._backends)
