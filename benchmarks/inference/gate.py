"""Accuracy of the engines: float ones by the shared rule (fastlstm/accuracy.py), int8 ones by a bound on the error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.data import Inputs
from benchmarks.gate import OUTPUTS, Expected, check_accuracy, reference_outputs
from fastlstm.accuracy import Accuracy, Precision, error_bounds

# An int8 engine is refused if the RMS of a result's error exceeds this share of the RMS of the result. Rounding a
# weight matrix and its factor to 8 bits costs 0.002 to 0.013 in this suite, 0.025 where the factor has 7 bits; a wrong
# gate order or a missing bias costs more than 0.1.
INT8_BOUND = 0.05


@dataclass
class Errors:
    """What is known of an engine's results."""

    status: str  # ok, or WRONG and why
    accuracy: Accuracy | None  # of a float engine
    max_error: float  # of the output, against the float64 reference with the weights as given
    rms_error: float
    rms_output: float  # of the reference


@dataclass
class References:
    """The float64 references of a case, made when an engine needs them."""

    case: Case
    inputs: Inputs
    expected: dict[str, Expected] = field(default_factory=dict)

    def of(self, weights: str) -> Expected:
        """The reference and its bounds for float32 or bfloat16 weights.

        Frozen bfloat16 weights are those that the module was given, rounded; biases, states and sums are float32. So
        the reference has the rounded weights, and the bound is for products of bfloat16 factors.
        """
        if weights not in self.expected:
            precision, inputs = Precision.of(torch.float32), _in_float64(self.inputs)
            if weights == "bfloat16":
                precision = Precision.of(torch.float32, "bf16")
                rounded = {n: w.bfloat16().double() if w.dim() == 2 else w for n, w in inputs.weights.items()}
                inputs = replace(inputs, weights=rounded)
            run = error_bounds(lambda: reference_outputs(self.case, inputs), precision)
            self.expected[weights] = Expected(*run)
        return self.expected[weights]

    def check(self, results: Mapping[str, Tensor], weights: str) -> Errors:
        """Compare (output, h_n, c_n) of an engine."""
        exact = self.of("float32").reference
        for name in OUTPUTS:
            if results[name].shape != exact[name].shape:
                shapes = f"{list(results[name].shape)}, expected {list(exact[name].shape)}"
                return Errors(f"WRONG: {name} has shape {shapes}", None, math.inf, math.inf, _rms(exact["output"]))
        errors = {name: _rms(results[name].double() - exact[name]) for name in OUTPUTS}
        sizes = {name: _rms(exact[name]) for name in OUTPUTS}
        max_error = float((results["output"].double() - exact["output"]).abs().max())
        accuracy, status = None, "ok"
        if weights == "int8":
            for name in OUTPUTS:
                if not errors[name] <= INT8_BOUND * sizes[name]:
                    status = f"WRONG: {name}: RMS error {errors[name]:.3g} at RMS {sizes[name]:.3g}"
        else:
            accuracy = check_accuracy(results, self.of(weights), "forward")
            status = "ok" if accuracy.ok else f"WRONG: {accuracy}"
        return Errors(status, accuracy, max_error, errors["output"], sizes["output"])


def _in_float64(inputs: Inputs) -> Inputs:
    """The values of `inputs` without the gradient that benchmarks.gate needs."""
    return replace(
        inputs,
        x=inputs.x.double(),
        hx=None if inputs.hx is None else (inputs.hx[0].double(), inputs.hx[1].double()),
        weights={name: weight.double() for name, weight in inputs.weights.items()},
    )


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())
