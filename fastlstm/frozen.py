"""The modules that `freeze` makes: LSTM and LSTMCell for inference on CPU, with weights packed once.

A frozen layer holds its weights as one tensor of bytes laid out for this CPU's kernels (csrc/cpu/packed.h), a buffer
`packed_l{k}` that no state_dict has. What leaves the process is portable: state_dict and pickles hold the matrices row
by row.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, functional
from . import out as given_out
from .backends import native
from .cell import LSTMCell
from .functional import States
from .module_state import mark_as_leaf
from .modules import LSTM
from .portable import Portable, as_float, in_form, is_int8, pack


def _has_func_grad(t: Any) -> bool:
    """Return True if torch.func.grad or another reverse-mode transform differentiates by `t`, also inside vmap."""
    while isinstance(t, Tensor) and is_functorch_wrapped_tensor(t):
        if is_gradtrackingtensor(t) and t.requires_grad:
            return True
        t = get_unwrapped(t)
    return False


class Frozen(nn.Module):
    """What FrozenLSTM and FrozenLSTMCell share: packed weights, and their portable form outside the process."""

    _is_frozen = True
    # Names of its own: a model's own attributes `form` and `dtype` stay in __dict__, and thaw shows them again.
    _form: str
    _dtype: torch.dtype
    _layer_names: list[list[str]]  # the parameters' names of each layer
    _trainable: list[str]  # those that required a gradient, as they do again after thaw

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made by fastlstm.freeze(model) from an LSTM or LSTMCell")

    def _pack(self, k: int, portable: Portable) -> None:
        """Pack weights on cpu; the bytes stay on the device on which the layer has been."""
        before = self._buffers.get(f"packed_l{k}")
        packed = pack(self.dtype, self.form, portable)
        self.register_buffer(f"packed_l{k}", packed if before is None else packed.to(before.device), persistent=False)

    @property
    def form(self) -> str:
        return self._form

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_no_weight(name)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_no_weight(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        self._check_no_weight(name)
        super().register_buffer(name, *args, **kwargs)

    def _check_no_weight(self, name: str) -> None:
        """Refuse a new value of a packed weight, which would have no effect; functional_call sets attributes, too."""
        if any(name in names for names in self.__dict__.get("_layer_names", ())):
            raise RuntimeError(
                f"{name} of a frozen layer cannot be replaced: the weights are packed. Call fastlstm.thaw(model) "
                "first, or load_state_dict"
            )

    def _packed(self, k: int) -> Tensor:
        return self._buffers[f"packed_l{k}"]  # type: ignore[return-value]

    def _portable(self, k: int) -> Portable:
        """The weights of a layer, on cpu, wherever the packed bytes are."""
        packed = self._packed(k)
        if packed.is_meta:
            raise RuntimeError("a frozen layer that was moved to meta has no weights any more: freeze the model again")
        return Portable(*native.extension.unpack_layer(packed.cpu()))  # type: ignore[union-attr]

    def first_layer(self) -> list[Tensor]:
        """Weights of the first layer's sizes and of the module's dtype, for `explain`."""
        return as_float(self._portable(0), self.dtype)

    def _portable_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for k, names in enumerate(self._layer_names):
            weights, scales = self._portable(k)
            state.update(zip(names, weights, strict=True))
            matrices = [name for name, w in zip(names, weights, strict=True) if w.dim() == 2]
            state.update((f"{name}_scale", scale) for name, scale in zip(matrices, scales, strict=False))
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._portable_state().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take the portable form; int8 and bfloat16 modules take float weights as well."""
        others: list[str] = []  # unexpected to nn.Module, which loads further buffers and runs the hooks
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs
        )
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        known = {name for names in self._layer_names for name in names}
        known |= {f"{name}_scale" for name in known if is_int8(given.get(name))}
        unexpected_keys += [key for key in others if key[len(prefix) :] not in known]
        for k, names in enumerate(self._layer_names):
            weights, scales = self._portable(k)
            matrices = [name for name, w in zip(names, weights, strict=True) if w.dim() == 2]
            errors = []
            for j, name in enumerate(names):
                if name not in given:
                    missing_keys.append(prefix + name)
                    continue
                try:
                    taken, scale = self._taken(prefix + name, given[name], given.get(f"{name}_scale"), weights[j])
                except ValueError as error:
                    errors.append(str(error))
                    continue
                weights[j] = taken
                if scale is not None:
                    scales[matrices.index(name)] = scale
            error_msgs += errors
            if not errors:
                self._pack(k, Portable(weights, scales))

    def _taken(self, key: str, weight: Any, scale: Any, now: Tensor) -> tuple[Tensor, Tensor | None]:
        """A weight of a state_dict in this module's form, and its scale; ValueError if it does not fit `now`."""
        if not isinstance(weight, Tensor):
            raise ValueError(f"{key} must be a tensor, got {type(weight).__name__}")
        if weight.shape != now.shape:
            raise ValueError(
                f"size mismatch for {key}: copying a param with shape {weight.shape} from checkpoint, "
                f"the shape in current model is {now.shape}."
            )
        weight = weight.detach().cpu()
        if not is_int8(weight):
            (taken,), scales = in_form([weight.to(self.dtype)], self.form)
            return taken, scales[0] if scales else None
        if self.form != "int8":
            raise ValueError(
                f"{key}: the state_dict is of int8 weights, and this module was frozen with {self.form} ones"
            )
        if not isinstance(scale, Tensor) or scale.shape != weight.shape[:1]:
            got = list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"{key}_scale must be [{len(weight)}], one for each row of int8 weights, got {got}")
        return weight, scale.detach().cpu().float()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[misc]
        layers = range(len(self._layer_names))
        kept = {name: value for name, value in self._buffers.items() if not name.startswith("packed_l")}
        return {**state, "_buffers": kept, "_portable_layers": [self._portable(k) for k in layers]}

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        """Copy the packed bytes: a copy stays in the process."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self._state_with_bytes(), memo))
        return made

    def _state_with_bytes(self) -> dict[str, Any]:
        return super().__getstate__()  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        portable = state.pop("_portable_layers", [])
        super().__setstate__(state)
        for k, layer in enumerate(portable):
            self._pack(k, layer)
        mark_as_leaf(self)

    def _wrong_dtype(self, what: str, dtype: torch.dtype) -> str:
        return (
            f"{what} dtype ({dtype}) does not match the dtype of the frozen layer ({self.dtype}), which is fixed: "
            f"convert the {what.lower()}, or thaw, convert and freeze the model"
        )

    def _check_may_run(self, input: Tensor, hx: States | None) -> None:
        dispatch.check_native("a frozen layer runs on native alone; fastlstm.thaw(model) runs on all")
        for what, tensor in (("input", input), ("weights", self._packed(0))):
            if tensor.device.type != "cpu":
                raise RuntimeError(
                    f"a frozen layer runs on cpu, got {what} on {tensor.device}: "
                    "call fastlstm.thaw(model), then model.to()"
                )
        if dispatch._transforming() and torch.is_grad_enabled() and any(map(_has_func_grad, (input, *(hx or ())))):
            raise RuntimeError(
                "a frozen LSTM has no gradient: torch.func can differentiate it only after fastlstm.thaw(model)"
            )

    def _cast_under_autocast(self, input: Tensor, hx: States | None) -> tuple[Tensor, States | None]:
        """Cast what autocast casts for an unfrozen layer, each tensor by itself, to the dtype of this one."""

        def cast(t: Tensor) -> Tensor:
            return t.to(self.dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

        if not functional.autocast_active(input):
            return input, hx
        return cast(input), None if hx is None else (cast(hx[0]), cast(hx[1]))


class FrozenLSTM(Frozen, LSTM):
    """An LSTM for inference on CPU, made by `freeze`: called like LSTM, with weights packed once.

    Attributes are those of LSTM but for the parameters, of which it has none; a weight cannot be replaced by an
    attribute of its name. Dropout is off; under autocast input and states become the layer's dtype. The results have no
    gradient: asking for one raises RuntimeError.

    state_dict holds what LSTM's does; for int8 each matrix as integers, with its scales [rows] under the name with
    `_scale`. Its tensors are copies, unpacked in every call of state_dict: changing them changes no layer.

    Attributes:
        form: "stored", "bfloat16" or "int8"; read-only.
        dtype: of input, states and output; read-only, and not changed by `double`, `half` or `to`.

    Example:
        >>> import torch, fastlstm
        >>> lstm = fastlstm.freeze(fastlstm.LSTM(8, 16), weights=torch.int8)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 8))
        >>> lstm.state_dict()["weight_ih_l0"].dtype
        torch.int8
    """

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
        return_cell_states: bool = False,
        out: tuple[Tensor, States] | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers; arguments and results as LSTM's.

        Args:
            out: (output, (h_n, c_n)), tensors that the results are written into and that are returned: contiguous, of
                the layer's dtype, of the results' sizes. h_n may be hx[0] itself, and c_n hx[1]: a state that is
                updated in place. They share no other memory with each other, the input, the states or the weights.
                They, and all inputs, have no gradient. Not inside a graph (torch.compile with fullgraph=True,
                torch.export, torch.jit.trace), under torch.func, nor with a PackedSequence.

        Raises:
            TypeError, ValueError, RuntimeError: what LSTM raises; for an `out` that does not fit, before anything is
                written.

        Example:
            >>> lstm = fastlstm.freeze(fastlstm.LSTM(8, 16))
            >>> output, state = torch.empty(1, 1, 16), (torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))
            >>> for x in torch.randn(5, 1, 1, 8):
            ...     _ = lstm(x, state, out=(output, state))  # the state is updated in place
            >>> torch.equal(output, state[0])
            True
        """
        plain = lengths is None and reset_mask is None and not return_cell_states and dispatch._extension_may_run()
        results = native.extension.frozen_lstm_call(self, input, hx, out) if plain else None  # type: ignore[union-attr]
        if results is not None:
            return results
        if out is not None:
            given_out.check_sequence(self, out, input, hx)
            if plain:
                results = native.extension.frozen_lstm_call(self, input, hx, None)  # type: ignore[union-attr]
        if results is None:
            results = super().forward(
                input, hx, lengths=lengths, reset_mask=reset_mask, return_cell_states=return_cell_states
            )
        if out is None:
            return results
        for given, result in zip((out[0], *out[1]), (results[0], *results[1]), strict=True):
            given.copy_(result)
        return (*out, *results[2:]) if results[2:] else out

    # What torch's checks of the input read of the weights.
    def _init_flat_weights(self) -> None:
        self._flat_weights = [torch.empty(0, dtype=self.dtype)]
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        self._init_flat_weights()

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.dtype != self.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(self._wrong_dtype("Input", input.dtype))
        super().check_input(input, batch_sizes)

    def _current_weights(self) -> list[Tensor]:
        return [torch.empty(0, dtype=self.dtype)]

    def _layers(
        self, input: Tensor, hx: States | None, weights: list[Tensor], batch_first: bool, **options: Any
    ) -> tuple[Tensor, ...]:
        self._check_may_run(input, hx)
        input, hx = self._cast_under_autocast(input, hx)
        keep_cells = options.pop("return_cell_states")
        x, lengths, reset_mask = functional.check_inputs(
            input, batch_first, *(options.get(name) for name in ("lengths", "reset_mask", "layout"))
        )
        sizes = [self.hidden_size, self.proj_size or self.hidden_size, 2 if self.bidirectional else 1]

        def one(k: int, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return torch.ops.fastlstm.frozen_layer.default(
                x, h0, c0, self._buffers[f"packed_l{k}"], sizes, lengths, reset_mask,
                keep_cells and k == self.num_layers - 1,
            )  # fmt: skip

        results = functional.stacked(x, hx, one, self.num_layers, self.bidirectional)
        return functional.as_asked(results, batch_first, keep_cells)


class FrozenLSTMCell(Frozen, LSTMCell):
    """An LSTMCell for inference on CPU, made by `freeze`; otherwise as FrozenLSTM.

    Example:
        >>> import torch, fastlstm
        >>> cell = fastlstm.freeze(fastlstm.LSTMCell(8, 16))
        >>> h, c = cell(torch.randn(3, 8))
    """

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"

    def forward(self, input: Tensor, hx: States | None = None, *, out: States | None = None) -> States:
        """Run one step, as LSTMCell.

        Args:
            out: (h, c), tensors that the new state is written into and that are returned, by the rules of FrozenLSTM;
                `hx` itself for a state that is updated in place.

        Example:
            >>> cell = fastlstm.freeze(fastlstm.LSTMCell(8, 16))
            >>> state = torch.zeros(3, 16), torch.zeros(3, 16)
            >>> cell(torch.randn(3, 8), state, out=state) is state
            True
        """
        plain = dispatch._extension_may_run()
        results = native.extension.frozen_cell_call(self, input, hx, out) if plain else None  # type: ignore[union-attr]
        if results is not None:
            return results
        if out is None:
            return super().forward(input, hx)
        given_out.check_step(self, out, input, hx)
        for given, result in zip(out, super().forward(input, hx), strict=True):
            given.copy_(result)
        return out

    def _current_weights(self) -> tuple[Any, ...]:
        return ()

    def _step(self, input: Tensor, hx: States | None, weights: tuple[Any, ...]) -> States:
        self._check_may_run(input, hx)
        input, hx = self._cast_under_autocast(input, hx)
        if input.dtype != self.dtype:
            raise RuntimeError(self._wrong_dtype("Input", input.dtype))
        functional.check_cell(input, hx, self.input_size, self.hidden_size)
        h0, c0 = (None, None) if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        sizes = [self.hidden_size, self.hidden_size, 1]
        op = torch.ops.fastlstm.frozen_layer.default
        _, h, c, _ = op(input.unsqueeze(0), h0, c0, self._buffers["packed_l0"], sizes, None, None, False)
        return h.squeeze(0), c.squeeze(0)


def _reduce_for_a_process(module: Frozen) -> tuple[Any, ...]:
    """Pickle for another process of this machine: it shares the packed bytes."""
    return copyreg.__newobj__, (type(module),), module._state_with_bytes()  # type: ignore[attr-defined]


for _cls in (FrozenLSTM, FrozenLSTMCell):
    ForkingPickler.register(_cls, _reduce_for_a_process)
