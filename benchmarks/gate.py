"""The correctness gate: no time is reported for a wrong result. The rule is that of fastlstm/accuracy.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import Inputs
from fastlstm import reference
from fastlstm.accuracy import Accuracy, Precision, compare, error_bounds

OUTPUTS = ("output", "h_n", "c_n")


@dataclass(frozen=True)
class Expected:
    """What every program must give, and how far rounding may bring it from that."""

    truth: dict[str, Tensor]
    bounds: Mapping[str, float]

    def names(self, mode: str) -> Iterable[str]:
        """The results of "train" or "forward"."""
        return self.truth if mode == "train" else OUTPUTS


def precision(case: Case, ours: bool) -> Precision:
    """What an implementation rounds: ours keeps sums and states in float32, others may round every op's result."""
    if case.dtype == "tf32":
        return Precision.of(torch.float32, tf32=True)
    return Precision.of(case.torch_dtype) if ours else Precision.per_op(case.torch_dtype)


def expected(case: Case, inputs: Inputs, precision: Precision) -> Expected:
    """The truth for the case's own, already rounded, inputs and weights, and its bounds."""
    given = in_float64(inputs)
    terms = {f"d_{name}": case.rows for name in given.weights}
    return Expected(*error_bounds(lambda: truth(case, given), precision, terms))


def in_float64(inputs: Inputs) -> Inputs:
    """Leaves of the same values."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    return Inputs(
        x=leaf(inputs.x),
        grad_output=inputs.grad_output.double(),
        hx=None if inputs.hx is None else (leaf(inputs.hx[0]), leaf(inputs.hx[1])),
        lengths=None if inputs.lengths is None else inputs.lengths.to(inputs.x.device),
        weights={name: leaf(weight) for name, weight in inputs.weights.items()},
    )


def truth(case: Case, given: Inputs) -> dict[str, Tensor]:
    """fastlstm.reference layer by layer, with autograd's gradients; named as Program.results names them."""
    y, h_n, c_n = given.x, [], []
    for layer in range(case.L):
        own = [w for name, w in given.weights.items() if name.split("_l")[1].split("_")[0] == str(layer)]
        directions = slice(layer * case.D, (layer + 1) * case.D)
        h0, c0 = (None, None) if given.hx is None else (given.hx[0][directions], given.hx[1][directions])
        y, h, c, _ = reference.layer(y, h0, c0, own, given.lengths)
        h_n.append(h)
        c_n.append(c)
    leaves = {"d_x": given.x, **{f"d_{name}": weight for name, weight in given.weights.items()}}
    if given.hx is not None:
        leaves |= {"d_h0": given.hx[0], "d_c0": given.hx[1]}
    gradients = torch.autograd.grad(y, list(leaves.values()), given.grad_output)
    outputs = dict(zip(OUTPUTS, (y, torch.cat(h_n), torch.cat(c_n)), strict=True))
    return {**outputs, **dict(zip(leaves, gradients, strict=True))}


def judge(results: Mapping[str, Tensor], expected: Expected, mode: str) -> Accuracy:
    """The accuracy of the result closest to, or furthest beyond, what is allowed; a missing result is wrong."""
    missing = torch.empty(0)  # no result has this shape
    return compare(
        {name: results.get(name, missing) for name in expected.names(mode)}, expected.truth, expected.bounds
    )[0]
