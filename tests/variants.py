"""Layers with recurrent dropout, zoneout or layer normalization: `Variant`, its tensors, and a backend's results.

The masks are given, so that a backend and the float64 reference compute the same function.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

import fastlstm  # noqa: F401 - defines the ops
from fastlstm import accuracy, dispatch, reference
from fastlstm.ops.schema import LayerCall, LayerInputs, arguments

from .device import TEST_DEVICE
from .runners import precision

OUTPUTS = ("y", "h_n", "c_n", "cells")
OPTIONS = ("recurrent_dropout", "zoneout", "layer_norm")


@dataclass(frozen=True)
class Variant:
    """One layer and the options of its call."""

    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 6
    D: int = 1
    P: int = 0  # 0: no projection
    bias: bool = True
    mask: str = ""  # recurrent mask: "sequence" (equal in all steps), "steps", or none
    zoneout: str = ""  # which of "h" and "c"
    share: str = "flags"  # of zoneout: "flags", "numbers", or "constant" as in evaluation
    norm: bool = False
    states: bool = True  # h0 and c0 are given
    lengths: tuple[int, ...] | None = None
    resets: tuple[tuple[int, int], ...] | None = None
    used: tuple[str, ...] = OUTPUTS  # outputs in the loss
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"]
        for field in fields(self)[4:]:
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).replace("torch.", "").replace(" ", "")
                words.append(field.name if value is True else f"{field.name}={text}")
        return "-".join(words)

    def inputs(self, dtype: torch.dtype | None = None, requires_grad: bool = True) -> LayerInputs:
        """Drawn in float64, rounded to the case's dtype, then converted to `dtype`. Padding is NaN."""
        dtype, generator = dtype or self.dtype, torch.Generator().manual_seed(self.seed)
        T, B, I, H, D, P = self.T, self.B, self.I, self.H, self.D, self.P or self.H  # noqa: E741

        def number(t: Tensor) -> Tensor:
            return t.to(self.dtype).to(dtype).to(TEST_DEVICE.device)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return number(drawn).requires_grad_(requires_grad)

        def flags(*shape: int, p: float) -> Tensor:
            return (torch.rand(*shape, generator=generator) < p).to(TEST_DEVICE.device)

        def zoneout(n: int) -> Tensor:
            if self.share == "constant":
                return number(torch.full((1, 1, 1, 1), 0.15)).expand(D, T, B, n)
            if self.share == "numbers":
                return number(torch.rand(D, T, B, n, generator=generator))
            return flags(D, T, B, n, p=0.3)

        weights = []
        for _ in range(D):
            weights += [draw(4 * H, I, scale=I**-0.5), draw(4 * H, P, scale=P**-0.5)]
            weights += [draw(4 * H, scale=0.3) for _ in range(2 * self.bias)]
            weights += [draw(n) for n in (4 * H,) * 4 + (H,) * 2] if self.norm else []
            weights += [draw(P, H, scale=H**-0.5)] if self.P else []
        x = draw(T, B, I)
        lengths = reset_mask = mask = None
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths).to(TEST_DEVICE.device)
            padding = torch.arange(T, device=lengths.device)[:, None] >= lengths
            x = x.detach().masked_fill(padding[..., None], float("nan")).requires_grad_(requires_grad)
        if self.resets is not None:
            reset_mask = torch.zeros(T, B, dtype=torch.bool)
            for t, b in self.resets:
                reset_mask[t, b] = True
            reset_mask = reset_mask.to(TEST_DEVICE.device)
        if self.mask:
            mask = number(flags(D, T if self.mask == "steps" else 1, B, P, p=0.75).double() / 0.75).expand(D, T, B, P)
        h0, c0 = (draw(D, B, n) if self.states else None for n in (P, H))
        z_h, z_c = (zoneout(n) if name in self.zoneout else None for name, n in (("h", P), ("c", H)))
        return LayerInputs(x, h0, c0, weights, lengths, reset_mask, mask, z_h, z_c)

    def gradients(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that arrive at the used outputs."""
        found = {}
        for k, (name, out) in enumerate(outputs.items()):
            generator = torch.Generator().manual_seed(self.seed + 1 + k)
            drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            if name in self.used:
                found[name] = drawn.to(self.dtype).to(out.dtype).to(out.device)
        return found

    def results(self, inputs: LayerInputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs, and the gradients of all differentiable inputs by name."""
        named = dict(zip(OUTPUTS, outputs, strict=False))
        arriving = self.gradients(named)
        names = ["x", "h0", "c0", *(f"weight {k}" for k in range(len(inputs.weights)))]
        given = {name: t for name, t in zip(names, inputs.differentiable, strict=True) if t is not None}
        pairs = {name: grad for name, grad in arriving.items() if named[name].requires_grad}
        grads = torch.autograd.grad(
            [named[name] for name in pairs], list(given.values()), list(pairs.values()), materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
        found = {**named, **{f"d {name}": grad for name, grad in zip(given, grads, strict=True)}}
        return {name: value.detach() for name, value in found.items()}


def run_op(variant: Variant, backend: str) -> dict[str, Tensor]:
    """The results of a backend's op."""
    inputs = variant.inputs()
    if backend == "reference":
        return variant.results(inputs, reference.layer(*inputs))
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    return variant.results(inputs, op(*arguments(inputs, True, False))[:4])


@lru_cache(maxsize=256)
def expected(variant: Variant, rounding: accuracy.Precision) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    inputs = variant.inputs(torch.float64)
    terms = {f"d weight {k}": variant.T * variant.B for k in range(len(inputs.weights))}
    return accuracy.error_bounds(lambda: variant.results(inputs, reference.layer(*inputs)), rounding, terms)


def refusal(variant: Variant, backend: str) -> str | None:
    """Why `backend` cannot run it, or None."""
    if backend == "reference":
        return None
    return dispatch.BACKENDS[backend].supports(LayerCall.of(variant.inputs()))


def check(variant: Variant, backend: str, rounding: accuracy.Precision | None = None) -> None:
    """Assert that rounding explains the error of every result."""
    ours = run_op(variant, backend)
    truth, bounds = expected(variant, rounding or precision(variant.dtype, backend))
    for name, value in ours.items():
        assert value.dtype == variant.dtype, name
        assert value.shape == truth[name].shape, name
    wrong = [str(found) for found in accuracy.compare(ours, truth, bounds) if not found.ok]
    assert not wrong, f"{backend} on {variant!r}\n  " + "\n  ".join(wrong)


def random_variant(rng: random.Random, option: str, dtypes: tuple[torch.dtype, ...]) -> Variant:
    """Draw a configuration that has `option`; sizes are around the widths of vector registers."""

    def chance(p: float) -> bool:
        return rng.random() < p

    T, B, I = rng.choice((1, 2, 3, 5, 9)), rng.choice((1, 2, 3, 7, 17)), rng.choice((1, 3, 8, 19))  # noqa: E741
    H = rng.choice((2, 3, 5, 8, 15, 16, 17, 31, 33, 64))
    zoneout = rng.choice(("h", "c", "hc", "hc")) if option == "zoneout" or chance(0.3) else ""
    return Variant(
        T=T,
        B=B,
        I=I,
        H=H,
        D=rng.choice((1, 1, 2)),
        P=rng.randint(1, H - 1) if chance(0.25) else 0,
        bias=chance(0.8),
        mask=rng.choice(("sequence", "steps")) if option == "recurrent_dropout" or chance(0.3) else "",
        zoneout=zoneout,
        share=rng.choice(("flags", "flags", "numbers", "constant")) if zoneout else "flags",
        norm=option == "layer_norm" or chance(0.15),
        states=chance(0.6),
        lengths=tuple(rng.randint(0, T) for _ in range(B)) if chance(0.35) else None,
        resets=tuple((t, b) for t in range(T) for b in range(B) if chance(0.25)) if chance(0.3) else None,
        used=OUTPUTS if chance(0.5) else tuple(rng.sample(OUTPUTS, rng.randint(1, 3))),
        seed=rng.randrange(2**31),
        dtype=rng.choice(dtypes),
    )
