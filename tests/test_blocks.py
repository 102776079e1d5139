"""Layers whose H is no multiple of a vector of units agree with the reference, however their last block is packed."""

import pytest
import torch

from .cases import Case
from .runners import check

# With vectors of 2 to 16 units the last block has every width; gate_gap in csrc/cpu/forward.h decides on its layout.
WIDTHS = [*range(1, 17), 20, 29]
# T, B: read as stored; x W_ih^T ahead, of dot products or of tiles; step by step; one step of one or more row groups.
SHAPES = [(3, 2), (30, 1), (20, 3), (4, 70), (1, 20), (1, 210)]


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("T", "B"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_block_of_units(T, B, dtype, backend):
    for H in WIDTHS:
        check(Case(T=T, B=B, I=5, H=H, hx="tuple", dtype=dtype), "native")


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("B", [90, 150, 230])
def test_one_step_of_many_rows(B, backend):
    check(Case(T=1, B=B, I=70, H=130, hx="tuple"), "native")
    check(Case(T=1, B=B, I=70, H=130, hx="tuple", bidirectional=True), "native")
    check(Case(T=1, B=B, I=30, H=43, proj=11, hx="tuple"), "native")
    check(Case(T=1, B=B, I=30, H=43, proj=11, lengths=(1,) * (B - 2) + (0, 0)), "native")
