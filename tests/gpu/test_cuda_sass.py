"""The instructions between the arrival of a state and the sending of the next in the persistent kernels, in SASS.

They are a step's critical path (docs/gpu-kernels.md, "Critical path"), so no address is computed there, no length or
reset is read, and the number of instructions is limited. Counts are static: an inner loop over W_hh in shared memory
counts once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .sass import Step, barriers, cuobjdump, disassemble, shortest_loop

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump (it comes with the triton wheel)"),
]

ROOT = Path(__file__).parents[2]
PROGRAM = """
#include "cuda/launch_persistent_{phase}.cuh"
namespace fastlstm::cuda {{
using T = __nv_bfloat16;
template __global__ void persistent<{block}, Persistent{args}<T>>(const __grid_constant__ Persistent{args}<T>);
}}
"""
# bfloat16 on sm_90a, batch tiles of 8 rows, 32 units per CTA. Instructions from arrival to the first load of a state,
# from the barrier after the GEMM to the next (cluster backward: from arrival to the barrier), and from there to the
# sending. Comments: counts by nvcc 13.0, and before the critical path was shortened (99557cf).
CEILINGS = {
    ("forward", "ForwardFlags<T, 32, 2, 1, {ragged}>"): (12, 95, 25),  # 8, 84, 17; were 54, 291, 19
    ("forward", "ForwardCluster<T, 1, {ragged}>"): (18, 52, 32),  # 13, 45, 24; were 22, 189, 25
    ("backward", "BackwardFlags<T, 32, 8, 1, {ragged}>"): (16, 48, 32),  # 11, 39, 24; were 41, 293, 16
    ("backward", "BackwardCluster<T, 1, {ragged}>"): (None, 84, 75),  # 72, 65; were 237, 58
}
SINGLE = (
    ("forward", "ForwardBlock<T, SingleForward<T>, {ragged}>"),
    ("backward", "BackwardBlock<T, SingleBackward<T>, {ragged}>"),
)
RAGGED_EXTRA = 48  # prefetched flags, and the branch for rows without this step


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory):
    """The instructions of a block, compiled once."""
    folder = tmp_path_factory.mktemp("sass")

    @cache
    def compiled(phase: str, block: str) -> list[tuple[int, str]]:
        source, cubin = folder / f"{abs(hash(block))}.cu", folder / f"{abs(hash(block))}.cubin"
        source.write_text(PROGRAM.format(phase=phase, block=block, args=phase.capitalize()))
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)], check=True)
        return disassemble(cubin)

    return compiled


@pytest.fixture
def step(instructions):
    """The time loop of a block."""
    return lambda phase, block: Step.of(instructions(phase, block))


@pytest.fixture
def single(instructions):
    """The time loop of a single-block group: the loop with products and a barrier."""
    multiplies = (lambda text: "HMMA" in text, lambda text: "BAR.SYNC" in text)
    return lambda phase, block: shortest_loop(instructions(phase, block), *multiplies)


kernels = pytest.mark.parametrize(("phase", "block"), CEILINGS, ids=lambda value: value.split("<")[0])
# A second compilation of each kernel: pytest -m slow.
ragged_or_dense = pytest.mark.parametrize(
    "ragged",
    [pytest.param("false", id="dense"), pytest.param("true", id="ragged", marks=pytest.mark.slow)],
)


@pytest.mark.parametrize(("phase", "block"), [*CEILINGS, *SINGLE], ids=lambda value: value.split("<")[0])
def test_no_register_is_spilled(phase, block, instructions):
    """No load or store of local memory; tests/gpu/test_cuda_compile.py asks ptxas for every kernel (-m slow)."""
    code = [text for _, text in instructions(phase, block.format(ragged="false"))]
    assert len(code) > 100
    assert not [text for text in code if re.search(r"\b(?:STL|LDL)\b", text)]


@kernels
@ragged_or_dense
def test_two_barriers_a_step(phase, block, ragged, step):
    """A block in which W_hh is not multiplied before the cell."""
    expected = 1 if block.startswith("BackwardCluster") else 2
    assert len(barriers(step(phase, block.format(ragged=ragged)).code)) == expected


@pytest.mark.parametrize(("phase", "block"), SINGLE, ids=["forward", "backward"])
@ragged_or_dense
def test_one_barrier_and_no_exchange_in_a_single_block(phase, block, ragged, single):
    loop = single(phase, block.format(ragged=ragged))
    assert len(barriers(loop)) == 1
    assert not [text for text in loop if "MEMBAR" in text or "STAS" in text or "STRONG" in text]


@kernels
@ragged_or_dense
def test_no_address_arithmetic_between_arrival_and_state_load(phase, block, ragged, step):
    path = step(phase, block.format(ragged=ragged)).after_last_poll()
    product = path[: barriers(path)[0]]
    assert not [text for text in product if "IMAD.WIDE" in text or re.search(r"\bLEA\.HI\.X\b", text)]


@kernels
def test_only_the_state_is_loaded_between_arrival_and_departure(phase, block, step):
    """Dense: no length, no reset mask, no x, no saved gate."""
    path = step(phase, block.format(ragged="false")).after_last_poll()
    assert not [text for text in path if "LDG" in text and ".128.STRONG.GPU" not in text]


@pytest.mark.slow
@kernels
def test_resets_are_prefetched(phase, block, step):
    """With lengths or resets the only other load is of the block's part of h, for a row without this step."""
    path = step(phase, block.format(ragged="true")).after_last_poll()
    other = [text for text in path if "LDG" in text and ".128.STRONG.GPU" not in text]
    assert len(other) == (1 if "ForwardFlags" in block else 0)
    assert not [text for text in other if "U8" in text or ".64 " in text.split("[")[0]]


@kernels
@ragged_or_dense
def test_critical_path_is_within_its_limit(phase, block, ragged, step):
    path = step(phase, block.format(ragged=ragged)).after_last_poll()
    first_load, cell, send = CEILINGS[phase, block]
    at = barriers(path)
    if first_load is None:
        assert at[0] <= cell + (RAGGED_EXTRA if ragged == "true" else 0)
    else:
        loads = [k for k, text in enumerate(path) if "LDG.E.128.STRONG" in text or "LDS.128" in text]
        assert loads[0] <= first_load
        assert at[1] - at[0] <= cell + (RAGGED_EXTRA if ragged == "true" else 0)
    assert len(path) - 1 - at[-1] <= send
