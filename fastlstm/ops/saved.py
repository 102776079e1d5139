"""What an autograd node keeps of its forward's arguments and of y, as csrc/saved.h does for nodes in C++.

In-place changes between forward and backward are an error only in what backward reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .schema import LayerShape


def traced(x: Tensor) -> bool:
    """Whether x is of a subclass, as under torch.compile: a graph cannot ask for versions when it runs."""
    return torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def read_by_backward(x: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]) -> list[bool]:
    """Which of x, h0, c0, *weights the backward op reads, where `needs` of them are wanted.

    Biases never; x and h0 for the gradients of the weights that they are multiplied by, and those weights the other
    way round. h_{t-1}'s gradient takes weight_hh in every step but the first.
    """
    shape = LayerShape.of(list(weights))
    n = shape.per_direction
    ih, hh = any(needs[3::n]), any(needs[4::n])
    biases = range(2, 4) if shape.bias else ()
    hr = n - 1 if shape.proj else -1
    gates = needs[0] or needs[1] or any(need for k, need in enumerate(needs[3:]) if k % n != hr)
    read = [ih, hh, gates]
    for k in range(len(weights)):
        role = k % n
        if role == 0:
            read.append(needs[0])
        elif role == 1:
            read.append(needs[1] or x.dim() == 2 or x.shape[0] > 1)
        else:
            read.append(role not in biases)
    return read


def save(ctx: Any, inputs: Sequence[Tensor | None], read: Sequence[bool], *others: Tensor | None) -> None:
    """Keep `inputs` and `others`; of inputs that backward does not read an alias, whose version nobody changes."""
    ctx.unread = [None if is_read else t for t, is_read in zip(inputs, read, strict=True)]
    ctx.versions = _versions(ctx.unread)
    kept = (t if t is None or is_read else t.data for t, is_read in zip(inputs, read, strict=True))
    ctx.save_for_backward(*kept, *others)


def restore(ctx: Any, n: int) -> tuple[list[Any], list[Any]]:
    """The n inputs and the others of `save`, for the backward op."""
    saved = ctx.saved_tensors
    # An input that was changed may lead back to this node, which would then never be freed. Under compiled autograd
    # whatever is not among saved_tensors would break the graph.
    if not is_compiling() and ctx.unread is not None and _versions(ctx.unread) != ctx.versions:
        ctx.unread = None
    return list(saved[:n]), list(saved[n:])


def originals(ctx: Any, inputs: Sequence[Any]) -> list[Any]:
    """The inputs as autograd knows them, for the differentiable formula, which reads them all.

    Raises RuntimeError where one that the backward op does not read has been changed.
    """
    if ctx.unread is None or _versions(ctx.unread) != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: an "
            "argument of an LSTM layer, which the gradient of its gradient reads"
        )
    return [t if original is None else original for t, original in zip(inputs, ctx.unread, strict=True)]


def output(ctx: Any, y: Tensor) -> Tensor:
    """What `save` is to keep of y, so that changing y in place is no error."""
    ctx.output = y.detach()  # shares y's version counter
    ctx.output.data = y.new_empty(0)  # but not its memory, which a saved-tensor hook may free
    ctx.output_version = y._version
    return y.data


def output_as_kept(ctx: Any, y: Tensor | None, x: Tensor) -> Tensor:
    """y for the backward op: [0] where it was changed since `output`, or where that cannot be told."""
    if y is None or is_compiling() or ctx.output._version != ctx.output_version:
        return x.new_empty(0)
    return y


def _versions(tensors: Sequence[Tensor | None]) -> int:
    """Versions only rise: the sum is as it was where each one is."""
    return sum(0 if t is None or t.is_inference() else t._version for t in tensors)
