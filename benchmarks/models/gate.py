"""The accuracy gate of converted models: `check_accuracy`, against the unconverted model in float64.

The rule of fastlstm/accuracy.py has no model of what convolutions and norms round, so the bound here comes from the
unconverted model's own error in float32: at most `FACTOR` times as large, and `ULPS` units in the last place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.cases import SEED
from benchmarks.models.zoo import Workload
from fastlstm.accuracy import Accuracy

FACTOR = 4.0
ULPS = 16.0
# Error of the unconverted model in float32, of all results together in the Euclidean norm, above which it is no
# baseline: for example, dropout drew other masks in float64.
MAX_BASELINE_ERROR = 1e-3

Step = Callable[[], Any]


def step_of(workload: Workload, module: nn.Module, mode: str, inputs: Any = None) -> Step:
    """One training step without the optimizer, or one inference call, of `module` as the workload calls it."""
    data = workload.inputs if inputs is None else inputs

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        loss = workload.train(module, data)
        loss.backward()
        return loss

    def infer() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return workload.infer(module, data)

    module.train(mode == "train")
    return train if mode == "train" else infer


def results_of(workload: Workload, module: nn.Module, mode: str, inputs: Any = None) -> dict[str, Tensor]:
    """The loss and all gradients of a training step, or the results of an inference call, from one seed.

    Runs on a copy: a training step moves the statistics of batch norm.
    """
    module = copy.deepcopy(module)
    step = step_of(workload, module, mode, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        result = step()
    if mode != "train":
        return dict(result)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": result.detach(), **grads}


def reference_of(workload: Workload, mode: str) -> dict[str, Tensor]:
    """The results of the unconverted model in float64."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return results_of(workload, copy.deepcopy(workload.module).double(), mode, tree_map(widen, workload.inputs))


def check_accuracy(
    converted: Mapping[str, Tensor], baseline: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Accuracy:
    """Return the accuracy of the converted model's worst result, relative to its bound.

    Raises:
        ValueError: if the results' names differ, or the unconverted model is itself too far from the reference.
    """
    if not converted.keys() == baseline.keys() == reference.keys():
        raise ValueError(f"results differ: {sorted(converted.keys() ^ reference.keys())}")
    size = sum(float(value.double().square().sum()) for value in reference.values()) ** 0.5
    error = sum(float((baseline[name].double() - value).square().sum()) for name, value in reference.items()) ** 0.5
    if not error <= MAX_BASELINE_ERROR * size:
        raise ValueError(f"the unconverted model differs from its float64 copy by {error / size:.2g} of its results")
    return max((_compare(name, converted[name], baseline[name], reference[name]) for name in reference), key=_badness)


def _compare(name: str, converted: Tensor, baseline: Tensor, reference: Tensor) -> Accuracy:
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    if converted.shape != reference.shape:
        return Accuracy(name, float("inf"), 0.0, scale)
    error, baseline_error = (
        float((t.double() - reference).abs().max()) if t.numel() else 0.0 for t in (converted, baseline)
    )
    allowed = FACTOR * baseline_error + ULPS * torch.finfo(torch.float32).eps * scale
    return Accuracy(name, error, allowed, scale)


def _badness(accuracy: Accuracy) -> float:
    return float("inf") if accuracy.error != accuracy.error else accuracy.error_ratio
