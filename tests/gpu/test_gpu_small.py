"""Small runs of every kernel, fast enough for compute-sanitizer (scripts/gpu_check.sh); run these first."""

from __future__ import annotations

import pytest

from ..cases import Case
from .gpu_support import BFLOAT16, DOUBLE, HALF, IEEE, TF32, backends, check, check_variant, gpu
from .variant_layers import VariantLayer

pytestmark = gpu

RAGGED = {"lengths": (4, 0, 5, 1, 3), "resets": ((0, 0), (2, 0), (1, 2), (4, 2), (4, 3))}
CASES = (
    Case(T=3, B=5, I=4, H=8, hx="tuple"),
    Case(T=3, B=5, I=3, H=7, hx="tuple", bidirectional=True),
    Case(T=3, B=5, I=4, H=8, hx="tuple", proj=4, bidirectional=True, cells=True),
    Case(T=5, B=5, I=4, H=8, hx="tuple", bidirectional=True, **RAGGED),
    Case(T=5, B=5, I=3, H=7, hx="tuple", bidirectional=True, proj=3, cells=True, **RAGGED),
    Case(T=1, B=1, I=1, H=1, bias=False),
    Case(T=2, B=130, I=5, H=33),  # more rows and units than one block has threads
)
VARIANTS = (
    VariantLayer(Case(T=3, B=5, I=4, H=8, hx="tuple", bidirectional=True), "sequence", "flags", "number"),
    VariantLayer(
        Case(T=5, B=5, I=3, H=7, hx="tuple", bidirectional=True, proj=3, **RAGGED), "steps", "numbers", "flags"
    ),
    VariantLayer(Case(T=5, B=5, I=3, H=40, hx="tuple", bidirectional=True, proj=3, **RAGGED), norm=True),
)


@backends
@pytest.mark.parametrize("precision", [IEEE, TF32, DOUBLE, HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small(case, precision, backend):
    check(case, precision, backend)


@backends
@pytest.mark.parametrize("precision", [IEEE, HALF], ids=str)
@pytest.mark.parametrize("layer", VARIANTS, ids=str)
def test_small_variants(layer, precision, backend):
    check_variant(layer, precision, backend)
