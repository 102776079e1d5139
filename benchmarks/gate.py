"""The accuracy gate: no time is reported for a wrong result. fastlstm/accuracy.py has the rule."""

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
    """The float64 reference of a case, and the largest error that rounding explains in each result."""

    reference: dict[str, Tensor]
    bounds: Mapping[str, float]

    def names(self, mode: str) -> Iterable[str]:
        """The results of "train" or "forward"."""
        return self.reference if mode == "train" else OUTPUTS


def precision(case: Case, ours: bool) -> Precision:
    """The rounding of an implementation: ours keeps sums and states in float32, others may round every op's result."""
    products = {"tf32": "tf32", "bf16_products": "bf16"}
    if case.dtype in products:
        return Precision.of(torch.float32, products[case.dtype])
    return Precision.of(case.torch_dtype) if ours else Precision.per_op(case.torch_dtype)


def expected(case: Case, inputs: Inputs, precision: Precision) -> Expected:
    """Compute the reference and its bounds for the case's inputs and weights, already rounded to its dtype."""
    widened = in_float64(inputs)
    terms = {f"d_{name}": case.rows for name in widened.weights}
    return Expected(*error_bounds(lambda: reference_results(case, widened), precision, terms))


def in_float64(inputs: Inputs) -> Inputs:
    """Convert to float64 leaves of equal values."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    return Inputs(
        x=leaf(inputs.x),
        grad_output=inputs.grad_output.double(),
        hx=None if inputs.hx is None else (leaf(inputs.hx[0]), leaf(inputs.hx[1])),
        lengths=None if inputs.lengths is None else inputs.lengths.to(inputs.x.device),
        weights={name: leaf(weight) for name, weight in inputs.weights.items()},
    )


def reference_outputs(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Run fastlstm.reference layer by layer; keys as in OUTPUTS."""
    y, h_n, c_n = inputs.x, [], []
    for layer in range(case.L):
        layer_weights = [w for name, w in inputs.weights.items() if name.split("_l")[1].split("_")[0] == str(layer)]
        directions = slice(layer * case.D, (layer + 1) * case.D)
        h0, c0 = (None, None) if inputs.hx is None else (inputs.hx[0][directions], inputs.hx[1][directions])
        y, h, c, _ = reference.layer(y, h0, c0, layer_weights, inputs.lengths)
        h_n.append(h)
        c_n.append(c)
    return dict(zip(OUTPUTS, (y, torch.cat(h_n), torch.cat(c_n)), strict=True))


def reference_results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """`reference_outputs`, and the gradients by autograd; keys as in Program.results."""
    outputs = reference_outputs(case, inputs)
    leaves = {"d_x": inputs.x, **{f"d_{name}": weight for name, weight in inputs.weights.items()}}
    if inputs.hx is not None:
        leaves |= {"d_h0": inputs.hx[0], "d_c0": inputs.hx[1]}
    gradients = torch.autograd.grad(outputs["output"], list(leaves.values()), inputs.grad_output)
    return {**outputs, **dict(zip(leaves, gradients, strict=True))}


def check_accuracy(results: Mapping[str, Tensor], expected: Expected, mode: str) -> Accuracy:
    """Return the accuracy of the worst result, relative to its bound; a missing result is wrong."""
    missing = torch.empty(0)  # no result has this shape
    return compare(
        {name: results.get(name, missing) for name in expected.names(mode)}, expected.reference, expected.bounds
    )[0]
