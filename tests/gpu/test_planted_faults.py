"""The host simulation rejects data flags without a fence, a clear or a slot of their protocol.

Each fault replaces text of a copy of csrc/, which is compiled without ThreadSanitizer: it must show in the numbers, or
as a CTA that waits forever.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .test_cuda_host import ROOT, cuda_headers, unavailable_reason

# A dozen programs are compiled, and what a fault does depends on the order of threads.
pytestmark = [pytest.mark.toolchain, pytest.mark.slow]

FORWARD, BACKWARD = "cuda/persistent_forward.h", "cuda/persistent_backward.h"
GROUP, PLAN = "cuda/group_data_flag.h", "cuda/plan.h"
FORWARD_FENCE = (FORWARD, "if (!last) group.fence(warp);", "")
BACKWARD_FENCE = (BACKWARD, "if (sends) group.fence(warp);", "")
SEND = "group.store(warp, words, sent);\n    group.clear(warp, words);"
FENCE_BEFORE_CLEAR = "group.store(warp, words, sent);\n    group.fence(warp);\n    group.clear(warp, words);"
STORE_ONLY = "group.store(warp, words, sent);"
INITIAL_FENCE = (FORWARD, "group.clear(warp, words);\n      group.fence(warp);", "group.clear(warp, words);")
# By name: replacements (file, text, new text), and when stores become visible (simulation.cpp).
FAULTS = {
    "none, clears held": ((), "clears"),
    "none, all held": ((), "all"),
    "forward without a fence": ((FORWARD_FENCE,), "clears"),
    "forward without a fence, all held": ((FORWARD_FENCE,), "all"),
    "initial state without a fence": ((INITIAL_FENCE,), "all"),
    "forward with the fence before the clear": ((FORWARD_FENCE, (FORWARD, SEND, FENCE_BEFORE_CLEAR)), "clears"),
    "forward without a clear": (((FORWARD, SEND, STORE_ONLY),), "clears"),
    "backward without a fence": ((BACKWARD_FENCE,), "clears"),
    "backward with the fence before the clear": ((BACKWARD_FENCE, (BACKWARD, SEND, FENCE_BEFORE_CLEAR)), "clears"),
    "backward without a clear": (((BACKWARD, SEND, STORE_ONLY),), "clears"),
    "three slots": (
        (
            (PLAN, "kDataFlagSlots = 4", "kDataFlagSlots = 3"),
            (GROUP, "(epoch_ + 1) % kDataFlagSlots < kDataFlagSlots / 2 ? 2 : -2", "(epoch_ + 1) % 3 == 0 ? 2 : -1"),
        ),
        "clears",
    ),
    "cleared a state too early": (
        ((GROUP, "(epoch_ + 1) % kDataFlagSlots < kDataFlagSlots / 2 ? 2 : -2", "(epoch_ + 1) % 4 == 0 ? 3 : -1"),),
        "clears",
    ),
}


@pytest.mark.parametrize(("replacements", "held"), FAULTS.values(), ids=FAULTS)
def test_simulation_fails_only_with_a_fault(replacements, held, tmp_path):
    if reason := unavailable_reason():
        pytest.skip(reason)
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    for file, text, replacement in replacements:
        path: Path = sources / file
        source = path.read_text()
        assert source.count(text) == 1, text
        path.write_text(source.replace(text, replacement))
    host, program = ROOT / "tests" / "gpu" / "cuda_host", tmp_path / "simulation"
    command = ["g++", "-std=c++20", "-O1", "-Wno-unknown-pragmas", "-DFASTLSTM_PLANTED_FAULT", f"-I{host}"]
    command += [
        f"-I{sources}",
        f"-isystem{cuda_headers()}",
        str(host / "simulation.cpp"),
        "-pthread",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    ran = subprocess.run([str(program), "12000", "6", "100", held], capture_output=True, text=True, timeout=300)
    # 1: other numbers than the step-wise kernels'; 3: a poll without end.
    assert ran.returncode in ((1, 3) if replacements else (0,)), ran.stderr[-4000:]
