"""An nn module and fastlstm's with the very same numbers, and the checks that both do, or refuse, the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm

from .place import HERE

# nn.LSTM's every constructor option at least once; (input_size, hidden_size) come first.
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


def twins(*sizes: int, cell: bool = False, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(fastlstm's, torch's) from one seed; 3 features, 4 hidden units, HERE's dtype (float64) unless told otherwise."""
    made = []
    for cls in (fastlstm.LSTMCell, nn.LSTMCell) if cell else (fastlstm.LSTM, nn.LSTM):
        torch.manual_seed(0)
        made.append(cls(*(sizes or (3, 4)), **{"dtype": HERE.dtype, **kwargs}))
    return made[0], made[1]


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn.to(HERE.device, HERE.dtype)


def flat(results: Any) -> list[Tensor]:
    """Every tensor in nested results."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    return [tensor for part in results for tensor in flat(part)]


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any) -> None:
    """Both modules give the same results, and the same gradient for every parameter, in float64."""
    found = []
    for module in (ours, theirs):
        module.zero_grad()
        results = flat(module(*args))
        sum(
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in results
        ).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append((results, grads))
    (mine, my_grads), (yours, your_grads) = found
    torch.testing.assert_close(mine, yours, rtol=1e-10, atol=1e-12)
    assert list(my_grads) == list(your_grads)
    for name, grad in your_grads.items():
        assert (grad is None) == (my_grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                my_grads[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


def error_of(call: Callable[[], Any]) -> tuple[type, str]:
    """Type and text of what `call` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whichever nn.LSTM raises is the expectation
        call()
    return caught.type, str(caught.value)
