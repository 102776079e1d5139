"""A layer under torch.func: `layer` gives vmap, grad, vjp and jacrev the speed of the backends' own ops.

- vmap over rows (x, states, lengths, masks) folds the mapped dimension into the batch: one call of the op.
- vmap over weights (an ensemble) calls the op once for each member.
- vmap(grad) over rows (per-sample gradients) runs one backward pass over the folded batch and one batched product for
  each weight (backends/eager.py with `groups`).
- A gradient of a gradient is that of the reference, which also runs forward-mode AD (fastlstm/dispatch.py).

What the arguments mean is said in fastlstm/ops/schema.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from . import reference
from .backends import eager
from .ops.modes import forward_ad_active, transform_active
from .ops.register import differentiable_backward, has_batched_or_dual_grads
from .ops.schema import LayerShape


@dataclass(frozen=True)
class _Call:
    """The arguments of a call except its tensors, as one object: torch.func flattens the arguments at every level."""

    backend: str
    keep_cells: bool = False
    keep_reserve: bool = False
    needs: tuple[bool, ...] = ()  # of backward
    groups: int = 0  # of backward; as in backends/eager.py
    present: tuple[bool, ...] = ()  # which tensors are given: torch.func takes time for every argument, None or not

    @property
    def forward(self) -> Any:
        return getattr(torch.ops.fastlstm, f"{self.backend}_layer").default

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.fastlstm, f"{self.backend}_layer_backward").default

    def of(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The arguments of `_Layer` and `_Backward` for these tensors."""
        return replace(self, present=tuple(t is not None for t in tensors)), *(t for t in tensors if t is not None)

    def spread(self, given: Sequence[Any], absent: Any = None) -> list[Any]:
        """One entry for each tensor of `of`, `absent` for those that are None, from one for each that is not."""
        entries = iter(given)
        return [next(entries) if here else absent for here in self.present]


def plain_ops_only() -> bool:
    """Return True under forward-mode AD (torch.func.jvp, a dual level) or functionalize: no rule is here for them."""
    if forward_ad_active():
        return True
    refused = (TransformType.Jvp, TransformType.Functionalize)
    return any(level.key() in refused for level in torch._C._functorch.get_interpreter_stack() or ())


def layer(
    backend: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    keep_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and cells of one layer under any transform but those of `plain_ops_only`."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    keep_reserve = any(level.key() == TransformType.Grad for level in stack)
    call = _Call(backend, keep_cells, keep_reserve)
    y, h_n, c_n, cells, _ = _Layer.apply(*call.of((x, h0, c0, lengths, reset_mask, *weights)))
    return y, h_n, c_n, cells


def _below(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The results of `_Layer` for tensors that have one transform less; the op itself below the last one."""
    if transform_active():
        return _Layer.apply(*replace(call, keep_cells=True).of(tensors))
    x, h0, c0, lengths, reset_mask, *weights = tensors
    keep_reserve = call.keep_reserve or _differentiated(x, h0, c0, *weights)
    return call.forward(x, h0, c0, weights, lengths, reset_mask, True, keep_reserve)


def _backward_below(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The same for `_Backward`."""
    call, *given = call.of(tensors)
    if transform_active() or _differentiated(*given):
        return _Backward.apply(call, *given)
    return _Backward.forward(call, *given)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fold(t: Tensor | None, dim: int | None, N: int, rows: int) -> Tensor | None:
    """t with its mapped dimension `dim` of size N, or none, merged with dimension `rows`: N outermost."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(N, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, rows).flatten(rows, rows + 1)


def _unfold(t: Tensor, N: int, rows: int) -> Tensor:
    return t.unflatten(rows, (N, t.shape[rows] // N))


def _each(args: Sequence[Any], dims: Sequence[Any], N: int) -> list[list[Any]]:
    """The N argument lists of a mapped call."""
    return [[a if d is None else a.select(d, k) for a, d in zip(args, dims, strict=True)] for k in range(N)]


def _stacked(results: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


class _Layer(torch.autograd.Function):
    """The forward op: y, h_n, c_n, cells, reserve."""

    @staticmethod
    def forward(call, *given):
        x, h0, c0, lengths, reset_mask, *weights = call.spread(given)
        return call.forward(x, h0, c0, weights, lengths, reset_mask, True, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *given = inputs
        y, _, _, cells, reserve = output
        # A copy: y itself would refuse in-place changes, and wrapped tensors share no version counter by which backward
        # could notice one, as csrc/saved.h does. Only a transform that differentiates gets here.
        ctx.save_for_backward(y.clone(), cells, reserve, *given)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([reserve] if ctx.call.keep_cells else [cells, reserve]))

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dcells, _):
        y, cells, reserve, *given = ctx.saved_tensors
        x, h0, c0, lengths, reset_mask, *weights = ctx.call.spread(given)
        need = ctx.call.spread(ctx.needs_input_grad[1:], absent=False)
        needs = (*need[:3], *need[5:])
        arriving, inputs, ragged = (dy, dh_n, dc_n, dcells), (x, h0, c0), (lengths, reset_mask)
        if torch._C._functorch.maybe_current_level() is None and has_batched_or_dual_grads(*arriving):
            *of_rows, of_weights = differentiable_backward(*arriving, *inputs, weights, *ragged, list(needs))
            found = (*of_rows, *of_weights)
        else:
            call = _Call(ctx.call.backend, needs=needs)
            found = _backward_below(call, *arriving, *inputs, *ragged, y, cells, reserve, *weights)
        dx, dh0, dc0, *dw = [g if wanted else None for g, wanted in zip(found, needs, strict=True)]
        of_all = (dx, dh0, dc0, None, None, *dw)
        return (None, *(g for g, here in zip(of_all, ctx.call.present, strict=True) if here))

    @staticmethod
    def vmap(info, in_dims, call, *given):
        N, dims, tensors = info.batch_size, call.spread(in_dims[1:]), call.spread(given)
        if any(d is not None for d in dims[5:]):
            return _stacked([_below(call, *member) for member in _each(tensors, dims, N)])
        folded = [_fold(t, d, N, rows) for t, d, rows in zip(tensors[:5], dims, (1, 1, 1, 0, 1), strict=False)]
        *results, reserve = _below(call, *folded, *tensors[5:])
        # The reserve's layout is the backend's own, so it stays folded.
        return (*(_unfold(t, N, 1) for t in results), reserve), (1, 1, 1, 1, None)


class _Backward(torch.autograd.Function):
    """The backward op. Gives dx, dh0, dc0 and each weight's gradient, [0] where `call.needs` does not want it."""

    @staticmethod
    def forward(call, *given):
        dy, dh_n, dc_n, dcells, x, h0, c0, lengths, reset_mask, y, cells, reserve, *w = call.spread(given)
        op, needs, groups = call.backward, call.needs, call.groups
        arriving, states, ragged = (dy, dh_n, dc_n, dcells), (h0, c0), (lengths, reset_mask)
        shape = LayerShape.of(w)
        if not groups:
            dx, dh0, dc0, dw = op(*arriving, x, *states, w, *ragged, y, cells, reserve, list(needs))
        elif call.backend == "eager" or shape.proj:
            none = reserve if call.backend == "eager" else reserve.new_empty(0)
            dx, dh0, dc0, dw = eager.backward(*arriving, x, *states, w, *ragged, y, cells, none, list(needs), groups)
        else:
            # The op's dx is dgates W_ih, and it reads neither x nor W_ih for anything else: the identity gives dgates.
            swapped, n, width = list(w), shape.per_direction, shape.D * 4 * shape.H
            swapped[::n] = torch.eye(width, dtype=x.dtype, device=x.device).chunk(shape.D)
            like_x = x.new_empty(1, 1, 1).expand(*x.shape[:2], width)
            only_rows = [True, *needs[1:3], *[False] * len(w)]
            dgates, dh0, dc0, _ = op(*arriving, like_x, *states, swapped, *ragged, y, cells, reserve, only_rows)
            dx = dgates @ torch.cat(w[::n]) if needs[0] else x.new_empty(0)
            dw = eager.weight_gradients_of_groups(dgates, x, h0, w, *ragged, y, needs, groups)
        return (dx, dh0, dc0, *dw)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx, *cotangents):
        """By the reference, and so differentiable again. y, cells and reserve are functions of the other tensors."""
        tensors = ctx.call.spread(ctx.saved_tensors)
        dy, dh_n, dc_n, dcells, x, h0, c0, lengths, reset_mask, _, _, _, *weights = tensors
        given = [dy, dh_n, dc_n, dcells, x, h0, c0, *weights]
        present = [k for k, t in enumerate(given) if t is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(given)
            for k, t in zip(present, tensors, strict=True):
                full[k] = t
            return _grouped(ctx.call, full, lengths, reset_mask)

        wanted = [g for g, need in zip(cotangents, ctx.call.needs, strict=True) if need]
        pull: Callable[..., Any] = torch.func.vjp(gradients, *(given[k] for k in present))[1]
        found: list[Any] = [None] * len(given)
        for k, grad in zip(present, pull(tuple(wanted)), strict=True):
            found[k] = grad
        of_all = (*found[:7], None, None, None, None, None, *found[7:])
        return (None, *(g for g, here in zip(of_all, ctx.call.present, strict=True) if here))

    @staticmethod
    def vmap(info, in_dims, call, *given):
        N, groups = info.batch_size, call.groups
        dims, tensors = call.spread(in_dims[1:]), call.spread(given)
        x_to_cells = (*dims[4:9], *dims[9:11])
        looped = dims[11] is not None or any(d is not None for d in dims[12:]) or all(d is None for d in x_to_cells)
        if looped:  # an ensemble, or many gradients of one output (jacrev)
            return _stacked([_backward_below(call, *args) for args in _each(tensors, dims, N)])
        rows = (1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1)
        folded = [_fold(t, d, N, r) for t, d, r in zip(tensors[:11], dims, rows, strict=False)]
        found = _backward_below(replace(call, groups=N * (groups or 1)), *folded, *tensors[11:])
        results = []
        for k, (grad, need) in enumerate(zip(found, call.needs, strict=True)):
            if not need:
                results.append(grad.new_empty(N, 0))
            elif k < 3:
                results.append(_unfold(grad, N, 1).movedim(1, 0))
            else:
                results.append(_unfold(grad, N, 0) if groups else grad)
        return tuple(results), (0,) * len(results)


def _grouped(call: _Call, given: list[Any], lengths: Any, reset_mask: Any) -> Any:
    """_Backward's wanted results by the reference, from dy, dh_n, dc_n, dcells, x, h0, c0 and the weights."""
    groups, needs = call.groups, call.needs
    if not groups:
        return _reference_gradients(needs, given, lengths, reset_mask)

    def split(t: Tensor | None, rows: int) -> Tensor | None:
        return None if t is None else _unfold(t, groups, rows)

    rows = [split(t, 1) for t in given[:7]]
    one: Callable[..., Any] = lambda r, n, m: _reference_gradients(needs, [*r, *given[7:]], n, m)  # noqa: E731
    dims = ([None if t is None else 1 for t in rows], None if lengths is None else 0, None if reset_mask is None else 1)
    found = torch.vmap(one, in_dims=dims)(rows, split(lengths, 0), split(reset_mask, 1))
    of_rows = sum(needs[:3])
    return tuple(g.movedim(0, 1).flatten(1, 2) if k < of_rows else g for k, g in enumerate(found))


def _reference_gradients(
    needs: tuple[bool, ...], given: list[Any], lengths: Tensor | None, reset_mask: Tensor | None
) -> tuple[Tensor, ...]:
    arriving, inputs = given[:4], given[4:]
    wanted = [k for k, need in enumerate(needs) if need]

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for k, t in zip(wanted, chosen, strict=True):
            full[k] = t
        results = reference.layer(full[0], full[1], full[2], full[3:], lengths, reset_mask)
        return tuple(out for out, grad in zip(results, arriving, strict=True) if grad is not None)

    pull: Callable[..., Any] = torch.func.vjp(outputs, *(inputs[k] for k in wanted))[1]
    return pull(tuple(grad for grad in arriving if grad is not None))
