"""The random masks of recurrent dropout and zoneout, drawn from torch's generator for each layer of a call."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import native
from .ops.modes import transform_active
from .ops.schema import LayerInputs, LayerShape


def check_probability(name: str, p: float) -> float:
    """Return p as a float; raise ValueError, as torch.nn.LSTM does about its dropout, unless it is a probability."""
    if isinstance(p, bool) or not isinstance(p, numbers.Number) or not 0 <= p <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} should be a number in range [0, 1] representing a probability, got {p!r}")
    return float(p)  # type: ignore[arg-type]


def zoneout_pair(zoneout: float | Sequence[float]) -> tuple[float, float]:
    """Return (z_h, z_c) of a number that is both, or of a pair."""
    if not isinstance(zoneout, (tuple, list)):
        both = check_probability("zoneout", zoneout)  # type: ignore[arg-type]
        return both, both
    if len(zoneout) != 2:
        raise ValueError(f"zoneout should be a number or a pair (z_h, z_c), got {len(zoneout)} numbers")
    return check_probability("zoneout[0]", zoneout[0]), check_probability("zoneout[1]", zoneout[1])


def flags(sizes: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Return a bool tensor, each element True with probability p, from torch's generator of the device."""
    plain = not (transform_active() or torch.jit.is_tracing())  # vmap and a trace have a rule for torch's ops alone
    if device.type == "cpu" and native.extension is not None and plain:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu")
        return torch.ops.fastlstm.random_flags.default(seed, list(sizes), p)
    return torch.rand(sizes, device=device) < p


@dataclass(frozen=True)
class Masks:
    """The probabilities of one call.

    Attributes:
        recurrent_dropout: of an element of h to be dropped where it enters the recurrent product.
        zoneout: of an element of h, and of c, to keep its value.
        training: whether masks are random; else zoneout's shares are its probabilities.
    """

    recurrent_dropout: float
    zoneout: tuple[float, float]
    training: bool

    @classmethod
    def of(cls, recurrent_dropout: float, zoneout: float | Sequence[float], training: bool) -> Masks | None:
        """Return None if they change nothing."""
        p = check_probability("recurrent_dropout", recurrent_dropout)
        dropped = p if training else 0.0
        pair = zoneout_pair(zoneout)
        return cls(dropped, pair, training) if dropped or any(pair) else None

    @property
    def used(self) -> tuple[bool, bool, bool]:
        """Which of recurrent_mask, zoneout_h and zoneout_c are given to a layer."""
        return self.recurrent_dropout > 0, self.zoneout[0] > 0, self.zoneout[1] > 0

    def draw(self, inputs: LayerInputs) -> LayerInputs:
        """Return `inputs` with the masks of one layer."""
        shape, (T, B) = LayerShape.of(inputs.weights), inputs.x.shape[:2]
        sizes_h, sizes_c = (shape.D, T, B, shape.P), (shape.D, T, B, shape.H)
        z_h, z_c = self.zoneout
        return inputs._replace(
            recurrent_mask=self._recurrent(inputs, sizes_h) if self.recurrent_dropout else None,
            zoneout_h=self._zoneout(inputs.x, z_h, sizes_h) if z_h else None,
            zoneout_c=self._zoneout(inputs.x, z_c, sizes_c) if z_c else None,
        )

    def _recurrent(self, inputs: LayerInputs, sizes: tuple[int, int, int, int]) -> Tensor:
        """[D, T, B, P], 0 or 1/(1-p): equal in all steps of a sequence, for which it takes no memory without resets."""
        x, (D, T, B, P) = inputs.x, sizes
        kept = 1 - self.recurrent_dropout
        scale = 1 / kept if kept else 0.0
        begins = inputs.reset_mask
        mask = flags((D, 1 if begins is None else T, B, P), kept, x.device).to(x.dtype)
        mask = mask * scale
        if begins is None:
            return mask.expand(D, T, B, P)
        # The mask of the step at which a sequence began is that of all its steps.
        steps = torch.arange(T, device=x.device)[:, None]
        first = torch.where(begins, steps, 0).cummax(0).values
        return mask.gather(1, first[None, :, :, None].expand(D, T, B, P))

    def _zoneout(self, x: Tensor, z: float, sizes: tuple[int, int, int, int]) -> Tensor:
        """[D, T, B, n]: bool in training; in evaluation z, in one place of memory."""
        return flags(sizes, z, x.device) if self.training else x.new_full((1, 1, 1, 1), z).expand(sizes)
