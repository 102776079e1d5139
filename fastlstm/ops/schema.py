"""The contract every backend implements: one LSTM layer over a whole sequence, all its directions.

Two ops per backend, `fastlstm::<backend>_layer` and `fastlstm::<backend>_layer_backward`, share the schemas below.

Sizes: T steps, B rows, I input features, H hidden units, P features of h (proj_size, or H without projection),
D directions (1, or 2 with the reverse direction second). Gates in the order i, f, g, o, as torch.nn.LSTM stores them.

Forward takes::

  x            [T, B, I]
  h0, c0       [D, B, P], [D, B, H], or None for zeros
  weights      per direction weight_ih [4H, I], weight_hh [4H, P]; bias_ih [4H]
               and bias_hh [4H] unless bias-free; with layer normalization gain and
               bias of W_ih x [4H], of W_hh h [4H] and of c [H]; weight_hr [P, H]
               with projection only; the reverse direction's after the forward one's
  lengths      [B] int64 on x's device, or None. Row b has lengths[b] valid steps,
               0 allowed. Past them x may hold anything, NaN included
  reset_mask   [T, B] bool on x's device, or None. True at t: step t begins a new
               sequence in that row
  recurrent_mask  [D, T, B, P] of x's dtype, or None: h_{t-1} is multiplied by it
               where it enters W_hh in step t, and nowhere else
  zoneout_h, zoneout_c  [D, T, B, P] and [D, T, B, H], or None: the share of h_{t-1}
               and c_{t-1} in h_t and c_t. bool, or numbers in [0, 1] of x's dtype.
               h_t's other share is that of the cell's own result, which is
               computed from c before its zoneout
  keep_cells   whether `cells` is wanted
  keep_reserve whether what backward reads (reserve and cells) is wanted. A call
               that autograd records keeps it whatever this says: what a trace
               records of a call must not depend on the grad mode of the moment

and returns::

  y            [T, B, D*P], zero at and past a row's length
  h_n, c_n     [D, B, P], [D, B, H], the state after the last step that each
               direction takes; h0, c0 for length 0
  cells        [T, B, D*H], c of every step, zero past the length; [0] unless wanted
  reserve      [D, T, B, 4H], [0] unless wanted: the activated gates i, f, g, o,
               anything past the length. The native backend's has a layout of its
               own, which `fastlstm::native_gates` undoes. With layer normalization
               [D, T, B, 12H]: then W_ih x and W_hh h before it

The native op takes packed rows of CPU tensors as well: x [N, I], the data of a PackedSequence, with lengths that do not
rise from row to row and have the sum N, and no mask. y and cells are then [N, features], the reserve is
[D, N, 4H], with layer normalization [D, N, 12H].

Layer normalization is that of Ba et al. 2016, "Layer Normalization", as in haste's LayerNormLSTM: the pre-activations
are LN(W_ih x) + LN(W_hh h) + the biases, and h_t = o * tanh(LN(c_t)). LN(v) = (v - mean) / sqrt(variance + 1e-5) * gain
+ bias over the elements of a row.

Backward takes the gradients of y, h_n, c_n and cells (None is zero), forward's arguments and results, and `needs`,
one flag for each of x, h0, c0 and the weights. It returns their gradients, [0] where not needed. An optional last
flag, if True, requests the gradient of W_ih x [T, B, D*4H] in place of x's: its product with W_ih is x's. y may be [0]
if its caller has changed it: h is then recomputed from o and c.

Example:
    >>> import torch, fastlstm
    >>> x, weights = torch.randn(5, 3, 8), [torch.randn(64, 8), torch.randn(64, 16)]
    >>> op = torch.ops.fastlstm.eager_layer
    >>> y, h_n, c_n, cells, reserve = op(x, None, None, weights, None, None, True, False)
    >>> y.shape, cells.shape, reserve.shape
    (torch.Size([5, 3, 16]), torch.Size([5, 3, 16]), torch.Size([0]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# LayerInputs. The masks stand after an op's other arguments, where they may have defaults: traces and exported programs
# saved before there were masks still load.
INPUTS = "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? reset_mask"
# Each mask's features, and whether it may be bool.
MASK_KINDS = {"recurrent_mask": ("P", False), "zoneout_h": ("P", True), "zoneout_c": ("H", True)}
MASKS = ", ".join(f"Tensor? {name}=None" for name in MASK_KINDS)
GRADIENTS = "Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells"  # OutputGradients
FORWARD = (
    f"({INPUTS}, bool keep_cells, bool keep_reserve, {MASKS}) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor reserve)"
)
BACKWARD = (
    f"({GRADIENTS}, {INPUTS}, Tensor y, Tensor cells, Tensor reserve, bool[] needs, {MASKS}) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)

OutputGradients = Sequence[Tensor | None]  # of y, h_n, c_n and cells


class LayerInputs(NamedTuple):
    """The tensors that a layer is computed from, in the order of `reference.layer`'s arguments.

    `op(*arguments(inputs, ...))` passes them on. May also hold one value per tensor: its gradient, or the dimension
    vmap maps.

    Attributes:
        x: [T, B, I].
        h0: [D, B, P], or None.
        c0: [D, B, H], or None.
        weights: those of each direction.
        lengths: [B], or None.
        reset_mask: [T, B], or None.
        recurrent_mask: [D, T, B, P], or None.
        zoneout_h: [D, T, B, P], or None.
        zoneout_c: [D, T, B, H], or None.
    """

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    # The options of a call: tensors without gradient.
    lengths: Tensor | None = None
    reset_mask: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None

    @property
    def B(self) -> int:
        """Rows, of padded x or packed."""
        return self.x.shape[1] if self.x.dim() == 3 or self.lengths is None else self.lengths.shape[0]

    @property
    def masks(self) -> tuple[Any, ...]:
        """Those of MASK_KINDS, which have a dimension of directions."""
        return self[_BEFORE_MASKS:]

    @property
    def differentiable(self) -> list[Any]:
        """x, h0, c0, `*weights`: those that `needs` has a flag for."""
        return [self.x, self.h0, self.c0, *self.weights]

    def with_differentiable(self, tensors: Sequence[Any]) -> LayerInputs:
        """The same options with other x, h0, c0, `*weights`."""
        x, h0, c0, *weights = tensors
        return LayerInputs(x, h0, c0, weights, *self[4:])

    def flat(self) -> list[Any]:
        """All in one list, the weights last: autograd functions see no tensors in nested lists."""
        x, h0, c0, weights, *options = self
        return [x, h0, c0, *options, *weights]

    @classmethod
    def from_flat(cls, values: Sequence[Any]) -> LayerInputs:
        """The inverse of `flat`."""
        n = len(cls._fields) - 1
        x, h0, c0, *options = values[:n]
        return cls(x, h0, c0, list(values[n:]), *options)


# The dimension of each that counts the B rows; a weight has none.
BATCH_DIMS: Any = LayerInputs._make([1, 1, 1, [], 0, 1, *[2] * len(MASK_KINDS)])
_BEFORE_MASKS = INPUTS.count(",") + 1


def arguments(inputs: LayerInputs, *others: Any) -> tuple[Any, ...]:
    """An op's arguments from x on, `others` in their place before the masks."""
    return (*inputs[:_BEFORE_MASKS], *others, *inputs[_BEFORE_MASKS:])


def bundled(args: Sequence[Any], others: int, at: int = 0) -> tuple[Sequence[Any], LayerInputs, Sequence[Any]]:
    """(arguments before x, inputs, the `others` between INPUTS and MASKS) of an op's arguments, x at index `at`."""
    end = at + _BEFORE_MASKS
    return args[:at], LayerInputs(*args[at:end], *args[end + others :]), args[end : end + others]


def wanted_gradients(needs: Sequence[bool], dx: Any, dh0: Any, dc0: Any, dweights: Sequence[Any]) -> list[Any]:
    """The gradients of `LayerInputs.flat()` from those of `differentiable`: None where `needs` has no flag."""
    found: list[Any] = [g if need else None for g, need in zip([dx, dh0, dc0, *dweights], needs, strict=True)]
    return LayerInputs(found[0], found[1], found[2], found[3:]).flat()


NORM_WEIGHTS = 6  # of a direction's layer normalization


@dataclass(frozen=True)
class DirectionWeights:
    """Weights of one direction as torch.nn.LSTM stores them.

    Attributes:
        ih: [4H, I].
        hh: [4H, P].
        bias_ih: [4H], or None.
        bias_hh: [4H], or None.
        norm: gain and bias of the layer normalization of W_ih x [4H], W_hh h [4H] and c [H], or None.
        hr: [P, H], or None without projection.
    """

    ih: Tensor  # [4H, I]
    hh: Tensor  # [4H, P]
    bias_ih: Tensor | None  # [4H]
    bias_hh: Tensor | None  # [4H]
    norm: list[Tensor] | None
    hr: Tensor | None  # [P, H]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer, derived from its weights.

    Attributes:
        H: hidden units.
        P: features of h.
        D: directions, 1 or 2.
        bias: whether there are biases.
        norm: whether there is layer normalization.
    """

    H: int
    P: int
    D: int
    bias: bool
    norm: bool = False

    @property
    def proj(self) -> bool:
        return self.P != self.H

    @property
    def per_direction(self) -> int:
        return 2 + 2 * self.bias + NORM_WEIGHTS * self.norm + self.proj

    @property
    def reserved(self) -> int:
        """Features of a row of the reserve."""
        return (12 if self.norm else 4) * self.H

    @classmethod
    def of(cls, weights: list[Tensor]) -> LayerShape:
        if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
            raise RuntimeError("weights must begin with weight_ih [4H, I] and weight_hh [4H, P]")
        H, P = weights[0].shape[0] // 4, weights[1].shape[1]
        vectors = next((k for k, w in enumerate(weights[2:]) if w.dim() == 2), len(weights) - 2)
        norm = vectors >= NORM_WEIGHTS
        bias = vectors > NORM_WEIGHTS * norm
        return cls(H, P, len(weights) // (2 + 2 * bias + NORM_WEIGHTS * norm + (P != H)), bias, norm)


@dataclass(frozen=True)
class LayerCall:
    """What a backend's `supports` may depend on. T and B are absent: a choice never depends on them.

    Attributes:
        device: of x.
        dtype: of x and of the weights.
        I: input features.
        shape: the other sizes, from the weights.
        lengths: whether lengths are given.
        reset_mask: whether a reset_mask is given.
        recurrent_mask, zoneout_h, zoneout_c: whether this mask is given.
    """

    device: torch.device
    dtype: torch.dtype
    I: int  # noqa: E741
    shape: LayerShape
    lengths: bool = False
    reset_mask: bool = False
    recurrent_mask: bool = False
    zoneout_h: bool = False
    zoneout_c: bool = False

    @property
    def variant(self) -> str:
        """What the layer computes beyond nn.LSTM's equations, by the names of LSTM's arguments; "" if nothing."""
        used = (self.recurrent_mask, self.zoneout_h or self.zoneout_c, self.shape.norm)
        names = ("recurrent_dropout", "zoneout", "layer_norm")
        return ", ".join(name for name, is_used in zip(names, used, strict=True) if is_used)

    @classmethod
    def of(cls, inputs: LayerInputs) -> LayerCall:
        x, _, _, weights, *options = inputs
        return cls(x.device, x.dtype, weights[0].shape[1], LayerShape.of(weights), *(t is not None for t in options))


def split_weights(weights: list[Tensor]) -> list[DirectionWeights]:
    """Split the schema's flat list of weights by direction."""
    shape = LayerShape.of(weights)
    n = shape.per_direction
    out = []
    for d in range(shape.D):
        group = weights[d * n : (d + 1) * n]
        bias_ih, bias_hh = group[2:4] if shape.bias else (None, None)
        at = 2 + 2 * shape.bias
        norm = group[at : at + NORM_WEIGHTS] if shape.norm else None
        out.append(DirectionWeights(group[0], group[1], bias_ih, bias_hh, norm, group[-1] if shape.proj else None))
    return out


def lacks_output(y: Tensor) -> bool:
    """Return True if backward was given no y."""
    return y.dim() == 1 and y.shape[0] == 0


def forward_outputs(
    inputs: LayerInputs, keep_cells: bool, keep_reserve: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised y, h_n, c_n, cells and reserve of the contract's shapes: the fake kernel, and a backend's start."""
    x, s, B = inputs.x, LayerShape.of(inputs.weights), inputs.B
    rows = x.shape[:-1]
    return (
        x.new_empty(*rows, s.D * s.P),
        x.new_empty(s.D, B, s.P),
        x.new_empty(s.D, B, s.H),
        x.new_empty((*rows, s.D * s.H) if keep_cells or keep_reserve else (0,)),
        x.new_empty((s.D, *rows, s.reserved) if keep_reserve else (0,)),
    )


def wants_dgates(inputs: LayerInputs, needs: Sequence[bool]) -> bool:
    """Return True if backward gives the gradient of W_ih x [T, B, D*4H] in place of dx: the flag after the inputs'."""
    return any(needs[3 + len(inputs.weights) :])


def backward_outputs(inputs: LayerInputs, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Uninitialised gradients of the contract's shapes, [0] where not needed: the fake kernel of backward."""
    x, s, B = inputs.x, LayerShape.of(inputs.weights), inputs.B

    def wanted(i: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return x.new_empty(shape if needs[i] else (0,))

    return (
        wanted(0, (*x.shape[:-1], s.D * 4 * s.H) if wants_dgates(inputs, needs) else x.shape),
        wanted(1, (s.D, B, s.P)),
        wanted(2, (s.D, B, s.H)),
        [wanted(3 + k, w.shape) for k, w in enumerate(inputs.weights)],
    )
