"""fastlstm.LSTM: torch.nn.LSTM's surface on fastlstm's kernels.

Parameters, initial values, state_dict, pickling and argument checks are torch's own code, inherited or called, so that
they are equal by construction. The class derives from torch's base class and not from nn.LSTM itself, because
torch.compile refuses every instance of nn.LSTM.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, functional
from .cell import LSTMCell as LSTMCell  # pickles of earlier versions name it here
from .functional import States
from .module_state import Variant, add_layer_norm, mark_as_leaf, reset_layer_norm, with_float_matrices
from .ragged import PackedLayout

# patch_torch() may put fastlstm's class in its place later.
TorchLSTM = nn.LSTM

# What early versions of torch kept in an LSTM, and no code reads any more.
_OBSOLETE = frozenset({"all_weights", "_data_ptrs", "dropout_state"})


class LSTM(nn.RNNBase):
    """Drop-in replacement for torch.nn.LSTM.

    Constructor, attributes, parameters, state_dict, results and errors are those of torch.nn.LSTM (the source of
    the equations); the constructor and `forward` take three more keyword arguments each.

    Args:
        input_size: I, features of a step of the input.
        hidden_size: H, hidden units.
        num_layers: L; layer k > 0 gets the output of layer k-1.
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: whether input and output are [B, T, features] instead of [T, B, features]. States never are.
        dropout: probability that an element between layers is zeroed in training, in [0, 1].
        bidirectional: D = 2 directions instead of 1; the output has D * P features.
        proj_size: P, features of h after a projection; 0 for none (P = H).
        device: of the parameters.
        dtype: of the parameters: float64, float32, bfloat16 or float16.
        recurrent_dropout: probability that an element of h is zeroed, in training, where it enters the recurrent
            product: one mask for each sequence, layer and direction (Gal and Ghahramani 2016). Fixed from here on,
            as are zoneout and layer_norm.
        zoneout: probability that an element of h and of c keeps its value of the previous step, in training; their
            expectation in evaluation (Krueger et al. 2017). A pair (z_h, z_c) sets them separately.
        layer_norm: whether W_ih x, W_hh h and c are normalized (Ba et al. 2016). functional.lstm has the equations of
            all three.

    Parameters of layer k: `weight_ih_l{k}` [4H, I] (k > 0: [4H, D*P]), `weight_hh_l{k}` [4H, P]; with `bias`
    `bias_ih_l{k}` and `bias_hh_l{k}` [4H]; with `proj_size` `weight_hr_l{k}` [P, H]. Gates in the order i, f, g, o.
    With `layer_norm` gains, 1 at first, and biases, 0 at first: `weight_ln_ih_l{k}`, `bias_ln_ih_l{k}`,
    `weight_ln_hh_l{k}` and `bias_ln_hh_l{k}` [4H], `weight_ln_c_l{k}` and `bias_ln_c_l{k}` [H]. Parameters of the
    reverse direction end in `_reverse`.

    Attributes:
        recompute: False; True, or a number of steps, to save for backward only h and c at intervals
            (functional.lstm). Set it on the module: `lstm.recompute = True`.

    Raises:
        ValueError, TypeError: for invalid arguments, in torch.nn.LSTM's words.

    Example:
        >>> import torch, fastlstm
        >>> lstm = fastlstm.LSTM(8, 16, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    # Of the class, so that converted modules and those unpickled from earlier versions have them.
    recompute: bool | int = False
    _variant: Variant | None = None  # private, since a subclass may have a zoneout or a layer_norm of its own
    _is_frozen = False  # True for frozen.FrozenLSTM; read from the type, as instances are the user's

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        variant = Variant.of(recurrent_dropout, zoneout, layer_norm)
        super().__init__("LSTM", *args, **kwargs)
        if variant is not None:
            self._variant = variant
            if variant.layer_norm:
                self._add_layer_norm()
        if type(self) is LSTM:
            mark_as_leaf(self)

    def _add_layer_norm(self) -> None:
        """Register layer normalization's parameters, in the places that functional.lstm gives them."""
        after = 4 if self.bias else 2
        for names in self._all_weights:
            names[after:after] = add_layer_norm(self, self.hidden_size, names[0].removeprefix("weight_ih"))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        reset_layer_norm(self)

    def reset_parameters(self) -> None:
        """Draw the initial values of torch.nn.LSTM; those of layer normalization are 1 and 0."""
        super().reset_parameters()
        reset_layer_norm(self)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("__module__", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state of any version of torch: early ones have no proj_size, earlier ones no list of weights."""
        state = {"proj_size": 0, **{name: value for name, value in state.items() if name not in _OBSOLETE}}
        if not {"_all_weights", "_flat_weights_names", "_flat_weights"} <= state.keys():
            kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if state["bias"] else [])]
            kinds += ["weight_hr"] if state["proj_size"] else []
            places = [
                f"l{k}{d}" for k in range(state["num_layers"]) for d in ("", "_reverse")[: 1 + state["bidirectional"]]
            ]
            state["_all_weights"] = [[f"{kind}_{place}" for kind in kinds] for place in places]
            names = state["_flat_weights_names"] = [name for names in state["_all_weights"] for name in names]
            state["_flat_weights"] = [state.get(name, state["_parameters"].get(name)) for name in names]
        super().__setstate__(state)
        if type(self) is LSTM:
            mark_as_leaf(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(with_float_matrices(self, state_dict, prefix), prefix, *args)

    get_expected_cell_size: Any = TorchLSTM.get_expected_cell_size
    check_forward_args: Any = TorchLSTM.check_forward_args
    permute_hidden: Any = TorchLSTM.permute_hidden

    def extra_repr(self) -> str:
        own = {"recompute": self.recompute} if self.recompute else {}
        own |= self._variant.used() if self._variant else {}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in own.items())

    def flatten_parameters(self) -> None:
        """Do nothing: weights are read in place at every call. nn.LSTM compacts them for cuDNN here."""

    def _current_weights(self) -> list[Tensor]:
        """Return the weights of this call, in the order of `_flat_weights_names`, by nn.LSTM's rule.

        They are `_flat_weights` as it stands, so that adapters may write to it, unless an attribute is no longer the
        object recorded for it: parametrizations, pruning, functional_call, FSDP and assignment replace attributes.
        """
        attributes = self.__dict__
        parameters, flat, refs = attributes["_parameters"], attributes["_flat_weights"], attributes["_flat_weight_refs"]
        k = 0
        try:
            for name in attributes["_flat_weights_names"]:
                weight = parameters[name]
                if weight is not flat[k] or weight is not refs[k]() or name in attributes:
                    break
                k += 1
            else:
                return list(flat)  # type: ignore[arg-type]
        except (LookupError, TypeError):  # not a parameter, or nothing recorded
            pass
        return self._replaced_weights()

    def _replaced_weights(self) -> list[Tensor]:
        """Return `_current_weights` if `_flat_weights` and the attributes differ: the later write counts."""
        names, refs = self._flat_weights_names, self._flat_weight_refs
        # Each is read once: a parametrization computes it.
        weights: list[Any] = [getattr(self, name, None) for name in names]
        changed = len(refs) != len(names) or any(
            weight is not None and ref is not None and ref() is not weight
            for weight, ref in zip(weights, refs, strict=True)
        )
        if not changed:
            return list(self._flat_weights)  # type: ignore[arg-type]
        if not is_compiling() and all(map(self._is_lasting, names, weights)):
            self._flat_weights = list(weights)
            self._flat_weight_refs = [weakref.ref(weight) for weight in weights]
        return weights

    def _is_lasting(self, name: str, weight: Any) -> bool:
        """Return True if `weight` may be recorded; one computed for this call would be kept alive with its graph."""
        computed = hasattr(type(self), name) or not isinstance(weight, Tensor) or not weight.is_leaf
        return not (computed or torch._C._functorch.is_functorch_wrapped_tensor(weight))

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers; `input` and `hx` as in torch.nn.LSTM.

        Args:
            input: [T, B, I], or [B, T, I] with batch_first, or [T, I] unbatched, or a PackedSequence; of the
                parameters' dtype and device.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), without B if unbatched, or None for zeros.
            lengths: the number of valid steps of each row of a padded batch, B integers in [0, T], in any order. The
                result equals pack_padded_sequence, nn.LSTM, pad_packed_sequence(total_length=T). A scalar if
                unbatched. None with a PackedSequence.
            reset_mask: bool, [T, B] or [B, T] as input is ([T] unbatched). True at t: step t begins a new sequence.
                None with a PackedSequence.
            return_cell_states: return a third result, c of every step of the last layer, shaped like the output with
                D*H features.

        Returns:
            (output, (h_n, c_n)), or (output, (h_n, c_n), cell_states) with return_cell_states. output is
            [T, B, D*P] or as the input is laid out, h_n [L*D, B, P], c_n [L*D, B, H].

        Raises:
            RuntimeError, ValueError, TypeError, IndexError: what torch.nn.LSTM raises for input and hx; for the rest
                see functional.lstm.

        Example:
            >>> lstm = fastlstm.LSTM(8, 16, batch_first=True)
            >>> output, _ = lstm(torch.randn(3, 5, 8), lengths=[5, 0, 2])
            >>> output[2, 2:].abs().sum().item()  # past the length
            0.0
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, return_cell_states, lengths=lengths, reset_mask=reset_mask)
        if lengths is None and reset_mask is None and not return_cell_states and self.recompute is False:
            result, weights = dispatch.fast_path(self, "lstm", "frozen_lstm", input, hx, None)
            if result is not None:
                return result
        else:
            weights = self._current_weights()
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            if lengths is not None:
                lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
                lengths = lengths.unsqueeze(0)
            reset_mask = reset_mask.unsqueeze(batch_dim) if isinstance(reset_mask, Tensor) else reset_mask
        if hx is not None:
            hx = self._batched_states(hx, batched)
        self._check(input, hx, weights, input.size(batch_dim))
        output, h_n, c_n, *cells = self._layers(
            input, hx, weights, self.batch_first, lengths=lengths, reset_mask=reset_mask,
            return_cell_states=return_cell_states,
        )  # fmt: skip
        if not batched:
            output, h_n, c_n = output.squeeze(batch_dim), h_n.squeeze(1), c_n.squeeze(1)
            cells = [c.squeeze(batch_dim) for c in cells]
        return (output, (h_n, c_n), *cells)

    def _layers(
        self, input: Tensor, hx: States | None, weights: list[Tensor], batch_first: bool, **options: Any
    ) -> tuple[Tensor, ...]:
        """functional.lstm with the module's attributes, on checked arguments."""
        variant = self._variant._asdict() if self._variant else {}
        return functional.lstm(
            input, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            batch_first, recompute=self.recompute, **variant, **options,
        )  # fmt: skip

    @staticmethod
    def _batched_states(hx: States, batched: bool) -> States:
        """hx with a batch dimension, after nn.LSTM's check of its number of dimensions."""
        h, c = hx[0], hx[1]
        dims = 3 if batched else 2
        if h.dim() != dims or c.dim() != dims:
            kind, name = ("batched", "3-D") if batched else ("unbatched", "2-D")
            raise RuntimeError(
                f"For {kind} {name} input, hx and cx should also be {name} but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return hx if batched else (h.unsqueeze(1), c.unsqueeze(1))

    def _check(self, input: Tensor, hx: States | None, weights: list[Tensor], B: int) -> None:
        """nn.LSTM's checks of sizes and dtype, in its own code when one of them fails."""
        states = self.num_layers * (2 if self.bidirectional else 1)
        fits = input.size(2) == self.input_size
        fits = fits and (input.dtype == weights[0].dtype or torch._C._is_any_autocast_enabled())
        if fits and hx is not None:
            P = self.proj_size or self.hidden_size
            fits = hx[0].shape == (states, B, P) and hx[1].shape == (states, B, self.hidden_size)
        if not fits:
            self._update_flat_weights()
            if hx is None:
                self.check_input(input, None)
            else:
                self.check_forward_args(input, hx, None)
        if isinstance(hx, Tensor):
            raise TypeError("LSTM: Expected hx to be a tuple (h_0, c_0) of tensors, got one Tensor")

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: States | None,
        return_cell_states: bool,
        **unsupported: Any,
    ) -> tuple[Any, ...]:
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{name} must be None with a PackedSequence, got {type(value).__name__}")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if batch_sizes.dim() > 1 or batch_sizes.dtype != torch.int64:
            raise RuntimeError(f"batch_sizes must be int64 [T], got {batch_sizes.dtype} {list(batch_sizes.shape)}")
        if hx is not None:
            hx = self._packed_states(hx, data, batch_sizes, sorted_indices)
        result = None
        if return_cell_states or self.recompute is not False:
            weights = self._current_weights()
        else:
            result, weights = dispatch.fast_path(self, "lstm", "frozen_lstm", data, hx, batch_sizes)
        if result is not None:
            rows, states = [result[0]], result[1]
        else:
            if data.dim() != 2 or data.size(1) != self.input_size or data.dtype != weights[0].dtype:
                self._update_flat_weights()
                try:
                    self.check_input(data, batch_sizes)
                except ValueError as error:  # of a dtype: nn.LSTM's packed input gets as far as a matrix product
                    raise RuntimeError(*error.args) from None
            layout = PackedLayout.of(batch_sizes, data)
            output, h_n, c_n, *cells = self._layers(
                layout.pad(data), hx, weights, False, return_cell_states=return_cell_states, layout=layout
            )
            rows, states = [layout.pack(padded) for padded in (output, *cells)], (h_n, c_n)
        packed = [PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices) for t in rows]
        return (packed[0], self.permute_hidden(states, unsorted_indices), *packed[1:])

    def _packed_states(
        self, hx: States, data: Tensor, batch_sizes: Tensor, sorted_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """hx in the order of the packed rows, refused as nn.LSTM does, and where nn.LSTM would read out of bounds."""
        hx = self.permute_hidden(hx, sorted_indices)
        if not isinstance(hx, (tuple, list)):
            got = "one Tensor" if isinstance(hx, Tensor) else type(hx).__name__
            raise TypeError(f"LSTM: Expected hx to be a tuple (h_0, c_0) of tensors, got {got}")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        for k, state in enumerate(hx):
            if not isinstance(state, Tensor):
                raise TypeError(f"expected Tensor as element {k} in argument 2, but got {type(state).__name__}")
            state.size(2)  # an IndexError if there are fewer dimensions
        h, c = hx
        h_size, c_size = (f(data, batch_sizes) for f in (self.get_expected_hidden_size, self.get_expected_cell_size))
        self.check_hidden_size(h, h_size, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(c, c_size, "Expected hidden[1] size {}, got {}")
        return h, c
