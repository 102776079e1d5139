"""A layer under torch.func: `layer` gives vmap, grad, vjp and jacrev the speed of the backends' own ops.

- vmap over rows (x, states, lengths, masks) folds the mapped dimension into the batch: one call of the op.
- vmap over weights (an ensemble) calls the op once for each member.
- vmap(grad) over rows (per-sample gradients) runs one backward pass over the folded batch and one batched product for
  each weight (backends/eager.py with `groups`).
- A gradient of a gradient is that of the reference, which also runs forward-mode AD (fastlstm/dispatch.py).

What the arguments mean is said in fastlstm/ops/schema.py. torch.func wants tensors one by one: `_Layer` takes
`LayerInputs.flat()`, and `_Backward` [dy, dh_n, dc_n, dcells, y, cells, reserve] before that.
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
from .ops.schema import BATCH_DIMS, LayerInputs, LayerShape, OutputGradients, arguments, wanted_gradients


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


def layer(backend: str, inputs: LayerInputs, keep_cells: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and cells of one layer under any transform but those of `plain_ops_only`."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    keep_reserve = any(level.key() == TransformType.Grad for level in stack)
    call = _Call(backend, keep_cells, keep_reserve)
    y, h_n, c_n, cells, _ = _Layer.apply(*call.of(inputs.flat()))
    return y, h_n, c_n, cells


def _below(call: _Call, inputs: LayerInputs) -> tuple[Tensor, ...]:
    """The results of `_Layer` for inputs that have one transform less; the op itself below the last one."""
    if transform_active():
        return _Layer.apply(*replace(call, keep_cells=True).of(inputs.flat()))
    keep_reserve = call.keep_reserve or _differentiated(*inputs.differentiable)
    return call.forward(*arguments(inputs, True, keep_reserve))


def _backward_below(call: _Call, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The same for `_Backward`."""
    call, *given = call.of(tensors)
    if transform_active() or _differentiated(*given):
        return _Backward.apply(call, *given)
    return _Backward.forward(call, *given)


def _parts(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], LayerInputs]:
    """The gradients that arrive, (y, cells, reserve) and the inputs, from one value for each of `_Backward`'s."""
    return values[:4], values[4:7], LayerInputs.from_flat(values[7:])


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _fold(t: Tensor | None, dim: int | None, N: int, rows: int) -> Tensor | None:
    """t with its mapped dimension `dim` of size N, or none, merged with dimension `rows`: N outermost."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(N, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, rows).flatten(rows, rows + 1)


def _folded(inputs: LayerInputs, dims: LayerInputs, N: int) -> list[Tensor | None]:
    """`inputs.flat()`, all but the weights folded."""
    pairs = zip(inputs.flat(), dims.flat(), BATCH_DIMS.flat(), strict=False)
    return [*(_fold(t, d, N, rows) for t, d, rows in pairs), *inputs.weights]


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
        return call.forward(*arguments(LayerInputs.from_flat(call.spread(given)), True, True))

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
    def backward(ctx, *grads):
        grads = grads[:4]
        y, cells, reserve, *given = ctx.saved_tensors
        flat = ctx.call.spread(given)
        inputs = LayerInputs.from_flat(flat)
        needs = LayerInputs.from_flat(ctx.call.spread(ctx.needs_input_grad[1:], absent=False)).differentiable
        if not transform_active() and has_batched_or_dual_grads(*grads):
            found = differentiable_backward(grads, inputs, needs)
        else:
            call = _Call(ctx.call.backend, needs=tuple(needs))
            dx, dh0, dc0, *dw = _backward_below(call, [*grads, y, cells, reserve, *flat])
            found = dx, dh0, dc0, dw
        of_all = wanted_gradients(needs, *found)
        return (None, *(g for g, here in zip(of_all, ctx.call.present, strict=True) if here))

    @staticmethod
    def vmap(info, in_dims, call, *given):
        N, flat, flat_dims = info.batch_size, call.spread(given), call.spread(in_dims[1:])
        inputs, dims = LayerInputs.from_flat(flat), LayerInputs.from_flat(flat_dims)
        if any(d is not None for d in dims.weights):
            return _stacked([_below(call, LayerInputs.from_flat(member)) for member in _each(flat, flat_dims, N)])
        *results, reserve = _below(call, LayerInputs.from_flat(_folded(inputs, dims, N)))
        # The reserve's layout is the backend's own, so it stays folded.
        return (*(_unfold(t, N, 1) for t in results), reserve), (1, 1, 1, 1, None)


class _Backward(torch.autograd.Function):
    """The backward op. Gives dx, dh0, dc0 and each weight's gradient, [0] where `call.needs` does not want it."""

    @staticmethod
    def forward(call, *given):
        grads, (y, cells, reserve), inputs = _parts(call.spread(given))
        op, needs, groups = call.backward, call.needs, call.groups
        x, w = inputs.x, inputs.weights
        shape = LayerShape.of(w)
        if not groups:
            dx, dh0, dc0, dw = op(*grads, *arguments(inputs, y, cells, reserve, list(needs)))
        elif call.backend == "eager" or shape.proj or shape.norm:
            none = reserve if call.backend == "eager" else reserve.new_empty(0)
            dx, dh0, dc0, dw = eager.backward(grads, inputs, y, cells, none, list(needs), groups)
        else:
            only_rows = [True, *needs[1:3], *[False] * len(w), True]  # dgates in place of dx
            dgates, dh0, dc0, _ = op(*grads, *arguments(inputs, y, cells, reserve, only_rows))
            dx = dgates @ torch.cat(w[:: shape.per_direction]) if needs[0] else x.new_empty(0)
            dw = eager.weight_gradients_of_groups(dgates, inputs, y, needs, groups)
        return (dx, dh0, dc0, *dw)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx, *cotangents):
        """By the reference, and so differentiable again. y, cells and reserve are functions of the other tensors."""
        grads, _, inputs = _parts(ctx.call.spread(ctx.saved_tensors))
        given = [*grads, *inputs.differentiable]
        present = [k for k, t in enumerate(given) if t is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(given)
            for k, t in zip(present, tensors, strict=True):
                full[k] = t
            return _grouped(ctx.call, full[:4], inputs.with_differentiable(full[4:]))

        wanted = [g for g, need in zip(cotangents, ctx.call.needs, strict=True) if need]
        pull: Callable[..., Any] = torch.func.vjp(gradients, *(given[k] for k in present))[1]
        found: list[Any] = [None] * len(given)
        for k, grad in zip(present, pull(tuple(wanted)), strict=True):
            found[k] = grad
        of_inputs = LayerInputs(found[4], found[5], found[6], found[7:]).flat()
        of_all = (*found[:4], None, None, None, *of_inputs)
        return (None, *(g for g, here in zip(of_all, ctx.call.present, strict=True) if here))

    @staticmethod
    def vmap(info, in_dims, call, *given):
        N, groups = info.batch_size, call.groups
        tensors, dims = call.spread(given), call.spread(in_dims[1:])
        inputs, input_dims, reserve, reserve_dim = _parts(tensors)[2], _parts(dims)[2], tensors[6], dims[6]
        computed_from = (*dims[4:6], *dims[7:])
        looped = reserve_dim is not None or any(d is not None for d in input_dims.weights)
        if looped or all(d is None for d in computed_from):  # an ensemble, or many gradients of one output (jacrev)
            return _stacked([_backward_below(call, args) for args in _each(tensors, dims, N)])
        folded = [_fold(t, d, N, 1) for t, d in zip(tensors[:6], dims[:6], strict=True)]
        call_below = replace(call, groups=N * (groups or 1))
        found = _backward_below(call_below, [*folded, reserve, *_folded(inputs, input_dims, N)])
        results = []
        for k, (grad, need) in enumerate(zip(found, call.needs, strict=True)):
            if not need:
                results.append(grad.new_empty(N, 0))
            elif k < 3:
                results.append(_unfold(grad, N, 1).movedim(1, 0))
            else:
                results.append(_unfold(grad, N, 0) if groups else grad)
        return tuple(results), (0,) * len(results)


def _grouped(call: _Call, grads: OutputGradients, inputs: LayerInputs) -> Any:
    """_Backward's wanted results by the reference."""
    groups, needs = call.groups, call.needs
    if not groups:
        return _reference_gradients(needs, grads, inputs)
    tensors, rows = [*grads, *inputs._replace(weights=[]).flat()], [1, 1, 1, 1, *BATCH_DIMS.flat()]
    split = [None if t is None else _unfold(t, groups, r) for t, r in zip(tensors, rows, strict=True)]
    dims = [None if t is None else r for t, r in zip(split, rows, strict=True)]

    def one(member: list[Any]) -> Any:
        return _reference_gradients(needs, member[:4], LayerInputs.from_flat([*member[4:], *inputs.weights]))

    found = torch.vmap(one, in_dims=(dims,))(split)
    of_rows = sum(needs[:3])
    return tuple(g.movedim(0, 1).flatten(1, 2) if k < of_rows else g for k, g in enumerate(found))


def _reference_gradients(needs: tuple[bool, ...], grads: OutputGradients, inputs: LayerInputs) -> tuple[Tensor, ...]:
    tensors = inputs.differentiable
    wanted = [k for k, need in enumerate(needs) if need]

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for k, t in zip(wanted, chosen, strict=True):
            full[k] = t
        results = reference.layer(*inputs.with_differentiable(full))
        return tuple(out for out, grad in zip(results, grads, strict=True) if grad is not None)

    pull: Callable[..., Any] = torch.func.vjp(outputs, *(tensors[k] for k in wanted))[1]
    return pull(tuple(grad for grad in grads if grad is not None))
