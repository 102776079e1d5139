"""Makes a backend's two kernels PyTorch ops: schema, fake kernels and autograd formula, stated once for all backends.

`define(backend)` declares `fastlstm::<backend>_layer` and its backward. A backend written in Python hands its kernels
over; the native one registers its own from C++, its autograd node included (csrc/autograd.cpp), because a node in C++
costs a third of one in Python and call overhead decides tiny sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ragged import PackedLayout
from . import saved
from .check import check, check_backward, check_range
from .modes import forward_ad_active
from .schema import (
    BACKWARD,
    FORWARD,
    GRADIENTS,
    INPUTS,
    MASKS,
    LayerInputs,
    LayerShape,
    OutputGradients,
    arguments,
    backward_outputs,
    bundled,
    forward_outputs,
    wanted_gradients,
)

LIBRARY = torch.library.Library("fastlstm", "DEF")

# The native backend's activated gates [D, T, B, 4H], i f g o, from its reserve, for `differentiable_backward`.
LIBRARY.define(
    "native_gates(Tensor reserve, Tensor x, Tensor[] weights, Tensor? lengths) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(
    "fastlstm::native_gates", lambda reserve, x, weights, lengths: torch.empty_like(reserve), lib=LIBRARY
)

Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None", "list[Tensor | None]"]


def define(backend: str, forward: Callable[..., Any] | None = None, backward: Callable[..., Any] | None = None) -> None:
    """Declare the ops `fastlstm::<backend>_layer` and `..._layer_backward`, with fake kernels and autograd formula.

    Args:
        backend: the backend's NAME.
        forward: its forward kernel if it is written in Python: (inputs: LayerInputs, keep_cells, keep_reserve), with
            the results of `fastlstm.ops.schema.FORWARD`.
        backward: its backward kernel: (grads: the gradients of y, h_n, c_n and cells, inputs: LayerInputs, y, cells,
            reserve, needs), with the results of `fastlstm.ops.schema.BACKWARD`. Both are None for a backend that
            registers its kernels from C++.

    Example:
        The last line of `fastlstm/backends/eager.py`: `register.define(NAME, forward, backward)`.
    """
    layer, layer_backward = f"{backend}_layer", f"{backend}_layer_backward"
    may_be_packed = forward is None
    for name, schema, fake in ((layer, FORWARD, _fake_forward), (layer_backward, BACKWARD, _fake_backward)):
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastlstm::{name}", partial(fake, may_be_packed), lib=LIBRARY)
    if forward is not None and backward is not None:
        LIBRARY.impl(layer, without_autocast(partial(_forward, forward)), "CompositeExplicitAutograd")
        LIBRARY.impl(layer_backward, without_autocast(partial(_backward, backward)), "CompositeExplicitAutograd")
        differentiable(layer, _layer_node(getattr(torch.ops.fastlstm, layer_backward).default))


def differentiable(name: str, node: type[torch.autograd.Function]) -> None:
    """Make `node` the autograd formula of the op `name`.

    It is applied to the op below autograd and the op's arguments, with `LayerInputs.flat()` at the end. The op's last
    argument says whether to keep what backward reads: here it is True whatever the caller said, so that what a trace
    records of a call does not depend on the grad mode of the moment. torch.library.register_autograd cannot do that.
    """
    op = getattr(torch.ops.fastlstm, name).default
    node = type(name, (node,), {})  # profilers show the name
    x_at = [argument.name for argument in op._schema.arguments].index("x")

    def run(keyset: Any, *args: Any) -> Any:
        def call(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return call(*args)
        before, inputs, after = bundled(args, 2, x_at)
        return node.apply(call, *before, *after[:-1], True, *inputs.flat())

    LIBRARY.impl(name, run, "Autograd", with_keyset=True)


def _forward(kernel: Callable[..., Any], *args: Any) -> Any:
    _, inputs, keep = bundled(args, 2)
    check(inputs)
    check_range(inputs.lengths, inputs.x.shape[0])
    return kernel(inputs, *keep)


def _backward(kernel: Callable[..., Any], *args: Any) -> Any:
    grads, inputs, others = bundled(args, 4, 4)
    check_backward(grads, inputs, *others)
    check_range(inputs.lengths, inputs.x.shape[0])
    return kernel(grads, inputs, *others)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs are cast before the op; inside, and in a backward called under autocast, dtypes stay as they are."""

    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return kernel(*args)
        x = next(
            arg.x if isinstance(arg, LayerInputs) else arg for arg in args if isinstance(arg, (LayerInputs, Tensor))
        )
        with torch.autocast(x.device.type, enabled=False):
            return kernel(*args)

    return run


def _fake_forward(may_be_packed: bool, *args: Any) -> Any:
    _, inputs, keep = bundled(args, 2)
    check(inputs, may_be_packed)
    return forward_outputs(inputs, *keep)


def _fake_backward(may_be_packed: bool, *args: Any) -> Any:
    grads, inputs, (y, cells, reserve, needs) = bundled(args, 4, 4)
    check_backward(grads, inputs, y, cells, reserve, needs, may_be_packed)
    return backward_outputs(inputs, needs)


# The keys of torch.autograd.grad's own vmap and of torch.func's; the first has no name in Python.
_BATCHED = [torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched")]


def needs_differentiable_backward(*grads: Tensor | None) -> bool:
    """Return True if `differentiable_backward` must take these gradients, not the op, as csrc/autograd.cpp decides.

    It must with create_graph=True, and where the op has no rule for them.
    """
    return torch.is_grad_enabled() or has_batched_or_dual_grads(*grads)


def has_batched_or_dual_grads(*grads: Tensor | None) -> bool:
    """Return True if many gradients arrive as one (is_grads_batched=True), or under forward-mode AD.

    The plain ops of the reference have rules for these.
    """
    if forward_ad_active():
        return True
    keys = [torch._C._dispatch_keys(grad) for grad in grads if grad is not None]
    return any(held.has(key) for held in keys for key in _BATCHED)


def _layer_node(backward_op: Any) -> type[torch.autograd.Function]:
    """The autograd node of a backend's forward op; csrc/autograd.cpp has the native one's."""

    class LayerNode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, keep_cells, keep_reserve, *flat):
            inputs = LayerInputs.from_flat(flat)
            results = call(*arguments(inputs, keep_cells, keep_reserve))
            y, _, _, cells, reserve = results
            traced = saved.traced(inputs.x)
            needs = LayerInputs.from_flat(ctx.needs_input_grad[3:]).differentiable
            read = [True] * len(needs) if traced else saved.read_by_backward(inputs, needs)
            y_kept = None if traced else saved.output(ctx, y)
            saved.save(ctx, inputs, read, cells, reserve, y_kept)
            # Else an unused reserve would arrive in backward as a T*B*4H buffer of zeros.
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*([reserve] if keep_cells else [cells, reserve]))
            return results

        @staticmethod
        def backward(ctx, *grads):
            grads = grads[:4]
            needs = LayerInputs.from_flat(ctx.needs_input_grad[3:]).differentiable
            inputs, (cells, reserve, y) = saved.restore(ctx)
            if needs_differentiable_backward(*grads):
                found = differentiable_backward(grads, saved.connected(ctx, inputs), needs, reserve, cells)
            else:
                y = saved.output_as_kept(ctx, y, inputs.x)
                found = backward_op(*grads, *arguments(inputs, y, cells, reserve, needs))
            return (None, None, None, *wanted_gradients(needs, *found))

    return LayerNode


@without_autocast
def differentiable_backward(
    grads: OutputGradients,
    inputs: LayerInputs,
    needs: Sequence[bool],
    gates: Tensor | None = None,
    cells: Tensor | None = None,
) -> Gradients:
    """Backward if `needs_differentiable_backward`: the reference's gradients, themselves differentiable to any order.

    With the activated gates [D, T, B, 4H] and cells of forward it needs the values of those inputs alone that the
    backward op reads, as nn.LSTM's per-step graph does; the others may have changed or be placeholders.
    """
    again = torch.is_grad_enabled()
    if LayerShape.of(inputs.weights).norm:  # the gradient of a normalization reads all that it is computed from
        gates = cells = None
    with torch.enable_grad():
        # Views, so that a tensor given in two roles gets its own gradient for each.
        views = [None if t is None else t.view_as(t) for t in inputs.differentiable]
        wanted = [t for t, need in zip(views, needs, strict=True) if need and t is not None]
        # Of half precision only stored values are rounded, as in the kernels: here the gates and cells, by forward.
        compute = torch.promote_types(inputs.x.dtype, torch.float32)
        inputs = inputs.with_differentiable([None if t is None else t.to(compute) for t in views])
        x, lengths = inputs.x, inputs.lengths
        if x.dim() == 3 or lengths is None:
            outputs = reference.layer(*inputs, known=_known(gates, cells, lengths))
        else:  # packed rows
            layout = PackedLayout.of_lengths(lengths)
            if gates is not None and cells is not None:
                gates, cells = torch.stack([layout.pad(part) for part in gates]), layout.pad(cells)
            known = _known(gates, cells, lengths)
            y, h_n, c_n, cells = reference.layer(*inputs._replace(x=layout.pad(x)), known=known)
            outputs = layout.pack(y), h_n, c_n, layout.pack(cells)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    outs, arriving = [p[0] for p in pairs], [p[1].to(compute) for p in pairs]
    found = iter(torch.autograd.grad(outs, wanted, arriving, create_graph=again, allow_unused=True))
    flat = [next(found) if need else None for need in needs]
    return flat[0], flat[1], flat[2], flat[3:]


def _known(gates: Tensor | None, cells: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The pre-activations and cells that reference.layer takes, from the activated gates.

    A saturated gate gives an infinite pre-activation: its activation is the same value and passes no gradient.
    """
    if gates is None or cells is None:
        return None
    compute = torch.promote_types(gates.dtype, torch.float32)
    gates, cells = gates.detach().to(compute), cells.detach().to(compute)
    if lengths is not None:  # past them gates are uninitialized
        gates = gates.masked_fill(
            (torch.arange(gates.shape[1], device=gates.device)[:, None] >= lengths)[..., None], 0.5
        )
    i, f, g, o = gates.chunk(4, dim=-1)
    return torch.cat([i.logit(), f.logit(), g.atanh(), o.logit()], dim=-1), cells


def _differentiable_backward_op(*args: Any) -> Any:
    """The same for the autograd node in C++, where every result is a tensor; zeros stand for None."""
    grads, inputs, (gates, cells, needs) = bundled(args, 3, 4)
    dx, dh0, dc0, dw = differentiable_backward(grads, inputs, needs, gates, cells)
    flat = [
        inputs.x.new_empty(0) if not need else torch.zeros_like(t) if grad is None else grad
        for grad, need, t in zip([dx, dh0, dc0, *dw], needs, inputs.differentiable, strict=True)
    ]
    return flat[0], flat[1], flat[2], flat[3:]


LIBRARY.define(
    f"differentiable_backward({GRADIENTS}, {INPUTS}, Tensor? gates, Tensor? cells, bool[] needs, {MASKS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])"
)
# The last two for gradients that arrive batched, by torch.autograd.grad's own vmap or by torch.func's.
for _key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatchedDecomposition"):
    LIBRARY.impl("differentiable_backward", _differentiable_backward_op, _key)


def _grouped_products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    a, b = (
        t.unflatten(1, (groups, t.shape[1] // groups)).transpose(0, 1).flatten(1, 2) for t in (a, b)
    )  # [groups, T * rows, .]
    return a.transpose(1, 2) @ b


# The sums, over steps and the rows of each of `groups` parts of the batch, of a's [T, B, m] outer products with b's
# [T, B, n]: [groups, m, n]. csrc/cpu/layer.cpp has a kernel for CPU tensors, of float32 and float64 alone: gradients
# are computed in no other type.
LIBRARY.define("grouped_products(Tensor a, Tensor b, int groups) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("grouped_products", _grouped_products, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastlstm::grouped_products", lambda a, b, groups: a.new_empty(groups, a.shape[2], b.shape[2]), lib=LIBRARY
)


# Flags of which each is True with probability p, by the bits of seed [1] int64. For CPU tensors, by csrc/cpu/layer.cpp:
# seed comes from torch's generator, which would take longer for all flags than a small layer takes.
LIBRARY.define("random_flags(Tensor seed, SymInt[] size, float p) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake(
    "fastlstm::random_flags", lambda seed, size, p: seed.new_empty(size, dtype=torch.bool), lib=LIBRARY
)


def _packed_lengths(batch_sizes: Tensor) -> Tensor:
    rises = batch_sizes[1:] > batch_sizes[:-1]
    if rises.any():  # a RuntimeError in nn.LSTM, too, whose states have too few rows then
        step = int(rises.int().argmax())
        before, after = batch_sizes[step : step + 2].tolist()
        raise RuntimeError(f"batch_sizes must not rise, got {before} rows in step {step} and {after} in the next")
    # batch_sizes falls with t, so row b's length is the number of steps with more than b rows.
    return torch.searchsorted(-batch_sizes, -torch.arange(int(batch_sizes[0]), device=batch_sizes.device))


# The lengths [B] of a PackedSequence's rows, longest first, from its batch_sizes [T]. An op, since B is a value that a
# trace would take for a constant.
LIBRARY.define("packed_lengths(Tensor batch_sizes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("packed_lengths", _packed_lengths, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastlstm::packed_lengths",
    lambda batch_sizes: batch_sizes.new_empty(torch.library.get_ctx().new_dynamic_size()),
    lib=LIBRARY,
)
