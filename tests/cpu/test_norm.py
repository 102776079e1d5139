"""Layer normalization on the CPU kernels (csrc/cpu/norm_forward.h, norm_backward.h), by the rule of accuracy.py.

tests/ops/test_variants.py has random configurations on all backends; here are sizes around the kernels' blocks, each
instruction set, 1 to 4 threads, bfloat16, and what the plan says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlstm import accuracy, reference
from fastlstm.backends import native
from fastlstm.ops.schema import LayerCall, LayerInputs, LayerShape, arguments

from .test_isa import LEVELS, NAMES

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """Sizes and options of one call."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0  # H if 0
    D: int = 1
    bias: bool = True
    dtype: torch.dtype = torch.float32
    states: bool = True  # h0 and c0
    lengths: tuple[int, ...] | None = None
    resets: bool = False
    masks: bool = False  # recurrent_mask, zoneout_h and zoneout_c
    changed: bool = False  # y between forward and backward

    def inputs(self, dtype: torch.dtype) -> LayerInputs:
        """Drawn in float64, rounded to the layer's dtype, then converted to `dtype`. Padding is NaN."""
        generator = torch.Generator().manual_seed(0)
        T, B, I, H, P, D = self.T, self.B, self.I, self.H, self.P or self.H, self.D  # noqa: E741

        def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
            return drawn.to(self.dtype).to(dtype).requires_grad_()

        weights = []
        for _ in range(D):
            weights += [draw(4 * H, I), draw(4 * H, P)]
            weights += [draw(4 * H) for _ in range(2 * self.bias)]
            for n in (4 * H, 4 * H, H):
                weights += [draw(n, scale=0.2, shift=1.0), draw(n, scale=0.2)]
            weights += [draw(P, H, scale=H**-0.5)] if P != H else []
        x = draw(T, B, I)
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        if lengths is not None:
            with torch.no_grad():
                x.masked_fill_((torch.arange(T)[:, None] >= lengths)[..., None], float("nan"))
        resets = torch.rand(T, B, generator=generator) < 0.3 if self.resets else None
        masks: list[Tensor | None] = [None, None, None]
        if self.masks:
            masks = [
                draw(D, T, B, P).detach(),
                torch.rand(D, T, B, P, generator=generator) < 0.3,
                draw(1, 1, 1, 1, scale=0.0, shift=0.25).detach().expand(D, T, B, H),
            ]
        h0, c0 = (draw(D, B, P), draw(D, B, H)) if self.states else (None, None)
        return LayerInputs(x, h0, c0, weights, lengths, resets, *masks)


def run(layer: Layer, dtype: torch.dtype | None = None) -> Results:
    """All results and gradients: of the native op, or of the reference in `dtype`."""
    inputs = layer.inputs(dtype or layer.dtype)
    if dtype is None:
        outputs = torch.ops.fastlstm.native_layer(*arguments(inputs, True, False))[:4]
    else:
        outputs = reference.layer(*inputs)
    results = dict(zip(("y", "h_n", "c_n", "cells"), (out.detach().clone() for out in outputs), strict=True))
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs)
    grads = [grad.to(layer.dtype).to(out.dtype) for grad, out in zip(drawn, outputs, strict=True)]
    if layer.changed and dtype is None:
        with torch.no_grad():
            outputs[0].zero_()
    leaves = {f"d{k}": leaf for k, leaf in enumerate(inputs.differentiable) if leaf is not None}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return results | dict(zip(leaves, found, strict=True))


@lru_cache(maxsize=256)
def expected(layer: Layer) -> tuple[Results, accuracy.Bounds]:
    precision = accuracy.Precision.of(layer.dtype)
    terms = {f"d{k}": layer.T * layer.B for k in range(3, 3 + len(layer.inputs(torch.float64).weights))}
    return accuracy.error_bounds(lambda: run(layer, torch.float64), precision, terms)


def check(layer: Layer, results: Results | None = None) -> None:
    truth, bounds = expected(replace(layer, changed=False))
    wrong = [str(found) for found in accuracy.compare(results or run(layer), truth, bounds) if not found.ok]
    assert not wrong, f"{layer}\n  " + "\n  ".join(wrong)


@pytest.fixture(autouse=True)
def loaded() -> None:
    if native.extension is None:
        pytest.skip(native.load_error)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


LENGTHS = (9, 0, 4, 9, 1)
# H around vectors of 2 to 16 elements, 4H around panels of two; rows around tiles, hoisting and row blocks.
SIZES = (
    *(Layer(T=5, B=3, I=4, H=H) for H in (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33)),
    *(Layer(T=T, B=B, I=3, H=13) for T, B in ((1, 1), (4, 1), (1, 5), (2, 97), (4, 49), (70, 3))),
    Layer(T=3, B=1, I=300, H=40),  # unpacked, rows longer than one part
    Layer(T=20, B=2, I=3, H=200, states=False),  # W_hh unpacked in forward, W_ih packed
    Layer(T=5, B=3, I=4, H=17, P=9, D=2),
    Layer(T=2, B=2, I=4, H=33, P=7),
)
OPTIONS = (
    Layer(T=9, B=5, I=3, H=18, D=2, lengths=LENGTHS),
    Layer(T=9, B=5, I=3, H=18, P=6, D=2, bias=False, lengths=LENGTHS, resets=True, masks=True),
    Layer(T=6, B=20, I=5, H=9, D=2, states=False, masks=True),
    Layer(T=6, B=20, I=5, H=9, resets=True),
)
CHANGED = tuple(replace(layer, changed=True) for layer in OPTIONS)
CHUNKS = Layer(T=140, B=32, I=4, H=64, D=2)  # two chunks of backward
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer", [*SIZES, *OPTIONS, *CHANGED], ids=str)
def test_results_and_gradients(layer, dtype, poisoned_empty):
    check(replace(layer, dtype=dtype))


def test_packed_rows():
    """x [N, I] without padding, the op's other layout."""
    padded = replace(OPTIONS[0], lengths=(9, 9, 4, 1, 1), dtype=torch.float64).inputs(torch.float64)
    assert padded.lengths is not None
    valid = torch.arange(9)[:, None] < padded.lengths

    def results(inputs: LayerInputs, of_rows: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y, h_n, c_n, cells, _ = torch.ops.fastlstm.native_layer(*arguments(inputs, True, False))
        outputs = [of_rows(y), h_n, c_n, of_rows(cells)]
        leaves = [t for t in padded.differentiable if t is not None]
        return outputs + list(torch.autograd.grad(sum((out**2).sum() for out in outputs), leaves))

    packed = results(padded._replace(x=padded.x[valid]), lambda rows: rows)
    for ours, theirs in zip(packed, results(padded, lambda rows: rows[valid]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck():
    for layer in (OPTIONS[1], SIZES[0]):
        args = arguments(layer.inputs(torch.float32), True, True)
        torch.library.opcheck(torch.ops.fastlstm.native_layer.default, args)


def test_several_chunks_of_backward():
    shape = LayerShape.of(CHUNKS.inputs(torch.float32).weights)
    call = LayerCall(torch.device("cpu"), torch.float32, CHUNKS.I, shape)
    assert native.cpu_plan(call, CHUNKS.T, CHUNKS.B)["backward"]["chunk_steps"] < CHUNKS.T
    check(CHUNKS)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layer", [SIZES[4], SIZES[14], SIZES[15], SIZES[-1], *OPTIONS, CHANGED[1]], ids=str)
def test_half_precision(layer, dtype, poisoned_empty):
    check(replace(layer, dtype=dtype))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("layer", [CHUNKS, Layer(T=30, B=33, I=40, H=65, P=31, D=2), *OPTIONS], ids=str)
def test_threads(layer, n, threads):
    torch.set_num_threads(n)
    check(layer)
    first, again = run(layer), run(layer)
    assert all(torch.equal(first[name], again[name]) for name in first), "not deterministic"


PROGRAM = """
import sys, torch
from fastlstm.backends import native
from tests.cpu import test_norm
torch.set_num_threads(1)
assert native.extension.isa() == sys.argv[1], native.extension.isa()
torch.save([test_norm.run(layer) for layer in test_norm.AT_EACH_LEVEL], sys.argv[2])
"""
AT_EACH_LEVEL = (
    *SIZES,
    *OPTIONS,
    *(replace(layer, dtype=torch.float64) for layer in SIZES[:14]),
    *(replace(layer, dtype=torch.bfloat16) for layer in (*SIZES[2:16:3], *OPTIONS)),
)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in NAMES, reason="requires x86-64 with AVX")
@pytest.mark.parametrize("level", LEVELS)
def test_each_instruction_set(level):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT" and level != "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, NAMES[level], f"{folder}/results"],
            env={**os.environ, "ATEN_CPU_CAPABILITY": level.lower()},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        for layer, results in zip(AT_EACH_LEVEL, torch.load(f"{folder}/results"), strict=True):
            check(layer, results)


@pytest.mark.parametrize(("T", "B", "D"), [(1, 64, 1), (100, 1, 1), (100, 1, 2), (100, 32, 1), (100, 32, 2)])
def test_plan_never_splits_units(T, B, D):
    weights = Layer(T=1, B=1, I=256, H=256, D=D).inputs(torch.bfloat16).weights
    call = LayerCall(torch.device("cpu"), torch.bfloat16, 256, LayerShape.of(weights))
    for n in (1, 2, 8):
        for plan in native.cpu_plan(call, T, B, threads=n, bf16_kernels=True).values():
            assert plan["split"] in ("none", "rows"), plan["text"]
            assert plan["engine"] != "bf16_products", plan["text"]
            assert "a row's statistics need all units" in plan["text"]


def test_gradients_of_gradients():
    """By the formula, which reads all inputs and no gates."""
    layer = Layer(T=3, B=2, I=3, H=5, D=2, dtype=torch.float64)
    found = []
    for f in (lambda inputs: torch.ops.fastlstm.native_layer(*arguments(inputs, True, False))[:4],
              lambda inputs: reference.layer(*inputs)):  # fmt: skip
        inputs = layer.inputs(torch.float64)
        leaves = [t for t in inputs.differentiable if t is not None]
        first = torch.autograd.grad(sum((out**2).sum() for out in f(inputs)), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
