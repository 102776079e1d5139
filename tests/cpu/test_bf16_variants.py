"""Recurrent dropout and zoneout on the kernels of bfloat16 products: float32 layers with torch's flag.

bfloat16 layers run on the same kernels in tests/ops/test_variants.py; tests/cpu/cpu_host/bf16_kernels.cpp compares
those of AMX and AVX512_BF16 with masks.
"""

from __future__ import annotations

import pytest
import torch

from fastlstm import backends
from fastlstm.dispatch import describe

from ..cases import Case
from ..runners import require
from ..variants import Variant, check
from .test_bf16_products import FACTORS, flags, run_on_avx512_bf16

# 32 units, 16 features of h and 32 rows at least. Around blocks of 16 and 32 units, and tiles of 16 rows; chunks of
# 1024 rows, and blocks of 128 rows.
RAGGED = {"lengths": (9, 3, 7, 0, 1, 9, 8, 9), "resets": ((2, 0), (3, 1), (6, 2), (0, 3))}
VARIANTS = {
    "recurrent mask": Variant(T=8, B=17, I=9, H=47, mask="sequence"),
    "recurrent mask of each step": Variant(T=9, B=8, I=5, H=33, D=2, mask="steps", **RAGGED),
    "zoneout": Variant(T=8, B=17, I=33, H=64, zoneout="hc"),
    "zoneout of h": Variant(T=5, B=33, I=7, H=40, zoneout="h", states=False),
    "zoneout of c by numbers": Variant(T=5, B=9, I=7, H=97, zoneout="c", share="numbers", D=2),
    "zoneout in evaluation": Variant(T=5, B=9, I=7, H=65, zoneout="hc", share="constant"),
    "zoneout, ragged": Variant(T=9, B=8, I=5, H=33, D=2, zoneout="hc", **RAGGED),
    "projection": Variant(T=6, B=20, I=12, H=72, P=40, D=2, mask="steps", zoneout="hc"),
    "projection, ragged": Variant(T=9, B=8, I=5, H=67, P=34, D=2, mask="steps", zoneout="hc", **RAGGED),
    "chunks and row blocks": Variant(T=20, B=256, I=5, H=33, D=2, mask="steps", zoneout="hc"),
    "chunks and row blocks, projection": Variant(T=20, B=256, I=5, H=40, P=20, mask="sequence", zoneout="hc"),
    "units split by threads": Variant(T=40, B=12, I=128, H=256, mask="sequence", zoneout="hc"),
}


@pytest.fixture(autouse=True)
def native():
    require("native", Case())


def engines_of(variant: Variant) -> set[str]:
    inputs = variant.inputs()
    call = describe(inputs.x, inputs.weights)
    plan = backends.native.cpu_plan(call, variant.T, variant.B, lengths=variant.lengths)
    return {plan[phase]["engine"] for phase in ("forward", "backward")}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients(name, threads, poisoned_empty):
    """On the best kernels of this CPU, if they multiply bfloat16."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with flags():
            if engines_of(VARIANTS[name]) != {"bf16_products"}:
                pytest.skip("this CPU has no faster kernels")
            check(VARIANTS[name], "native", FACTORS)
    finally:
        torch.set_num_threads(before)


def test_values_and_gradients_on_avx512_bf16():
    run_on_avx512_bf16("""
from tests.cpu.test_bf16_variants import FACTORS, VARIANTS, check, engines_of
rnn.fp32_precision = "bf16"
for variant in VARIANTS.values():
    assert engines_of(variant) == {"bf16_products"}, variant
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(variant, "native", FACTORS)
""")
