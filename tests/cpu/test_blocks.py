"""Layers with a tail block (H is not a multiple of the vector width) against the reference, for every packing."""

from dataclasses import replace

import pytest
import torch

from fastlstm.backends import native

from ..cases import Case
from ..runners import check
from .plans import assert_path

# With vectors of 2 to 16 units the last block has every width; gate_gap in csrc/cpu/pack_forward.h decides on it.
WIDTHS = [*range(1, 17), 20, 29]
# (T, B) and the path of both weights: unpacked, with one row and more; packed, with x W_ih^T hoisted, in small batches,
# and step by step; one step of one or more row blocks.
UNPACKED = {"w_ih": "unpacked", "w_hh": "unpacked"}
HOISTED = {"w_ih": "pack_on_use", "w_hh": "prepacked"}
ON_USE = {"w_ih": "pack_on_use", "w_hh": "pack_on_use", "hoisted_steps": 0}
SHAPES = {
    (4, 1): UNPACKED | {"hoisted_steps": 4},
    (2, 2): UNPACKED | {"hoisted_steps": 2},
    (1, 3): UNPACKED | {"hoisted_steps": 0},
    (1, 4): UNPACKED | {"hoisted_steps": 0},
    (3, 2): HOISTED | {"hoisted_steps": 3},
    (30, 1): HOISTED | {"hoisted_steps": 30},
    (20, 3): HOISTED | {"hoisted_steps": 20},
    (4, 70): {"w_ih": "prepacked", "w_hh": "prepacked", "hoisted_steps": 0},
    (1, 20): ON_USE,
    (1, 210): ON_USE,
}


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("T", "B"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_last_block_of_units(T, B, dtype, backend):
    for H in WIDTHS:
        case = Case(T=T, B=B, I=5, H=H, hx="tuple", dtype=dtype)
        assert_path(case, "forward", **SHAPES[T, B])
        check(case, "native")


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
def test_small_batch_of_a_large_weight(ragged, B, backend):
    """More than 512 KiB: unpacked up to 4 rows per step and 48 in total; x W_ih^T is hoisted."""
    kwargs = {"hx": "tuple", "dtype": torch.float64}
    for T, up_to in ((7, 4), (20, 2)):
        w_hh = "unpacked" if up_to >= B else "prepacked"
        assert_path(Case(T=T, B=B, I=5, H=131, **kwargs), "forward", w_hh=w_hh, w_ih="pack_on_use", hoisted_steps=T)
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
def test_weight_beyond_every_cache(backend):
    """More than 4 MiB: unpacked at every T; W_ih is packed above 192 rows."""
    for case, w_ih in (
        (Case(T=60, B=1, I=3, H=363, dtype=torch.float64), "pack_on_use"),
        (Case(T=100, B=2, I=3, H=513), "prepacked"),
    ):
        assert_path(case, "forward", w_hh="unpacked", w_ih=w_ih)
        check(case, "native")


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("B", [1, 3, 7, 13])
def test_weight_beyond_l2(B, backend):
    """4 MiB and more: block order alternates; backward packs from 9 rows."""
    lengths = tuple(11 - b if b < 10 else 0 for b in range(B))
    case = Case(T=11, B=B, I=5, H=363, hx="tuple", dtype=torch.float64)
    if native.extension.cpu_machine()["l2_bytes"] <= 4 << 20:
        assert_path(case, "forward", alternate_block_order=True)
        assert_path(case, "backward", alternate_block_order=True, pack_hh=True)
        assert_path(replace(case, T=6), "backward", pack_hh=(12 if B > 2 else 8) < 6 * B)
    check(case, "native")
    check(Case(T=11, B=B, I=5, H=368, bidirectional=True, lengths=lengths, dtype=torch.float64), "native")
    check(Case(T=11, B=B, I=5, H=500, proj=270, hx="tuple", dtype=torch.float64), "native")
    check(Case(T=6, B=B, I=5, H=363, hx="tuple", dtype=torch.float64), "native")


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 2), (3, 1), (2, 2), (1, 4), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projection_of_few_rows(T, B, dtype, backend):
    """Up to four rows in total read weight_hr unpacked, four vectors of its rows at a time."""
    for P in (1, 3, 15, 16, 17, 33, 64, 65, 100):
        case = Case(T=T, B=B, I=70, H=101, proj=P, hx="tuple", dtype=dtype)
        assert_path(case, "forward", w_hr="unpacked" if T * B <= 4 else "prepacked")
        check(case, "native")
