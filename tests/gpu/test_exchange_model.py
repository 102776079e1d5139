"""The exchange whose data are their own flag, by exhaustive exploration of a model (tests/gpu/exchange_model.py).

Four rounds fill the four slots; the fifth and sixth use two of them again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .exchange_model import Protocol, Violation, explore

pytestmark = pytest.mark.toolchain

SIZES = {"2 CTAs": {"ctas": 2, "rounds": 8}, "2 words": {"ctas": 2, "words": 2}, "3 CTAs": {"ctas": 3, "rounds": 5}}


def test_model_has_the_kernels_slots_and_distance():
    """kDataFlagSlots, and the distance of clear(), in slots from the one stored: 2, or -2 in the last slots."""
    cuda = Path(__file__).parents[2] / "csrc" / "cuda"
    slots = re.search(r"constexpr int kDataFlagSlots = (\d+);", (cuda / "plan.h").read_text())
    text = (cuda / "group_data_flag.h").read_text()
    clear = re.search(r"% kDataFlagSlots < kDataFlagSlots / 2 \? (\d+) : -(\d+)\)", text)
    assert slots is not None
    assert clear is not None
    protocol = Protocol(ctas=2)
    assert int(slots[1]) == protocol.slots
    assert int(clear[1]) == protocol.clear_ahead
    assert protocol.slots - int(clear[2]) == protocol.clear_ahead


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_four_slots_with_a_fence_are_sound(size):
    assert explore(Protocol(**size)) > 1000


@pytest.mark.parametrize("size", ["2 CTAs", "2 words"])
def test_a_missing_fence_is_found(size):
    with pytest.raises(Violation, match="took a word of state"):
        explore(Protocol(**SIZES[size], fence=False))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_loads_that_the_fence_does_not_order_are_found(size):
    """So a thread that polls executes the fence even if it stores nothing."""
    with pytest.raises(Violation, match="took word"):
        explore(Protocol(**size, early_loads=True))


@pytest.mark.parametrize(
    ("slots", "clear_ahead", "violation"),
    [
        (2, 1, "deadlock|took a word of state"),
        (3, 1, "took a word of state"),  # the slot of the next state may be polled before it is cleared
        (3, 2, "deadlock"),  # that is the previous state's slot, which others may still read
        (4, 1, "took a word of state"),
        (4, 3, "deadlock"),
    ],
)
def test_fewer_slots_and_other_distances_are_unsound(slots, clear_ahead, violation):
    with pytest.raises(Violation, match=violation):
        explore(Protocol(ctas=2, slots=slots, clear_ahead=clear_ahead))
