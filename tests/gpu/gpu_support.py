"""For tests/gpu/test_gpu_*.py: run a Case on a GPU at a precision, by a backend or nn.LSTM, and check its accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from fastlstm import accuracy, dispatch
from fastlstm.ops.schema import LayerCall

from ..cases import Case, Tensors, tensors
from ..runners import Results, assert_accurate, gradients
from . import variant_layers

# FASTLSTM_TEST_DEVICE=cpu runs tests of the GPU suite on CPU tensors if they do not require CUDA.
DEVICE = os.environ.get("FASTLSTM_TEST_DEVICE", "cuda")
# Every GPU test module sets `pytestmark = gpu`.
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason=f"no GPU: torch.cuda.is_available() is False for torch {torch.__version__}, CUDA {torch.version.cuda}",
    ),
]
# The backends with GPU kernels. FASTLSTM_BACKEND restricts the suite to one.
OURS = [name for name in ("native", "triton") if os.environ.get("FASTLSTM_BACKEND", "auto") in ("auto", name)]
backends = pytest.mark.parametrize("backend", OURS)


@pytest.fixture(name="backend", params=[*OURS, "eager"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run once per backend, selected by name, on DEVICE; replaces conftest's fixture in modules that import it."""
    require(request.param, Case(), DEVICE)
    with fastlstm.use_backend(request.param):
        yield request.param


@dataclass(frozen=True)
class Arithmetic:
    """A dtype and, for float32, torch's TF32 flags."""

    dtype: torch.dtype
    rnn: str = "ieee"  # torch.backends.cudnn.rnn.fp32_precision
    matmul: str = "ieee"  # torch.backends.cuda.matmul.fp32_precision

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.dtype != torch.float32 else f"{name}-rnn_{self.rnn}-matmul_{self.matmul}"

    def rounding(self, backend: str) -> accuracy.Precision:
        """The rounding of `backend` with these flags (docs/numerics.md, "float32 on a GPU")."""
        flags = {"eager": (self.matmul,), "reference": (self.matmul,), "triton": (self.rnn, self.matmul)}
        tf32 = self.dtype == torch.float32 and "tf32" in flags.get(backend, (self.rnn,))
        if backend == "reference" and not tf32:
            return accuracy.Precision.per_op(self.dtype)
        return accuracy.Precision.of(self.dtype, "tf32" if tf32 else "ieee")

    @contextmanager
    def flags(self) -> Iterator[None]:
        rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
        before = rnn.fp32_precision, matmul.fp32_precision
        rnn.fp32_precision, matmul.fp32_precision = self.rnn, self.matmul
        try:
            yield
        finally:
            rnn.fp32_precision, matmul.fp32_precision = before


IEEE, TF32 = Arithmetic(torch.float32), Arithmetic(torch.float32, "tf32", "tf32")
DOUBLE, HALF, BFLOAT16 = Arithmetic(torch.float64), Arithmetic(torch.float16), Arithmetic(torch.bfloat16)
PRECISIONS = (IEEE, TF32, DOUBLE, HALF, BFLOAT16)


def require(backend: str, case: Case, device: str = "cuda") -> None:
    """Skip, with the backend's reason, if it cannot run `case` on the GPU."""
    if backend not in dispatch.BACKENDS:
        pytest.skip(f"there is no {backend} backend in this build of fastlstm")
    case_tensors = on_device(case, case.dtype, device)
    weights = list(case_tensors.weights.values())[: len(case_tensors.weights) // case.layers]
    flag = case_tensors.leaves["x"]
    call = dispatch.describe(flag, weights, flag if case.lengths else None, flag if case.resets else None)
    reason = dispatch.BACKENDS[backend].supports(call)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def on_device(case: Case, dtype: torch.dtype, device: str = "cuda") -> Tensors:
    """The case's tensors on a GPU."""
    return tensors(case, dtype, device)


def ours(case: Case, case_tensors: Tensors) -> Callable[[], Results]:
    """fastlstm.LSTM on `case_tensors`, on the backend selected at the time of the call."""
    module = case.module(fastlstm.LSTM, case_tensors.weights)

    def call() -> Results:
        options = {
            "lengths": case_tensors.lengths,
            "reset_mask": case_tensors.reset_mask,
            "return_cell_states": case.cells,
        }
        output, (h_n, c_n), *cells = module(case_tensors.input, case_tensors.hx, **options)
        return {"output": output, "h_n": h_n, "c_n": c_n, **({"cells": cells[0]} if cells else {})}

    return call


def cudnn(case: Case, case_tensors: Tensors) -> Callable[[], Results]:
    """nn.LSTM on `case_tensors`."""
    module = case.module(nn.LSTM, case_tensors.weights)
    module.flatten_parameters()
    hx = None if case_tensors.hx is None else tuple(state.contiguous() for state in case_tensors.hx)

    def call() -> Results:
        output, (h_n, c_n) = module(case_tensors.input, hx)
        return {"output": output, "h_n": h_n, "c_n": c_n}

    return call


def with_gradients(case: Case, case_tensors: Tensors, call: Callable[[], Results]) -> Results:
    """Every result of a call, and every gradient of its used ones (named "d <leaf>")."""
    results = call()
    used = {name: results[name] for name in case.used if name in results}
    grad_leaves = case_tensors.grad_leaves()
    arriving = [
        g.to(case_tensors.input.device) for g in gradients(case, {n: r.detach().cpu() for n, r in used.items()})
    ]
    collected = torch.autograd.grad(list(used.values()), list(grad_leaves.values()), arriving, allow_unused=True)
    for (name, leaf), grad in zip(grad_leaves.items(), collected, strict=True):
        results[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach() for name, value in results.items()}


def run(case: Case, precision: Arithmetic, backend: str, device: str = "cuda") -> Results:
    """The case on a backend; "cudnn" is nn.LSTM."""
    case_tensors = on_device(case.to(precision.dtype), precision.dtype, device)
    with precision.flags():
        if backend == "cudnn":
            return with_gradients(case, case_tensors, cudnn(case, case_tensors))
        with fastlstm.use_backend(backend):
            return with_gradients(case, case_tensors, ours(case, case_tensors))


def check(case: Case, precision: Arithmetic, backend: str, device: str = "cuda") -> None:
    """Assert that rounding at this precision explains every result's error (fastlstm/accuracy.py)."""
    case = case.to(precision.dtype)
    require(backend, case, device)
    reference, bounds = expected(case, precision.rounding(backend), device)
    results = run(case, precision, backend, device)
    assert results.keys() == reference.keys()
    assert_accurate(results, reference, bounds, f"{backend}, {precision}, {case!r}")


def check_variant(
    layer: variant_layers.VariantLayer, precision: Arithmetic, backend: str, device: str = DEVICE
) -> None:
    """`check` for a layer with recurrent dropout, zoneout or layer normalization."""
    layer = layer.to(precision.dtype)
    require(backend, layer.case, device)
    call = LayerCall.of(layer.inputs(precision.dtype, device)[0])
    if (reason := dispatch.BACKENDS[backend].supports(call)) is not None:
        pytest.skip(f"{backend}: {reason}")
    with precision.flags():
        variant_layers.check(layer, backend, precision.rounding(backend), device)


@lru_cache(maxsize=2)  # a case runs on all backends in turn, and its reference takes minutes for T = 70,000
def expected(case: Case, rounding: accuracy.Precision, device: str) -> tuple[Results, Mapping[str, float]]:
    """The float64 reference on inputs rounded to the case's dtype, and its bounds."""
    case_tensors = on_device(case, torch.float64, device)
    call = ours(case, case_tensors)
    terms = {f"d {name}": case.T * case.B for name in case_tensors.weights}

    def run() -> Results:
        with fastlstm.use_backend("reference"), DOUBLE.flags():
            return with_gradients(case, case_tensors, call)

    return accuracy.error_bounds(run, rounding, terms)


def same(a: Results, b: Results) -> None:
    """Assert bitwise equality."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name].cpu(), b[name].cpu())]
    assert not different, f"differ: {different}"


def nan_outside(t: Tensor) -> Tensor:
    """Copy t to a layout with reversed dimensions and NaN in the gaps between elements."""
    order = tuple(reversed(range(t.dim())))
    return torch.stack([t.permute(order), torch.full_like(t.permute(order), float("nan"))], -1)[..., 0].permute(order)
