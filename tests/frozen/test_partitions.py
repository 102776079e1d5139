"""Frozen layers on several threads: results are right however a layer is divided, and the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastlstm.backends import native

from ..cases import Case
from ..cpu.test_threads import GRIDS, RAGGED, divided
from .forms import FORMS, NO_EXTENSION, check_frozen, in_form, run_frozen

pytestmark = pytest.mark.skipif(**NO_EXTENSION)


@contextmanager
def partition(members: int, row_groups: int, split: str, concurrent: bool, directions: int) -> Iterator[None]:
    """Divide every layer in this way: threads per direction, row groups, split, concurrent directions."""
    before = torch.get_num_threads()
    torch.set_num_threads(members * (directions if concurrent else 1))
    native.extension.force_cpu_partition(members, row_groups, split, concurrent)
    try:
        yield
    finally:
        native.extension.force_cpu_partition(0)
        torch.set_num_threads(before)


# Case, threads per direction, row groups, split, concurrent directions.
PARTITIONS = [
    *((case, members, groups, "grid", concurrent) for case, members, groups, concurrent in GRIDS),
    *(
        (divided(members, directions, kind), members, 1, split, directions == 2)
        for members, directions in ((2, 1), (3, 1), (2, 2), (3, 2), (7, 1))
        for split in ("rows", "units")
        for kind in ("ragged", "projection")
    ),
    (
        Case(T=9, B=3, I=20, H=70, bidirectional=True, hx="tuple", **{**RAGGED, "lengths": (9, 7, 0)}),
        1,
        1,
        "none",
        True,
    ),
    (Case(T=9, B=5, I=20, H=130, bidirectional=True, proj=70, resets=((3, 1), (8, 0))), 2, 1, "units", False),
    (Case(T=40, B=1, I=20, H=259, hx="tuple"), 4, 1, "units", False),
    (Case(T=40, B=1, I=20, H=259, proj=140, hx="tuple"), 4, 1, "units", False),
    (Case(T=20, B=130, I=20, H=33, hx="tuple", resets=((3, 1), (8, 129))), 3, 1, "rows", False),
]


# Of the other forms, whose engines tests/cpu/test_threads.py divides.
FEW = [p for p in PARTITIONS if p[0].T < 9 and p[1] in (2, 8)]


@pytest.mark.parametrize("form", FORMS)
def test_forced_partitions(form):
    for case, members, groups, split, concurrent in PARTITIONS if form == "int8" else FEW:
        case = in_form(replace(case, cells=form == "int8"), form)
        what = f"{split} of {members} threads, {groups} groups, concurrent={concurrent}"
        with partition(members, groups, split, concurrent, case.directions):
            results, again = run_frozen(case, form), run_frozen(case, form)
        for name, value in results.items():
            assert torch.equal(value, again[name]), f"{form}, {what}, {case}: {name} differs from run to run"
        try:
            check_frozen(case, form, results)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


@pytest.mark.parametrize("form", FORMS)
def test_chosen_partitions(form):
    """What the plan chooses."""
    before = torch.get_num_threads()
    for threads in (2, 8):
        for B in (1, 40):
            for options in ({}, {"bidirectional": True, "proj": 40}):
                case = in_form(Case(T=9, B=B, I=70, H=200, hx="tuple", cells=form == "int8", **options), form)
                torch.set_num_threads(threads)
                try:
                    results = run_frozen(case, form)
                finally:
                    torch.set_num_threads(before)
                check_frozen(case, form, results)
