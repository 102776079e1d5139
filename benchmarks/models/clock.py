"""What share of a model's time its LSTMs take: `LSTMClock` times every call of them, forward and backward."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fastlstm

LSTMS = (nn.LSTM, nn.LSTMCell, fastlstm.LSTM, fastlstm.LSTMCell)


def lstms_of(module: nn.Module) -> list[nn.Module]:
    """The LSTM and LSTMCell modules in `module`, nn's and fastlstm's."""
    return [child for child in module.modules() if isinstance(child, LSTMS)]


class LSTMClock:
    """A context in which the seconds that a module's LSTMs take add up in `seconds`. For CPUs.

    The backward pass of a call is timed between two hooks. The first runs when the gradients of its results are known,
    the second when the gradients of its inputs are. Autograd runs nodes in reverse order of their creation, so nothing
    but the call's own nodes runs in between. If no input needs a gradient, the second hook is that of the weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self.seconds = 0.0
        self._lstms = lstms_of(module)
        self._handles: list[Any] = []
        self._called = 0.0
        self._backward_start: float | None = None
        self._weights_done = 0.0

    def __enter__(self) -> LSTMClock:
        for lstm in self._lstms:
            self._handles += [
                lstm.register_forward_pre_hook(self._before_call, with_kwargs=True),
                lstm.register_forward_hook(self._after_call),
            ]
            self._handles += [
                weight.register_post_accumulate_grad_hook(self._weight_done)
                for weight in lstm.parameters()
                if weight.requires_grad
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """End a backward pass in which no input of the last call needed a gradient: with its weights' gradients."""
        self._close(self._weights_done)

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def alias(leaf: Any) -> Any:
            """Alias the tensor, which adds an autograd node that runs right after the call's nodes."""
            if not (torch.is_grad_enabled() and isinstance(leaf, Tensor) and leaf.requires_grad):
                return leaf
            leaf = leaf.view_as(leaf)
            leaf.register_hook(self._inputs_done)
            return leaf

        args, kwargs = tree_map(alias, (args, kwargs))
        self._called = time.perf_counter()
        return args, kwargs

    def _after_call(self, module: nn.Module, args: Any, results: Any) -> None:
        self.seconds += time.perf_counter() - self._called
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._results_known)

    def _results_known(self, grad: Tensor) -> None:
        if self._backward_start is None:
            self._backward_start = time.perf_counter()

    def _inputs_done(self, grad: Tensor) -> None:
        self._close(time.perf_counter())

    def _weight_done(self, weight: Tensor) -> None:
        self._weights_done = time.perf_counter()

    def _close(self, end: float) -> None:
        if self._backward_start is not None:
            self.seconds += max(0.0, end - self._backward_start)
            self._backward_start = None
