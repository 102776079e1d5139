"""Stateless forms: `lstm` (layers, dropout between them, directions) and `lstm_cell`.

Their positional arguments are those of the functions behind torch.nn.LSTM and torch.nn.LSTMCell, `torch.lstm` and
`torch.lstm_cell`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .dispatch import layer
from .masks import Masks
from .ops.check import check_range
from .ops.recompute import INTERVAL
from .ops.schema import (
    NORM_WEIGHTS,
    LayerInputs,
)
from .ragged import PackedLayout

States = tuple[Tensor, Tensor]


def lstm(
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset_mask: Tensor | None = None,
    return_cell_states: bool = False,
    recompute: bool | int = False,
    layout: PackedLayout | None = None,
    recurrent_dropout: float = 0,  # not 0.0: torch.compile(dynamic=True) makes a float an input of the graph
    zoneout: float | Sequence[float] = 0,
    layer_norm: bool = False,
) -> tuple[Tensor, ...]:
    """Run a stack of LSTM layers over a padded batch. Source of the equations: the documentation of torch.nn.LSTM.

    T steps, B rows, I features, H hidden units, P = proj_size or H, D = 2 if bidirectional else 1, L = num_layers.
    All floating-point tensors have one dtype (float64, float32, bfloat16 or float16) and one device.

    Args:
        input: [T, B, I], or [B, T, I] with batch_first.
        hx: h_0 [L*D, B, P] and c_0 [L*D, B, H], never batch-first; None for zeros.
        weights: for each layer and direction weight_ih [4H, I], weight_hh [4H, P], then bias_ih and bias_hh [4H] if
            `bias`, then with layer_norm weight_ln_ih, bias_ln_ih, weight_ln_hh and bias_ln_hh [4H], weight_ln_c and
            bias_ln_c [H], then weight_hr [P, H] with projection; gates in the order i, f, g, o.
        bias: whether `weights` contains biases.
        num_layers: L.
        dropout: probability in [0, 1] that an element between layers is zeroed, in training, one mask per element and
            step.
        training: whether dropout is applied, between layers and recurrent, and whether zoneout is random.
        bidirectional: whether each layer has a reverse direction, its weights after the forward direction's.
        batch_first: whether input, output, reset_mask and cell states have B before T.
        lengths: B integers in [0, T], any order: row b has lengths[b] steps. Outputs past them are zero, the final
            states are those of each row's last step, the reverse direction starts there, and no gradient passes.
        reset_mask: bool [T, B], or [B, T] with batch_first. True at t: step t begins a new sequence in that row, so
            neither state nor gradient crosses from t-1 to t, in any layer and either direction.
        return_cell_states: whether to return the last layer's c of every step as well.
        recompute: save for backward only h and c at intervals, of 256 steps if True or of this many, and run each
            interval forward again in backward. Saves most of the memory of long sequences for 20 to 40 % more time.
            The reference backend and torch.func's transforms ignore it.
        layout: where input [T, B, I] is the padded form of packed rows, in place of lengths: dropout then draws its
            masks for the packed rows, as torch.nn.LSTM does.
        recurrent_dropout: probability p in [0, 1] that an element of h_{t-1} is zeroed, in training, where it enters
            the recurrent product; the others are multiplied by 1/(1-p). One mask [P] for each sequence and direction,
            the same in all of its steps (Gal and Ghahramani 2016): a reset begins a sequence.
        zoneout: probability z in [0, 1], or a pair (z_h, z_c), that an element of h (c) keeps its value of the
            previous step, in training, one mask per element and step. In evaluation h_t = z h_{t-1} + (1-z) h'_t, and
            c_t = z c_{t-1} + (1-z) c'_t (Krueger et al. 2017). h'_t is computed from c'_t.
        layer_norm: whether W_ih x, W_hh h and, where h is computed from it, c are normalized (Ba et al. 2016), each row
            over its 4H (H) elements: the pre-activations are LN(W_ih x) + LN(W_hh h) + bias_ih + bias_hh, and
            h_t = o * tanh(LN(c_t)), with LN(v) = (v - mean) / sqrt(variance + 1e-5) * weight_ln + bias_ln.

    Returns:
        output [T, B, D*P] ([B, T, D*P] with batch_first), h_n [L*D, B, P], c_n [L*D, B, H], and with
        return_cell_states the cell states [T, B, D*H] ([B, T, D*H]).

    Raises:
        RuntimeError: T = 0, or sizes, dtypes, devices or numbers of weights that do not fit together.
        ValueError, TypeError: lengths or reset_mask of a wrong shape, range or type, a weight that is no tensor,
            recompute < 0, or a probability outside [0, 1].

    Example:
        >>> import torch, fastlstm
        >>> weights = [torch.randn(64, 8), torch.randn(64, 16), torch.zeros(64), torch.zeros(64)]
        >>> x = torch.randn(5, 3, 8)
        >>> output, h_n, c_n = fastlstm.functional.lstm(x, None, weights, True, 1, 0.0, True, False, False)
        >>> output.shape
        torch.Size([5, 3, 16])
    """
    interval = check_recompute(recompute)
    masks = Masks.of(recurrent_dropout, zoneout, training)
    x, *options = check_inputs(input, batch_first, lengths, reset_mask, layout)
    weights = list(weights)
    _check_weights(weights, bias, num_layers, bidirectional, layer_norm)
    autocast = autocast_active(x)
    if autocast:
        x, hx, weights = _cast_for_autocast(x, hx, weights, torch.get_autocast_dtype(x.device.type))
    n = len(weights) // num_layers

    def one(k: int, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = weights if num_layers == 1 else weights[k * n : (k + 1) * n]
        keep_cells = return_cell_states and k == num_layers - 1
        inputs = LayerInputs(x, h0, c0, own, *options)
        return layer(inputs if masks is None else masks.draw(inputs), keep_cells, interval)

    how = (one, num_layers, bidirectional, dropout if training else 0.0, layout)
    if autocast:
        with torch.autocast(x.device.type, enabled=False):
            results = stacked(x, hx, *how)
    else:
        results = stacked(x, hx, *how)
    return as_asked(results, batch_first, return_cell_states)


def check_inputs(
    input: Tensor,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    reset_mask: Tensor | None,
    layout: PackedLayout | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [T, B, I], lengths [B] and reset_mask [T, B] of a call of `lstm`."""
    x = input.transpose(0, 1) if batch_first else input
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if layout is not None:
        if lengths is not None:
            raise ValueError(f"lengths must be None with a layout, got {type(lengths).__name__}")
        lengths = layout.lengths
    if lengths is not None:
        lengths = check_lengths(lengths, x)
    if reset_mask is not None:
        reset_mask = check_reset_mask(reset_mask, x, batch_first)
    if x.dim() != 3:
        raise RuntimeError(f"x must be [T, B, I], got {list(x.shape)}")
    return x, lengths, reset_mask


def as_asked(results: tuple[Tensor, ...], batch_first: bool, return_cell_states: bool) -> tuple[Tensor, ...]:
    """The results of `lstm`: output and cell states laid out as the input is."""
    y, h_n, c_n, cells = results
    if batch_first:
        y = y.transpose(0, 1)
    if not return_cell_states:
        return y, h_n, c_n
    return y, h_n, c_n, cells.transpose(0, 1) if batch_first else cells


def stacked(
    x: Tensor,
    hx: States | None,
    one: Callable[[int, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]],
    num_layers: int,
    bidirectional: bool,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n of all layers and cells of the last; `one(k, x, h0, c0)` runs layer k."""
    D = 2 if bidirectional else 1
    if hx is not None:
        check_states(x, hx)
    h_n, c_n = [], []
    for k in range(num_layers):
        h0 = c0 = None
        if hx is not None:
            h0, c0 = hx if num_layers == 1 else (hx[0][k * D : (k + 1) * D], hx[1][k * D : (k + 1) * D])
        x, h, c, cells = one(k, x, h0, c0)
        if k < num_layers - 1 and dropout != 0:
            x = _drop(x, dropout, layout)
        h_n.append(h)
        c_n.append(c)
    if num_layers == 1:
        return x, h_n[0], c_n[0], cells
    return x, torch.cat(h_n), torch.cat(c_n), cells


def _drop(x: Tensor, p: float, layout: PackedLayout | None) -> Tensor:
    if layout is None:
        return torch.nn.functional.dropout(x, p)
    return layout.pad(torch.nn.functional.dropout(layout.pack(x), p))


def lstm_cell(
    input: Tensor,
    hx: States | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    layer_norm: Sequence[Tensor] | None = None,
    zoneout: float | Sequence[float] = 0,
    training: bool = True,
) -> States:
    """Run one step. Source of the equations: the documentation of torch.nn.LSTMCell.

    Args:
        input: [B, I].
        hx: (h [B, H], c [B, H]), or None for zeros.
        weight_ih: [4H, I]; gates in the order i, f, g, o.
        weight_hh: [4H, H].
        bias_ih: [4H], or None.
        bias_hh: [4H], or None.
        layer_norm: weight_ln_ih, bias_ln_ih, weight_ln_hh and bias_ln_hh [4H], weight_ln_c and bias_ln_c [H], as in
            `lstm`; or None.
        zoneout: as in `lstm`.
        training: whether zoneout is random.

    Returns:
        (h, c), each [B, H].

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together, in torch.nn.LSTMCell's words.

    Example:
        >>> import torch, fastlstm
        >>> h, c = fastlstm.functional.lstm_cell(torch.randn(3, 8), None, torch.randn(64, 8), torch.randn(64, 16))
        >>> h.shape
        torch.Size([3, 16])
    """
    weights = [weight_ih, weight_hh]
    if bias_ih is not None or bias_hh is not None:
        none = weight_ih.new_zeros(weight_ih.shape[0])
        weights += [none if bias is None else bias for bias in (bias_ih, bias_hh)]
    if layer_norm is not None:
        if len(layer_norm) != NORM_WEIGHTS:
            raise RuntimeError(f"layer_norm must be {NORM_WEIGHTS} tensors, got {len(layer_norm)}")
        weights += layer_norm
    return _cell(input, hx, weights, Masks.of(0.0, zoneout, training))


def _cell(input: Tensor, hx: States | None, weights: list[Tensor], masks: Masks | None) -> States:
    if autocast_active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        if input.device.type == "cpu":  # no autocast rule for cells there: the state keeps its precision
            dtype = torch.promote_types(dtype, (input if hx is None else hx[1]).dtype)
        input, hx, weights = _cast_for_autocast(input, hx, weights, dtype)
        with torch.autocast(input.device.type, enabled=False):
            return _cell(input, hx, weights, masks)
    check_cell(input, hx, weights[0].shape[1], weights[1].shape[1])
    h0, c0 = (None, None) if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    inputs = LayerInputs(input.unsqueeze(0), h0, c0, weights)
    _, h, c, _ = layer(inputs if masks is None else masks.draw(inputs), False)
    return h.squeeze(0), c.squeeze(0)


def autocast_active(x: Tensor) -> bool:
    """Return True under autocast for x's device; the first question is the cheaper one."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def _cast_for_autocast(
    x: Tensor, hx: States | None, weights: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, States | None, list[Tensor]]:
    """float32 becomes `dtype`, as for the oneDNN and cuDNN layers behind nn.LSTM; float64 stays."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), None if hx is None else (cast(hx[0]), cast(hx[1])), [cast(w) for w in weights]


def _check_weights(weights: list[Tensor], bias: bool, num_layers: int, bidirectional: bool, layer_norm: bool) -> None:
    """Their number and order; whether their sizes fit together each layer sees for itself."""
    for k, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"expected Tensor as element {k} in weights, but got {type(w).__name__}")
    if num_layers < 1:
        raise RuntimeError(f"num_layers must be at least 1, got {num_layers}")
    D, vectors = (2 if bidirectional else 1), (2 if bias else 0) + (NORM_WEIGHTS if layer_norm else 0)
    one = 2 + vectors
    n = len(weights) // num_layers
    if n * num_layers != len(weights) or n not in (D * one, D * (one + 1)):
        kind = f"bias={bias} and layer_norm=True" if layer_norm else f"bias={bias}"
        raise RuntimeError(
            f"{num_layers} layer(s) of {D} direction(s) with {kind} take {D * one} weights each, "
            f"or {D * (one + 1)} with projection, got {len(weights)} in all"
        )
    for k in range(2, len(weights), n) if n > 2 else ():
        if (weights[k].dim() == 1) != bool(vectors):
            expected = "bias_ih [4H]" if bias else "weight_ln_ih [4H]" if layer_norm else "no bias"
            got = list(weights[k].shape)
            raise RuntimeError(f"weights must have {expected} as element {k} with bias={bias}, got {got}")


def check_states(x: Tensor, hx: States) -> None:
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for state in hx:
        if state.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{x.device} and hidden tensor at {state.device}"
            )
        if state.dtype != x.dtype:
            raise RuntimeError(f"Input and hidden tensors must have the same dtype, got {x.dtype} and {state.dtype}")


def check_cell(x: Tensor, hx: States | None, features: int, H: int) -> None:
    """Raise unless x [B, features] and hx fit an LSTMCell of H units, in torch.nn.LSTMCell's words."""
    if x.shape[1] != features:
        raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {features}")
    if hx is not None:
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        for k, state in enumerate(hx):
            if state.shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
            if state.shape[1] != H:
                raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {H}")
        check_states(x, hx)


def check_recompute(recompute: bool | int) -> int:
    """The interval in steps, 0 for none; see `lstm`."""
    if not isinstance(recompute, int):
        raise TypeError(f"recompute must be a bool or a number of steps, got {type(recompute).__name__}")
    if recompute < 0:
        raise ValueError(f"recompute must be a bool or at least 0 steps, got {recompute}")
    return INTERVAL if recompute is True else int(recompute)


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """lengths as int64 on x's device, for x [T, B, I]; see `lstm` for what they mean and what is raised."""
    T, B = x.shape[:2]
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")
        if lengths.numel() == 0:
            lengths = lengths.long()
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if torch.jit.is_tracing():  # the ops check them at every call
        return lengths.to(device=x.device, dtype=torch.int64)
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be [B] = [{B}], got {list(lengths.shape)}")
    values, compiling = lengths, torch.compiler.is_compiling()
    while not compiling and torch._C._functorch.is_functorch_wrapped_tensor(values):  # vmap has no rule for checks
        values = torch._C._functorch.get_unwrapped(values)
    known = not compiling and not isinstance(values, (FakeTensor, FunctionalTensor))
    if values.device.type == "cpu" and known and B > 0:
        check_range(values, T)
    elif values.device.type != "meta" and B > 0:
        # No host synchronisation and no data-dependent branch in a graph.
        torch._assert_async(((values >= 0) & (values <= T)).all(), "lengths must lie in [0, T]")
    return lengths.to(device=x.device, dtype=torch.int64, non_blocking=x.device.type != "cpu")


def check_reset_mask(reset_mask: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    """reset_mask as bool [T, B], for x [T, B, I]; see `lstm` for what it means and what is raised."""
    T, B = x.shape[:2]
    if not isinstance(reset_mask, Tensor) or reset_mask.dtype != torch.bool:
        got = reset_mask.dtype if isinstance(reset_mask, Tensor) else type(reset_mask).__name__
        raise TypeError(f"reset_mask must be a tensor of torch.bool, got {got}")
    names, expected = ("[B, T]", (B, T)) if batch_first else ("[T, B]", (T, B))
    if reset_mask.shape != expected:
        raise ValueError(f"reset_mask must be {names} = {list(expected)}, got {list(reset_mask.shape)}")
    if reset_mask.device != x.device:
        raise ValueError(f"reset_mask must be on the input's device {x.device}, got {reset_mask.device}")
    return reset_mask.t() if batch_first else reset_mask
