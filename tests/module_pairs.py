"""Module pairs: fastlstm's and torch's module with equal weights, and checks that both give equal results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm

from .device import TEST_DEVICE

# Every constructor option of nn.LSTM at least once, besides input_size and hidden_size.
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"proj_size": 2},
    {"num_layers": 2, "dropout": 0.25},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True, "proj_size": 3},
)


def module_pair(*sizes: int, cell: bool = False, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(fastlstm's, torch's) from one seed; by default I = 3, H = 4 and TEST_DEVICE's dtype (float64)."""
    modules = []
    for cls in (fastlstm.LSTMCell, nn.LSTMCell) if cell else (fastlstm.LSTM, nn.LSTM):
        torch.manual_seed(0)
        modules.append(cls(*(sizes or (3, 4)), **{"dtype": TEST_DEVICE.dtype, **kwargs}))
    return modules[0], modules[1]


def data(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn.to(TEST_DEVICE.device, TEST_DEVICE.dtype)


def flat(results: Any) -> list[Tensor]:
    """List every tensor in nested results."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    return [tensor for part in results for tensor in flat(part)]


def naming(case: object) -> Callable[[str], str]:
    """Return the `msg` of torch.testing.assert_close that puts the case before the message."""
    return lambda message: f"{case}: {message}"


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any, case: object = "results") -> None:
    """Assert equal results, and equal gradients of every parameter, up to rounding in float64."""
    both = []
    for module in (ours, theirs):
        module.zero_grad()
        results = flat(module(*args))
        sum(
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in results
        ).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        both.append((results, grads))
    (our_results, our_grads), (their_results, their_grads) = both
    torch.testing.assert_close(our_results, their_results, rtol=1e-10, atol=1e-12, msg=naming(case))
    assert list(our_grads) == list(their_grads), case
    for name, grad in their_grads.items():
        assert (grad is None) == (our_grads[name] is None), (case, name)
        if grad is not None:
            torch.testing.assert_close(our_grads[name], grad, rtol=1e-10, atol=1e-12, msg=naming(f"{case}, d {name}"))


def error_of(call: Callable[[], Any]) -> tuple[type, str]:
    """Type and message of the exception that `call` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the expected exception is the one of nn.LSTM
        call()
    return caught.type, str(caught.value)
