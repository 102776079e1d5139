"""What LSTM and LSTMCell share as modules.

Their place in torch.fx's graphs, state_dicts of frozen layers, the parameters of layer normalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masks import check_probability, zoneout_pair


def mark_as_leaf(module: nn.Module) -> None:
    """Let torch.fx record a call of `module` as one node, as it does for nn.LSTM.

    Its tracers know the modules that they do not look into by a `__module__` that begins with torch.nn, read from the
    instance. The class keeps its own.
    """
    module.__dict__["__module__"] = "torch.nn"


def with_float_matrices(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return `state_dict` with int8 matrices of a frozen layer, those that have scales, as floats for `module`."""
    found = [name for name in module._parameters if f"{prefix}{name}_scale" in state_dict]
    floats, unused = {}, set()
    for name in found:
        weight, scale = state_dict.get(prefix + name), state_dict[f"{prefix}{name}_scale"]
        parameter = module._parameters[name]
        if not (isinstance(weight, Tensor) and isinstance(scale, Tensor) and isinstance(parameter, Tensor)):
            continue
        if weight.dtype == torch.int8 and weight.dim() == 2 and scale.shape == weight.shape[:1]:
            floats[prefix + name] = (weight * scale[:, None]).to(parameter.dtype)
            unused.add(f"{prefix}{name}_scale")
    if not floats:
        return state_dict
    return {key: floats.get(key, value) for key, value in state_dict.items() if key not in unused}


def add_layer_norm(module: nn.Module, hidden_size: int, place: str = "") -> list[str]:
    """Register the six parameters of layer normalization whose names end in `place`; their names, in the ops' order."""
    like = module._parameters[f"weight_ih{place}"]
    assert like is not None
    names = []
    for of in ("ih", "hh", "c"):
        for kind in ("weight", "bias"):
            names.append(f"{kind}_ln_{of}{place}")
            empty = torch.empty(hidden_size * (1 if of == "c" else 4), device=like.device, dtype=like.dtype)
            module.register_parameter(names[-1], nn.Parameter(empty))
    return names


def reset_layer_norm(module: nn.Module) -> None:
    """Set layer normalization's gains to 1 and its biases to 0."""
    for name, parameter in module._parameters.items():
        if parameter is not None and name.startswith(("weight_ln_", "bias_ln_")):
            nn.init.constant_(parameter, 1.0 if name.startswith("weight") else 0.0)


class Variant(NamedTuple):
    """The constructor arguments beyond torch's, validated. A module without them has None in its place.

    Attributes:
        recurrent_dropout: p.
        zoneout: (z_h, z_c).
        layer_norm: whether it is used.
    """

    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    layer_norm: bool = False

    @classmethod
    def of(
        cls, recurrent_dropout: float = 0.0, zoneout: float | Sequence[float] = 0.0, layer_norm: bool = False
    ) -> Variant | None:
        """Return None if no argument is used; raise ValueError for an invalid one."""
        p = check_probability("recurrent_dropout", recurrent_dropout)
        found = cls(p, zoneout_pair(zoneout), bool(layer_norm))
        return found if found != cls() else None

    def used(self) -> dict[str, Any]:
        """Return the arguments that are used, as a caller would write them."""
        z_h, z_c = self.zoneout
        values = (self.recurrent_dropout, z_h if z_h == z_c else self.zoneout, self.layer_norm)
        return {name: value for name, value in zip(self._fields, values, strict=True) if value}
