"""What an autograd node keeps of its forward's arguments and of y, as csrc/saved.h does for nodes in C++.

What backward does not read is not saved: it may change or be freed between forward and backward, as with nn.LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .schema import LayerInputs, LayerShape


def traced(x: Tensor) -> bool:
    """Return True if x is of a subclass, as under torch.compile, whose graph cannot read versions when it runs."""
    return torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def read_by_backward(inputs: LayerInputs, needs: Sequence[bool]) -> list[bool]:
    """Which of x, h0, c0, *weights the backward op reads, where `needs` of them are wanted.

    Biases never; x and h0 for the gradients of the weights that they are multiplied by, and those weights the other
    way round. h_{t-1}'s gradient takes weight_hh in every step but the first. With layer normalization all are read,
    by the formula of `differentiable_backward` at least.
    """
    x, shape = inputs.x, LayerShape.of(inputs.weights)
    if shape.norm:
        return [True] * len(needs)
    n = shape.per_direction
    ih, hh = any(needs[3::n]), any(needs[4::n])
    biases = range(2, 4) if shape.bias else ()
    hr = n - 1 if shape.proj else -1
    gates = needs[0] or needs[1] or any(need for k, need in enumerate(needs[3:]) if k % n != hr)
    gates = gates or inputs.zoneout_c is not None  # c before the zoneout is found again from c0
    read = [ih, hh, gates]
    for k in range(len(inputs.weights)):
        role = k % n
        if role == 0:
            read.append(needs[0])
        elif role == 1:
            read.append(needs[1] or x.dim() == 2 or x.shape[0] > 1)
        else:
            read.append(role not in biases)
    return read


class _Connection(torch.autograd.Function):
    """Zeros of t's sizes, one element in memory, whose gradient goes where t's gradient goes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.new_zeros(1).expand(t.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def save(ctx: Any, inputs: LayerInputs, read: Sequence[bool], *others: Tensor | None) -> None:
    """Save `inputs` and `others` for backward, except the differentiable inputs that backward does not `read`.

    Of these only the sizes and the edge in the graph stay, as in nn.LSTM's nodes: their memory is freed, and in-place
    changes are no error. The formula does not need their values either, because it is given the gates.
    """
    tensors = inputs.differentiable
    unread = [t if t is not None and not is_read else None for t, is_read in zip(tensors, read, strict=True)]
    with torch.enable_grad():
        ctx.connections = [None if t is None or not t.requires_grad else _Connection.apply(t) for t in unread]
    ctx.unread_sizes = [None if t is None else t.shape for t in unread]
    kept = inputs.with_differentiable([t if is_read else None for t, is_read in zip(tensors, read, strict=True)])
    ctx.n_others = len(others)
    ctx.save_for_backward(*others, *kept.flat())


def restore(ctx: Any) -> tuple[LayerInputs, list[Any]]:
    """The inputs and the others of `save`, for the backward op: what it does not read has only its sizes."""
    saved = ctx.saved_tensors
    others, inputs = list(saved[: ctx.n_others]), LayerInputs.from_flat(saved[ctx.n_others :])
    like = next(t for t in others if t is not None and t.is_floating_point())
    tensors = inputs.differentiable
    for k, size in enumerate(ctx.unread_sizes):
        if size is not None:
            tensors[k] = like.new_zeros(1).expand(size)
    return inputs.with_differentiable(tensors), others


def connected(ctx: Any, inputs: LayerInputs) -> LayerInputs:
    """The inputs of `restore` with their edges in the graph, for the differentiable formula."""
    pairs = zip(inputs.differentiable, ctx.connections, strict=True)
    return inputs.with_differentiable([t if edge is None else edge for t, edge in pairs])


def output(ctx: Any, y: Tensor) -> Tensor:
    """What `save` is to keep of y, so that changing y in place is no error."""
    ctx.output = y.detach()  # shares y's version counter
    ctx.output.data = y.new_empty(0)  # but not its memory, which a saved-tensor hook may free
    ctx.output_version = y._version
    return y.data


def output_as_kept(ctx: Any, y: Tensor | None, x: Tensor) -> Tensor:
    """y for the backward op: [0] where it was changed since `output`, or where that cannot be known."""
    if y is None or is_compiling() or ctx.output._version != ctx.output_version:
        return x.new_empty(0)
    return y
