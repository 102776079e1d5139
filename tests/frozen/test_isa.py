"""Frozen layers at each instruction set of this machine: exact int8 products, equal results, portable state.

One process per level makes everything that the tests compare; ATEN_CPU_CAPABILITY selects the level, as in torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.backends import native

from ..cases import Case
from ..cpu.test_isa import LEVELS, NAMES
from ..machine import cpuinfo
from ..module_pairs import naming
from .forms import FORMS, NO_EXTENSION, check_frozen, in_form, run_frozen

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

ROOT = Path(__file__).parents[2]
# Depths around the widths of vectors and groups, and the largest that a row may have.
DEPTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 100, 127, 129, 255, 1000, 65536)
UNITS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33)


def lowest(x: Tensor) -> Tensor:
    return x.sign().masked_fill(x == 0, 1) * -127


def ends_at_halves(x: Tensor) -> Tensor:
    """Scale 1, zero point 2, and 254 for the largest element: 256 without a limit."""
    x = x.round()
    x[0], x[-1] = -1.5, 253.5
    return x


# Quantized weights [4H, K] from random ones, and the row x [K] from a random one.
CONTENTS = {
    "random": (lambda w: w, lambda x: x),
    "all weights 127, all x 1": (lambda w: torch.full_like(w, 127), torch.ones_like),
    "all weights -127, all x 1": (lambda w: torch.full_like(w, -127), torch.ones_like),
    "all weights 127, all x -1": (lambda w: torch.full_like(w, 127), lambda x: -torch.ones_like(x)),
    "all weights -127, all x -1": (lambda w: torch.full_like(w, -127), lambda x: -torch.ones_like(x)),
    "weights of either sign": (lambda w: lowest(w.float()).char(), lambda x: x.sign()),
    "x rounded up at both ends": (lambda w: w, ends_at_halves),
    "no weights": (torch.zeros_like, lambda x: x),
    "x zero": (lambda w: w, torch.zeros_like),
    "x denormal": (lambda w: w, lambda x: x * 1e-41),
    "denormal numbers in x": (lambda w: w, lambda x: torch.where(torch.arange(len(x)) % 3 == 0, x, x * 1e-41)),
    "x huge": (lambda w: w, lambda x: x.clamp(-3, 3) * 1e38),
    "infinity in x": (lambda w: w, lambda x: x.index_fill(0, torch.tensor(len(x) - 1), float("inf"))),
    "NaN in x": (lambda w: w, lambda x: x.index_fill(0, torch.tensor(len(x) // 2), float("nan"))),
    "-NaN in x": (lambda w: w, lambda x: x.index_fill(0, torch.tensor(0), -float("nan"))),
}


def product_cases() -> dict[str, tuple[Tensor, Tensor]]:
    """(weights [4H, K], x [K]) by name, equal at each level: torch's float32 numbers differ in the last bit."""
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for j, K in enumerate(DEPTHS):
        H = 3 if K > 1000 else UNITS[j % len(UNITS)]
        w = torch.randint(-127, 128, (4 * H, K), generator=generator, dtype=torch.int8)
        x = torch.randn(K, generator=generator, dtype=torch.float64).float()
        for name, (of_w, of_x) in CONTENTS.items():
            cases[f"K={K}, H={H}, {name}"] = of_w(w), of_x(x)
    return cases


def sums_and_scale(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels must give, in torch's int32 and float32."""
    none = torch.zeros(1)
    low, high = torch.cat([x, none]).min(), torch.cat([x, none]).max()
    if not x.isfinite().all():
        return torch.zeros(len(w), dtype=torch.int32), torch.tensor([float("nan")])
    scale = (high / 2 - low / 2) * (torch.tensor(2.0) / 255)
    if scale < 1e-30:
        return torch.zeros(len(w), dtype=torch.int32), none
    zero = (-low * (1 / scale)).round().int()
    q = ((x * (1 / scale)).round().int() + zero).clamp(max=255)
    assert q.min() >= 0
    return (w.int() * (q - zero)).sum(1, dtype=torch.int32), scale.view(1)


def run_products() -> list[tuple[Tensor, Tensor]]:
    results = []
    for w, x in product_cases().values():
        weights = [w, torch.zeros(len(w), len(w) // 4, dtype=torch.int8)]
        packed = native.extension.pack_layer(torch.float32, "int8", weights, [torch.ones(len(w))] * 2)
        results.append(native.extension.int8_sums(x, packed))
    return results


CASES = [
    (form, in_form(case, form))
    for form in FORMS
    for case in (
        Case(T=1, B=1, I=1, H=1, cells=True),
        Case(T=3, B=17, I=8, H=65, cells=True),
        Case(T=7, B=5, I=9, H=31, cells=True),
        Case(T=9, B=7, I=20, H=33, proj=17, bidirectional=True, hx="tuple", cells=True),
        Case(T=9, B=20, I=70, H=40, lengths=tuple(k % 10 for k in range(20)), bidirectional=True, cells=True),
        Case(T=7, B=4, I=5, H=18, lengths=(3, 7, 0, 1), resets=((2, 0), (0, 1)), bidirectional=True, cells=True),
    )
]
KWARGS: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 7}
# Layers of bfloat16 weights that the kernels of bfloat16 products read in tiles, where a CPU has them.
IN_TILES: dict[str, Any] = {"bidirectional": True, "proj_size": 19}


def module(form: str, H: int = 21, kwargs: dict[str, Any] = KWARGS) -> nn.Module:
    dtype, weights = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    lstm = fastlstm.LSTM(9, H, **kwargs, dtype=dtype)
    for weight in lstm.parameters():
        weight.data = torch.rand(weight.shape, generator=generator, dtype=torch.float64).sub(0.5).to(dtype)
    return fastlstm.freeze(lstm, weights)


def made_here(path: str, export: bool) -> None:
    """Write what the tests compare; runs in the process of a level."""
    torch.set_num_threads(1)
    modules = {form: module(form) for form in FORMS}
    in_tiles = module("bfloat16 weights", 40, IN_TILES)
    torch.save(
        {
            "level": torch.backends.cpu.get_cpu_capability(),
            "isa": native.extension.int8_isa(),
            "bf16_kernels": native.extension.cpu_machine()["bf16_kernels"],
            "sums": run_products(),
            "results": [run_frozen(case, form) for form, case in CASES],
            "states": {form: m.state_dict() for form, m in modules.items()},
            "packed": {form: list(m.buffers()) for form, m in modules.items()},
            "modules": modules,
            "in tiles": in_tiles,
            "in tiles packed": in_tiles.packed_l0,
        },
        path,
    )
    if export:
        for form, m in modules.items():
            x = torch.zeros(4, 3, 9, dtype=FORMS[form][0])
            dynamic = ({0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("B", min=2, max=64)},)
            torch.export.save(torch.export.export(m, (x,), dynamic_shapes=dynamic), f"{path}-{form}.pt2")


@pytest.fixture(scope="module")
def at_level(tmp_path_factory):
    """What a process at a level made, and where."""
    folder = tmp_path_factory.mktemp("levels")

    @lru_cache
    def run(level: str) -> tuple[dict[str, Any], str]:
        path, export = str(folder / level), level == "DEFAULT"
        program = f"from tests.frozen.test_isa import made_here; made_here({path!r}, {export})"
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": level.lower()}
        command = [sys.executable, "-W", "ignore", "-c", program]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return torch.load(path, weights_only=False), path

    return run


has_levels = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in NAMES, reason="requires x86-64 with AVX")


def names_of(level: str) -> tuple[str, ...]:
    """The instruction sets that int8 products may have at a level; not every CPU has VNNI."""
    return {"DEFAULT": ("baseline",), "AVX2": ("avx_vnni", "avx2")}.get(level, ("avx512_vnni", "avx_vnni", "avx2"))


def assert_exact(results: list[tuple[Tensor, Tensor]], isa: str) -> None:
    wrong = []
    for (name, (w, x)), (sums, scale) in zip(product_cases().items(), results, strict=True):
        expected = sums_and_scale(w, x)
        if not (torch.equal(sums, expected[0]) and torch.equal(scale.nan_to_num(-1), expected[1].nan_to_num(-1))):
            off = int((sums.long() - expected[0].long()).abs().max())
            wrong.append(f"{name}: sums off by {off}, scale {scale.item()!r}, expected {expected[1].item()!r}")
    assert not wrong, f"{len(wrong)} products of {isa}\n" + "\n".join(wrong[:20])


def test_products_of_this_process_are_exact():
    isa = native.extension.int8_isa()
    if "ATEN_CPU_CAPABILITY" not in os.environ and {"amx_int8", "amx_tile", "avx512_vnni"} <= cpuinfo("flags"):
        assert isa == "amx_int8"
    elif torch.backends.cpu.get_cpu_capability() in NAMES:
        assert isa in names_of(torch.backends.cpu.get_cpu_capability())
    assert_exact(run_products(), isa)


@has_levels
@pytest.mark.parametrize("level", LEVELS)
def test_products_are_exact_at_each_level(level, at_level):
    made, _ = at_level(level)
    assert made["level"] == level
    assert made["isa"] in names_of(level)
    assert_exact(made["sums"], made["isa"])


def test_a_wrong_product_is_found():
    """Off by one in the first and the last case, saturated in 16 bits as AVX2's products of bytes are, a lost NaN."""
    names, results = list(product_cases()), run_products()

    def assert_found(name: str, change: Callable[[Tensor, Tensor], Any]) -> None:
        k = names.index(name)
        kept = [t.clone() for t in results[k]]
        change(*results[k])
        with pytest.raises(AssertionError, match=rf"^1 products of planted\s+{name}: "):
            assert_exact(results, "planted")
        results[k] = tuple(kept)

    assert_found("K=1, H=1, random", lambda sums, _: sums[-1].add_(1))
    assert_found("K=65536, H=3, all weights -127, all x -1", lambda sums, _: sums[0].sub_(1))
    assert_found("K=5, H=5, NaN in x", lambda _, scale: scale.zero_())
    # AVX2's instruction for bytes adds two products in a signed word.
    assert results[names.index("K=2, H=2, all weights 127, all x 1")][0].tolist() == [2 * 255 * 127] * 8
    assert_found("K=2, H=2, all weights 127, all x 1", lambda sums, _: sums.fill_(2**15 - 1))


@has_levels
@pytest.mark.parametrize("level", LEVELS)
def test_results_are_right_at_each_level(level, at_level):
    """By the rule of each form; int8 step by step."""
    made, _ = at_level(level)
    for (form, case), results in zip(CASES, made["results"], strict=True):
        check_frozen(case, form, results, bf16_kernels=made["bf16_kernels"])


@has_levels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", LEVELS)
def test_state_is_the_same_at_each_level(level, form, at_level):
    """What a state_dict holds does not depend on the CPU, and loads on every other."""
    made, _ = at_level(level)
    here, there = module(form), made["states"][form]
    state = here.state_dict()
    assert list(there) == list(state)
    for name, value in state.items():
        assert (there[name].dtype, there[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(there[name], value), name
    fresh = fastlstm.freeze(fastlstm.LSTM(9, 21, **KWARGS, dtype=FORMS[form][0]), FORMS[form][1])
    fresh.load_state_dict(there)
    x = torch.randn(5, 3, 9).to(FORMS[form][0])
    assert torch.equal(fresh(x)[0], here(x)[0])
    # A pickled module packs itself here.
    assert torch.equal(made["modules"][form](x)[0], here(x)[0])
    for ours, theirs in zip(here.buffers(), made["modules"][form].buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert native.extension.packed_is_native(theirs)


@has_levels
@pytest.mark.parametrize("form", FORMS)
def test_bytes_packed_for_another_level(form, at_level):
    """The op packs them again in the call."""
    here = module(form)
    x = torch.randn(5, 3, 9).to(FORMS[form][0])
    expected, others = here(x), 0
    for level in LEVELS:
        packed = at_level(level)[0]["packed"][form]
        others += not all(native.extension.packed_is_native(p) for p in packed)
        for k, bytes_of_layer in enumerate(packed):
            here._buffers[f"packed_l{k}"] = bytes_of_layer
        results = here(x)
        torch.testing.assert_close(results, expected, rtol=0, atol=0, msg=naming(level))
        state = here.state_dict()
        for name, value in module(form).state_dict().items():
            assert torch.equal(state[name], value), (level, name)
    assert others > 0, "no level packs otherwise: the test shows nothing"


@has_levels
def test_bfloat16_weights_packed_in_tiles(at_level):
    """Portable like the others: state, pickles and bytes of a CPU that multiplies bfloat16 run here."""
    made, _ = at_level(LEVELS[-1])
    if not made["bf16_kernels"]:
        pytest.skip("this CPU has no AVX512_BF16")
    here, there = module("bfloat16 weights", 40, IN_TILES), made["in tiles"]
    x = torch.randn(5, 3, 9)
    expected = here(x)[0]
    assert torch.equal(there(x)[0], expected)
    for name, value in here.state_dict().items():
        assert torch.equal(there.state_dict()[name], value), name
    packed = made["in tiles packed"]
    kernels = native.extension.cpu_machine()["bf16_kernels"]
    assert native.extension.packed_is_native(packed) == kernels
    here._buffers["packed_l0"] = packed
    assert torch.equal(here(x)[0], expected)


@has_levels
@pytest.mark.parametrize("form", FORMS)
def test_exported_program_of_another_level(form, at_level):
    made, path = at_level("DEFAULT")
    assert made["isa"] == "baseline"
    program = torch.export.load(f"{path}-{form}.pt2")
    here = module(form)
    for T, B in ((4, 3), (9, 2)):
        x = torch.randn(T, B, 9).to(FORMS[form][0])
        torch.testing.assert_close(program.module()(x), here(x), rtol=0, atol=0, msg=naming(f"T={T}, B={B}"))
