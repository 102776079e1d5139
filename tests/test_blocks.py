"""Layers whose H is no multiple of a vector of units agree with the reference, however their last block is packed."""

import pytest
import torch

from .cases import Case
from .runners import check

# With vectors of 2 to 16 units the last block has every width; gate_gap in csrc/cpu/pack_forward.h decides on it.
WIDTHS = [*range(1, 17), 20, 29]
# T, B: read as stored, a row at a time and more; x W_ih^T ahead, of few rows; step by step; one step of one or more
# row groups.
SHAPES = [(4, 1), (2, 2), (1, 3), (1, 4), (3, 2), (30, 1), (20, 3), (4, 70), (1, 20), (1, 210)]


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


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("B", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_few_rows_of_a_large_weight(ragged, B, backend):
    """More than 512 KiB, read as stored up to 4 rows a step and 48 in all; x W_ih^T is made ahead."""
    kwargs = {"hx": "tuple", "dtype": torch.float64}
    if ragged:
        kwargs |= {
            "lengths": tuple(7 - 2 * b if b < 4 else 0 for b in range(B)),
            "resets": ((1, 0), (4, 0), (2, B - 1)),
        }
    check(Case(T=7, B=B, I=5, H=131, **kwargs), "native")
    check(Case(T=7, B=B, I=5, H=137, bidirectional=True, **kwargs), "native")
    check(Case(T=7, B=B, I=5, H=200, proj=90, **kwargs), "native")
    check(Case(T=20, B=B, I=5, H=131, **kwargs), "native")  # beyond 48 rows from B = 3 on


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_weight_beyond_every_cache(backend):
    """More than 4 MiB, read as stored however many the steps; beside a W_ih that is packed, beyond 192 rows."""
    check(Case(T=60, B=1, I=3, H=363, dtype=torch.float64), "native")
    check(Case(T=100, B=2, I=3, H=513), "native")


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("B", [1, 3, 7, 13])
def test_a_weight_beyond_an_l2(B, backend):
    """4 MiB and more, which every second step reads from its end; packed by backward from 9 rows on."""
    lengths = tuple(11 - b if b < 10 else 0 for b in range(B))
    check(Case(T=11, B=B, I=5, H=363, hx="tuple", dtype=torch.float64), "native")
    check(Case(T=11, B=B, I=5, H=368, bidirectional=True, lengths=lengths, dtype=torch.float64), "native")
    check(Case(T=11, B=B, I=5, H=500, proj=270, hx="tuple", dtype=torch.float64), "native")
    check(Case(T=6, B=B, I=5, H=363, hx="tuple", dtype=torch.float64), "native")


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 2), (3, 1), (2, 2), (1, 4), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_of_few_rows(T, B, dtype, backend):
    """Up to four rows in all read weight_hr as stored, four vectors of its rows at a time."""
    for P in (1, 3, 15, 16, 17, 33, 64, 65, 100):
        check(Case(T=T, B=B, I=70, H=101, proj=P, hx="tuple", dtype=dtype), "native")
