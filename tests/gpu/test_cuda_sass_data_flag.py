"""SASS of the grid variant with data flags: no fence between the arrival of a state and the sending of the next."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .sass import barriers, cuobjdump, disassemble, shortest_loop
from .test_cuda_sass import PROGRAM, ROOT

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump (it comes with the triton wheel)"),
]
# bfloat16 on sm_90a, dense, 32 units per CTA: the kernel, the max number of instructions from the barrier after the
# GEMM to the first store of the next state (nvcc 13.0: 88 and 71), and the stores of a step: a word per gate that is
# sent, and as many clears.
KERNELS = {
    "forward": ("ForwardDataFlag<T, 32, 2, false>", 100, 2),
    "backward": ("BackwardDataFlag<T, 32, 8, false>", 82, 8),
}


def loads_state(text: str) -> bool:
    return "LDG.E.128.STRONG.GPU" in text


def stores_state(text: str) -> bool:
    return "STG.E.STRONG.GPU" in text


def fences(text: str) -> bool:
    return "MEMBAR" in text


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Phase, the kernel's code, its time loop, which loads a state, multiplies it, stores the next one and fences."""
    block, *_ = KERNELS[request.param]
    folder: Path = tmp_path_factory.mktemp("sass")
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(PROGRAM.format(phase=request.param, block=block, args=request.param.capitalize()))
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
    instructions = disassemble(cubin)
    # After the last EXIT there are only the slow paths of WARPSYNC, which branch back.
    end = max(k for k, (_, text) in enumerate(instructions) if "EXIT" in text)
    multiplies = lambda text: "HMMA" in text  # noqa: E731
    loop = shortest_loop(instructions[:end], loads_state, multiplies, stores_state, fences)
    return request.param, [text for _, text in instructions[:end]], loop


@pytest.fixture(scope="module")
def step(kernel: tuple) -> list[str]:
    return kernel[2]


def sending(code: list[str]) -> int:
    """The first store of the next state: before the barrier after the GEMM only the traps of the polls store."""
    return next(k for k in range(barriers(code)[0], len(code)) if stores_state(code[k]))


def fence_of(code: list[str]) -> int:
    return next(k for k, text in enumerate(code) if fences(text))


def test_the_only_fence_of_a_step_is_after_the_sending(step):
    assert not any(map(fences, step[: sending(step)]))
    assert sum(map(fences, step)) == 1
    assert fence_of(step) > barriers(step)[1]


def test_the_fence_is_after_the_words_and_the_clears(kernel):
    """The stores between the sending and the fence are the words and as many clears; none is after the fence."""
    phase, _, step = kernel
    stores = [k for k in range(sending(step), len(step)) if stores_state(step[k])]
    assert len(stores) == KERNELS[phase][2]
    assert stores[-1] < fence_of(step)


def test_forward_has_a_fence_before_its_loop(kernel):
    """After the first state, which the loop only receives. Backward sends its first state in the loop."""
    phase, code, step = kernel
    start = next(k for k in range(len(code)) if code[k : k + len(step)] == step)
    stores = [k for k in range(start) if stores_state(code[k])]
    fences_before = [k for k in range(start) if fences(code[k])]
    if phase == "forward":
        assert stores
        assert len(fences_before) == 1
        assert max(stores) < fences_before[0]


def test_one_barrier_between_arrival_and_sending(step):
    """The one between the GEMM and its sums; the step's other barrier is after the sending, and protects the sums."""
    assert len(barriers(step)) == 2
    assert barriers(step)[0] < sending(step) < barriers(step)[1]


def test_critical_path_is_within_its_limit(kernel):
    phase, _, step = kernel
    assert sending(step) - barriers(step)[0] <= KERNELS[phase][1]
