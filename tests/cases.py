"""Configurations of one LSTM call: `Case`, its tensors, and `random_case`. tests/runners.py runs them."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .device import TEST_DEVICE

OUTPUTS = ("output", "h_n", "c_n", "cells")
# Forms of hx: a tuple, a list, one row expanded over the batch, permuted strides, or one tensor as both states.
HX_FORMS = ("none", "tuple", "list", "expanded", "strided", "shared")


@dataclass(frozen=True)
class Case:
    """A configuration of the module, of the arguments of one call, and of the backward pass after it."""

    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 6
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    dtype: torch.dtype = torch.float32
    unbatched: bool = False  # 2-D input; B is 1
    hx: str = "none"
    lengths: tuple[int, ...] | None = None
    packed: bool = False  # the input is a PackedSequence with these lengths
    resets: tuple[tuple[int, int], ...] | None = None  # (t, b) where reset_mask is True
    cells: bool = False
    frozen: tuple[str, ...] = ()  # weights that need no gradient
    x_grad: bool = True
    hx_grad: bool = True
    strided: tuple[str, ...] = ()  # of "x", "weights", "grads": those that are not contiguous
    used: tuple[str, ...] = OUTPUTS  # outputs in the loss
    x_scale: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        """Sizes and what differs from the defaults: the test's id."""
        words = [f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"]
        for field in fields(self)[4:]:
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).replace("torch.", "").replace(" ", "")
                words.append(field.name if value is True else f"{field.name}={text}")
        return "-".join(words)

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def ragged(self) -> bool:
        return self.lengths is not None or self.resets is not None

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of nn.LSTM and fastlstm.LSTM."""
        return {
            "input_size": self.I,
            "hidden_size": self.H,
            "num_layers": self.layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "proj_size": self.proj,
        }

    def module(self, cls: type[nn.Module], weights: dict[str, nn.Parameter], **changes: Any) -> nn.Module:
        """A module of `cls` that holds `weights` themselves."""
        module = cls(**{**self.arguments(), **changes}, device="meta")
        for name, weight in weights.items():
            setattr(module, name, weight)
        return module


@dataclass
class Tensors:
    """The tensors of a Case, in one dtype: its leaves, and `input` and `hx`, the arguments of the call."""

    leaves: dict[str, Tensor]  # x, h0, c0 and the weights: all tensors that may need a gradient
    weights: dict[str, nn.Parameter]
    input: Tensor  # [T, B, I], [B, T, I] or [T, I]
    hx: Any
    lengths: Any
    reset_mask: Tensor | None

    def grad_leaves(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}


def tensors(case: Case, dtype: torch.dtype | None = None, device: str | None = None) -> Tensors:
    """The case's tensors: drawn in float64, rounded to the case's dtype, then converted to `dtype`, on TEST_DEVICE.

    So the float64 reference and a run in bfloat16 have equal inputs. Padding is NaN.
    """
    with torch.device("cpu"):
        case_tensors = _drawn(case, dtype or case.dtype)
    device = device or TEST_DEVICE.device
    return case_tensors if device == "cpu" else _moved(case_tensors, device)


def _moved(case_tensors: Tensors, device: str) -> Tensors:
    """Move all tensors, lengths and masks included; forms and strides are kept."""
    moved = {}
    for name, leaf in case_tensors.leaves.items():
        there = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        there.copy_(leaf.detach())
        is_weight = name in case_tensors.weights
        moved[name] = nn.Parameter(there, leaf.requires_grad) if is_weight else there.requires_grad_(leaf.requires_grad)
    hx = None
    if case_tensors.hx is not None:
        own = [moved["h0"], moved.get("c0", moved["h0"])]
        # Expand only if necessary, because the autograd node's backward runs on this stream, not on that of a capture.
        pairs = zip(own, case_tensors.hx, strict=True)
        hx = type(case_tensors.hx)(m if m.shape == s.shape else m.expand(s.shape) for m, s in pairs)
    lengths = None if case_tensors.lengths is None else torch.as_tensor(case_tensors.lengths).to(device)
    reset_mask = None if case_tensors.reset_mask is None else case_tensors.reset_mask.to(device)
    weights = {name: moved[name] for name in case_tensors.weights}
    return Tensors(moved, weights, moved["x"], hx, lengths, reset_mask)


def _drawn(case: Case, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).to(dtype)

    weights = {}
    for name, empty in case.module(nn.LSTM, {}).named_parameters():
        weight = (torch.rand(empty.shape, generator=generator, dtype=torch.float64) * 2 - 1) / case.H**0.5
        weight = weight.to(case.dtype).to(dtype)
        if "weights" in case.strided:
            weight = _strided(weight)
        weights[name] = nn.Parameter(weight, requires_grad=name not in case.frozen)

    x = draw(case.T, case.B, case.I) * case.x_scale
    if case.lengths is not None:
        padding = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)
        x = x.masked_fill(padding[..., None], float("nan"))
    x = x[:, 0] if case.unbatched else x.transpose(0, 1).contiguous() if case.batch_first else x
    leaves: dict[str, Tensor] = {"x": (_strided(x) if "x" in case.strided else x.clone()).requires_grad_(case.x_grad)}
    hx = None
    if case.hx != "none":
        states, hx = _states(case, draw)
        leaves |= states
    reset_mask = None
    if case.resets is not None:
        reset_mask = torch.zeros(case.T, case.B, dtype=torch.bool)
        for t, b in case.resets:
            reset_mask[t, b] = True
        reset_mask = reset_mask[:, 0] if case.unbatched else reset_mask.t() if case.batch_first else reset_mask
    return Tensors({**leaves, **weights}, weights, leaves["x"], hx, _lengths(case), reset_mask)


def _strided(t: Tensor) -> Tensor:
    """Copy t to a layout with gaps between elements and with reversed dimensions."""
    return torch.stack([t.permute(*reversed(range(t.dim())))] * 2, -1)[..., 0].permute(*reversed(range(t.dim())))


def _states(case: Case, draw: Any) -> tuple[dict[str, Tensor], Any]:
    """(leaves h0 and c0, hx in the case's form)."""
    S, B = case.layers * case.directions, 1 if case.hx == "expanded" else case.B
    h0, c0 = draw(S, B, case.proj or case.H), draw(S, B, case.H)
    if case.unbatched:
        h0, c0 = h0[:, 0], c0[:, 0]
    if case.hx == "strided":
        h0, c0 = _strided(h0), _strided(c0)
    h0, c0 = (t.detach().requires_grad_(case.hx_grad) for t in (h0, c0))
    if case.hx == "shared":
        return {"h0": h0}, (h0, h0)
    if case.hx == "expanded" and not case.unbatched:
        return {"h0": h0, "c0": c0}, (h0.expand(-1, case.B, -1), c0.expand(-1, case.B, -1))
    return {"h0": h0, "c0": c0}, [h0, c0] if case.hx == "list" else (h0, c0)


def _lengths(case: Case) -> Any:
    """The case's lengths as int64 or int32 tensor or list, by its seed; a scalar when unbatched."""
    if case.lengths is None:
        return None
    if case.unbatched:
        return case.lengths[0] if case.seed % 2 else torch.tensor(case.lengths[0])
    forms = (torch.tensor(case.lengths), torch.tensor(case.lengths, dtype=torch.int32), list(case.lengths))
    return forms[case.seed % 3]


def random_case(rng: random.Random, dtypes: tuple[torch.dtype, ...]) -> Case:
    """Draw a configuration, mostly with few options; sizes are around the widths of vector registers."""

    def chance(p: float) -> bool:
        return rng.random() < p

    T, B, I = rng.choice((1, 2, 3, 5, 8, 13)), rng.choice((1, 2, 3, 4, 7, 17)), rng.choice((1, 2, 3, 8, 19))  # noqa: E741
    H = rng.choice((1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64))
    unbatched = chance(0.1)
    packed = chance(0.15) and not unbatched
    lengths = resets = None
    if packed:
        lengths = tuple(rng.randint(1, T) for _ in range(B))
    elif chance(0.35):
        lengths = tuple(0 if chance(0.15) else rng.randint(1, T) for _ in range(1 if unbatched else B))
    if not packed and chance(0.3):
        rate = rng.choice((0.0, 0.1, 0.4, 1.0))
        resets = tuple((t, b) for t in range(T) for b in range(1 if unbatched else B) if chance(rate))
    if lengths is None and resets is None and not unbatched and chance(0.04):
        B = 0
    case = Case(
        T=T,
        B=1 if unbatched else B,
        I=I,
        H=H,
        layers=rng.choice((1, 1, 1, 2, 3)),
        bidirectional=chance(0.4),
        proj=rng.randint(1, H - 1) if H > 1 and chance(0.25) else 0,
        bias=chance(0.8),
        batch_first=chance(0.4),
        dtype=rng.choice(dtypes),
        unbatched=unbatched,
        lengths=lengths,
        packed=packed,
        resets=resets,
        cells=chance(0.2),
        x_grad=chance(0.8),
        hx_grad=chance(0.8),
        strided=tuple(name for name in ("x", "weights", "grads") if chance(0.25)),
        used=OUTPUTS if chance(0.5) else tuple(rng.sample(OUTPUTS, rng.randint(1, 3))),
        seed=rng.randrange(2**31),
    )
    forms = [form for form in HX_FORMS if form != "shared" or case.proj == 0]  # one tensor has one size
    names = tuple(case.module(nn.LSTM, {}).state_dict())
    frozen = tuple(rng.sample(names, rng.randint(1, len(names)))) if chance(0.3) else ()
    return replace(case, hx=rng.choice(forms), frozen=frozen)
