"""fastlstm.LSTMCell: torch.nn.LSTMCell's surface on fastlstm's kernels, with torch's own code as in modules.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import dispatch, functional
from .functional import States
from .module_state import Variant, add_layer_norm, mark_as_leaf, reset_layer_norm, with_float_matrices

# patch_torch() may put fastlstm's class in its place later.
TorchLSTMCell = nn.LSTMCell


class LSTMCell(nn.RNNCellBase):
    """Drop-in replacement for torch.nn.LSTMCell: one step of an LSTM layer, without projection.

    Args:
        input_size: I, features of the input.
        hidden_size: H, hidden units.
        bias: whether there are `bias_ih` and `bias_hh`.
        device: of the parameters.
        dtype: of the parameters.
        zoneout: as LSTM's, with a new mask per call. For recurrent dropout multiply h by one mask at all calls of
            a sequence.
        layer_norm: as LSTM's.

    Parameters: `weight_ih` [4H, I], `weight_hh` [4H, H], `bias_ih` and `bias_hh` [4H] (None without bias); gates in the
    order i, f, g, o. With `layer_norm` also `weight_ln_ih`, `bias_ln_ih`, `weight_ln_hh` and `bias_ln_hh` [4H],
    `weight_ln_c` and `bias_ln_c` [H].

    Example:
        >>> import torch, fastlstm
        >>> cell = fastlstm.LSTMCell(8, 16)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h, c = cell(torch.randn(3, 8), (h, c))
        >>> h.shape
        torch.Size([3, 16])
    """

    _variant: Variant | None = None  # as in modules.py
    _is_frozen = False  # True for frozen.FrozenLSTMCell; read from the type

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
    ) -> None:
        variant = Variant.of(zoneout=zoneout, layer_norm=layer_norm)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if variant is not None:
            self._variant = variant
            if variant.layer_norm:
                add_layer_norm(self, hidden_size)
                reset_layer_norm(self)
        if type(self) is LSTMCell:
            mark_as_leaf(self)

    def extra_repr(self) -> str:
        own = self._variant.used() if self._variant else {}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in own.items())

    def reset_parameters(self) -> None:
        """Draw the initial values of torch.nn.LSTMCell; those of layer normalization are 1 and 0."""
        super().reset_parameters()
        reset_layer_norm(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("__module__", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self) is LSTMCell:
            mark_as_leaf(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(with_float_matrices(self, state_dict, prefix), prefix, *args)

    def _current_weights(self) -> tuple[Any, ...]:
        """Return weight_ih, weight_hh, bias_ih and bias_hh as they are now, whatever has taken a parameter's place."""
        attributes = self.__dict__
        parameters = attributes["_parameters"]
        return tuple(
            parameters[name] if name in parameters and name not in attributes else getattr(self, name)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )

    def _norm_weights(self) -> list[Tensor]:
        """Return layer normalization's six, or none."""
        kinds = [(kind, of) for of in ("ih", "hh", "c") for kind in ("weight", "bias")]
        return (
            [getattr(self, f"{kind}_ln_{of}") for kind, of in kinds]
            if self._variant and self._variant.layer_norm
            else []
        )

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Run one step.

        Args:
            input: [B, I], or [I] unbatched; of the parameters' dtype and device.
            hx: (h, c), each [B, H] or [H], or None for zeros.

        Returns:
            (h, c), each [B, H] or [H].

        Raises:
            RuntimeError, ValueError, TypeError: what torch.nn.LSTMCell raises.

        Example:
            >>> h, c = fastlstm.LSTMCell(8, 16)(torch.randn(8))
            >>> c.shape
            torch.Size([16])
        """
        result, weights = dispatch.fast_path(self, "lstm_cell", None, input, hx)
        if result is not None:
            return result
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None:
            for k, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
            # Without a batch dimension nn.LSTMCell takes whatever has two elements apart.
            if input.dim() == 2 and not isinstance(hx, (tuple, list)):
                raise TypeError(
                    f"lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not {type(hx).__name__}"
                )
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = self._step(input, hx, weights)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _step(self, input: Tensor, hx: States | None, weights: tuple[Any, ...]) -> States:
        """functional.lstm_cell with the module's weights and options."""
        if self._variant is None:
            return functional.lstm_cell(input, hx, *weights)
        norm, zoneout = self._norm_weights() or None, self._variant.zoneout
        return functional.lstm_cell(input, hx, *weights, layer_norm=norm, zoneout=zoneout, training=self.training)
