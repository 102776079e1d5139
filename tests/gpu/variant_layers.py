"""Layers with recurrent masks, zoneout or layer normalization, on any backend and device: `VariantLayer`, `check`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastlstm
from fastlstm import accuracy, dispatch
from fastlstm.ops.schema import LayerInputs

from ..cases import OUTPUTS, Case, tensors
from ..runners import Results, assert_accurate, gradients


@dataclass(frozen=True)
class VariantLayer:
    """A case of one layer, the form of each of its masks (`mask`), "" for none, and whether it normalizes."""

    case: Case
    recurrent: str = ""
    zoneout_h: str = ""
    zoneout_c: str = ""
    norm: bool = False

    def __str__(self) -> str:
        masks = (("recurrent", self.recurrent), ("h", self.zoneout_h), ("c", self.zoneout_c))
        return "-".join([str(self.case), *(f"{name}={form}" for name, form in masks if form), *["norm"] * self.norm])

    def to(self, dtype: torch.dtype) -> VariantLayer:
        return replace(self, case=self.case.to(dtype))

    def masks(self, dtype: torch.dtype, device: str) -> list[Tensor | None]:
        """recurrent_mask, zoneout_h and zoneout_c, rounded to the case's dtype, then converted to `dtype`."""
        case, generator = self.case, torch.Generator().manual_seed(self.case.seed)
        P, drawn = case.proj or case.H, []
        for form, n in ((self.recurrent, P), (self.zoneout_h, P), (self.zoneout_c, case.H)):
            one = mask(form, (case.directions, case.T, case.B, n), generator)
            if one is not None and one.dtype != torch.bool:
                one = one.to(case.dtype).to(dtype)
            drawn.append(one if one is None else one.to(device))
        return drawn

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[LayerInputs, dict[str, Tensor]]:
        """The layer's arguments, and its leaves that need a gradient."""
        made = tensors(self.case, dtype, device)
        h0, c0 = made.hx or (None, None)
        lengths = None if made.lengths is None else torch.as_tensor(made.lengths, device=device).long()
        masks, leaves = self.masks(dtype, device), made.grad_leaves()
        weights, n = list(made.weights.values()), len(made.weights) // self.case.directions
        if self.norm:
            groups = [weights[d * n : (d + 1) * n] for d in range(self.case.directions)]
            weights = []
            for d, (group, vectors) in enumerate(zip(groups, self._norm_weights(dtype, device), strict=True)):
                at = n - (self.case.proj > 0)
                weights += [*group[:at], *vectors, *group[at:]]
                leaves |= {f"norm {k} of {d}": vector for k, vector in enumerate(vectors)}
        return LayerInputs(made.input, h0, c0, weights, lengths, made.reset_mask, *masks), leaves

    def _norm_weights(self, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
        """Each direction's gain and bias of W_ih x [4H], of W_hh h [4H] and of c [H]."""
        case, generator = self.case, torch.Generator().manual_seed(self.case.seed + 1)
        sizes = [4 * case.H] * 4 + [case.H] * 2
        drawn = [[torch.rand(n, generator=generator) for n in sizes] for _ in range(case.directions)]
        parts = [[v + 0.5 if k % 2 == 0 else v - 0.5 for k, v in enumerate(vectors)] for vectors in drawn]
        return [[v.to(case.dtype).to(device, dtype).requires_grad_() for v in vectors] for vectors in parts]


def mask(form: str, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """A mask [D, T, B, n]: "sequence" and "steps" scale what they do not drop, the other forms are shares."""
    D, T, B, n = sizes
    match form:
        case "sequence":
            return _scaled(torch.rand(D, 1, B, n, generator=generator)).expand(sizes)
        case "steps":
            return _scaled(torch.rand(sizes, generator=generator))
        case "flags":
            return torch.rand(sizes, generator=generator) < 0.4
        case "numbers":
            return torch.rand(n, B, T, D, generator=generator).permute(3, 2, 1, 0)
        case "number":
            return torch.full((1, 1, 1, 1), 0.3).expand(sizes)
        case _:
            return None


def _scaled(numbers: Tensor) -> Tensor:
    return torch.where(numbers < 0.3, 0.0, 1 / 0.7)


RAGGED = {"lengths": (4, 0, 7, 1, 6), "resets": ((0, 0), (3, 0), (5, 0), (2, 2), (6, 2), (6, 3), (4, 4))}
BOTH = Case(T=7, B=5, I=4, H=8, bidirectional=True, cells=True, hx="tuple")
LAYERS = (
    VariantLayer(Case(T=1, hx="tuple", bidirectional=True), "steps", "flags", "flags"),
    VariantLayer(BOTH, recurrent="sequence"),
    VariantLayer(BOTH, recurrent="steps"),
    VariantLayer(BOTH, zoneout_h="flags"),
    VariantLayer(BOTH, zoneout_c="flags"),
    VariantLayer(BOTH, "sequence", "number", "number"),
    VariantLayer(Case(T=9, B=5, I=3, H=7, cells=True), "steps", "numbers", "numbers"),
    VariantLayer(replace(BOTH, proj=4), "sequence", "flags", "flags"),
    VariantLayer(replace(BOTH, proj=3), "steps", "numbers", "flags"),
    VariantLayer(replace(BOTH, **RAGGED), "steps", "flags", "flags"),
    VariantLayer(replace(BOTH, **RAGGED), "sequence", "numbers", ""),
    VariantLayer(replace(BOTH, **RAGGED, proj=3), "steps", "flags", "numbers"),
    VariantLayer(replace(BOTH, lengths=RAGGED["lengths"], hx="none"), "sequence", "number", "flags"),
    VariantLayer(replace(BOTH, resets=RAGGED["resets"]), "sequence", "flags", "number"),
    # several chunks of steps, of which the last is shorter
    VariantLayer(
        Case(T=18, B=3, I=2, H=16, bidirectional=True, hx="tuple", lengths=(18, 7, 0)), "steps", "flags", "flags"
    ),
    VariantLayer(
        Case(T=6, B=4, hx="tuple", strided=("x", "weights", "grads"), used=("c_n",)), "steps", "flags", "flags"
    ),
)

NORMALIZED = (
    VariantLayer(Case(T=1, B=1, I=1, H=2), norm=True),
    VariantLayer(BOTH, norm=True),
    VariantLayer(Case(T=9, B=5, I=3, H=7, bias=False, cells=True), norm=True),
    VariantLayer(replace(BOTH, hx="none", proj=3), norm=True),
    VariantLayer(replace(BOTH, **RAGGED), norm=True),
    VariantLayer(replace(BOTH, **RAGGED, proj=4), "steps", "flags", "numbers", norm=True),
    VariantLayer(BOTH, "sequence", "number", "flags", norm=True),
    VariantLayer(Case(T=18, B=3, I=2, H=16, bidirectional=True, hx="tuple", lengths=(18, 7, 0)), norm=True),
    VariantLayer(Case(T=6, B=4, hx="tuple", strided=("x", "weights", "grads"), used=("c_n",)), norm=True),
    VariantLayer(Case(hx="tuple", frozen=("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"), x_grad=False), norm=True),
)


def run(layer: VariantLayer, backend: str, dtype: torch.dtype, device: str = "cpu") -> Results:
    """Every result, and every gradient of the used ones (named "d <leaf>")."""
    inputs, leaves = layer.inputs(dtype, device)
    with fastlstm.use_backend(backend):
        results = dict(zip(OUTPUTS, dispatch.layer(inputs, keep_cells=True), strict=True))
        used = {name: results[name] for name in layer.case.used}
        arriving = [g.to(device) for g in gradients(layer.case, {name: r.detach().cpu() for name, r in used.items()})]
        found = torch.autograd.grad(list(used.values()), list(leaves.values()), arriving, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        results[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach() for name, value in results.items()}


def check(layer: VariantLayer, backend: str, rounding: accuracy.Precision, device: str = "cpu") -> None:
    """Assert that rounding explains the error of every result (fastlstm/accuracy.py)."""
    case = layer.case
    terms = {
        f"d {name}": case.T * case.B for name in layer.inputs(case.dtype, device)[1] if name not in ("x", "h0", "c0")
    }
    reference, bounds = accuracy.error_bounds(lambda: run(layer, "reference", torch.float64, device), rounding, terms)
    assert_accurate(run(layer, backend, case.dtype, device), reference, bounds, f"{backend} on {layer}")
