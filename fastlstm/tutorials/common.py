"""What the tutorials share: the two implementations, the shape of a tutorial, and the comparisons between the two.

A tutorial is data plus a model plus a training loop. The loop is a generator that yields one loss per update, so that
the same loop can be run to the end, cut after 50 updates for a comparison, or timed in blocks.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

TRAJECTORY_UPDATES = 50
TRAJECTORY_BAR = 1e-6  # relative, float64

History = defaultdict[str, list]  # what a training loop notes for its plots, e.g. "validation" -> one loss per epoch


@dataclass(frozen=True)
class Implementation:
    """The names a tutorial builds its model from; nothing else differs between the two runs."""

    name: str  # "torch" or "fastlstm"
    LSTM: Callable[..., nn.RNNBase]
    LSTMCell: Callable[..., nn.RNNCellBase]


def implementation(name: str) -> Implementation:
    """`torch` -> torch.nn's classes, `fastlstm` -> this package's."""
    modules = {"torch": "torch.nn", "fastlstm": "fastlstm"}
    if name not in modules:
        raise ValueError(f"impl must be one of {sorted(modules)}, got {name!r}")
    module = importlib.import_module(modules[name])
    return Implementation(name, module.LSTM, module.LSTMCell)


def backend(device: torch.device | str) -> str:
    """The fastlstm backend that runs a small float32 LSTM on `device`: the times mean little without it."""
    import fastlstm

    return fastlstm.explain(fastlstm.LSTM(1, 16, device=device), torch.zeros(10, 1, 1, device=device)).backend


@dataclass(frozen=True)
class Check:
    """A figure a trained model reached, and the bar it is held against."""

    what: str
    value: float
    bar: float
    below: bool = True  # the value has to lie below the bar; above it when False

    @property
    def passed(self) -> bool:
        # NaN compares false either way, so a diverged run fails.
        return self.value < self.bar if self.below else self.value > self.bar

    def __str__(self) -> str:
        return f"{self.what} {self.value:.4g} ({'<' if self.below else '>'} {self.bar:.3g})"


class Tutorial(ABC):
    """One exercise: its data (made in __init__, in `dtype` on `device`), model, training loop, bar and plots."""

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages of the `tutorials` extra beyond matplotlib and rich
    train_dtype: ClassVar[torch.dtype] = torch.float32
    timing_block: ClassVar[int] = 20  # updates between two readings of the clock
    updates: int  # upper bound on the number of losses that `train` yields

    def __init__(
        self,
        quick: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.quick = quick
        self.device = torch.device(device)
        if dtype is None:
            dtype = torch.float32 if self.device.type == "mps" else self.train_dtype  # MPS has no float64
        self.dtype = dtype
        self.seed = seed

    @abstractmethod
    def make_model(self, impl: Implementation) -> nn.Module:
        """The untrained model, in PyTorch's default dtype on the CPU."""

    @abstractmethod
    def train(self, model: nn.Module, history: History | None = None) -> Iterator[float]:
        """Trains `model` in place and yields the loss of every update; evaluates on the way if `history` is given."""

    @abstractmethod
    def checks(self, model: nn.Module, history: History) -> list[Check]:
        """The figures that a trained model is judged by."""

    @abstractmethod
    def plot(self, model: nn.Module, history: History, folder: Path) -> list[Path]:
        """Draws the result as PNG files in `folder` and returns their paths."""

    def notes(self, model: nn.Module, impl: Implementation) -> list[str]:
        """Further results worth a line each."""
        return []

    def build(
        self,
        impl: Implementation,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> nn.Module:
        """The untrained model; one seed gives the same weights for both implementations, any dtype and any device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            model = self.make_model(impl)
        return model.to(device=device or self.device, dtype=dtype or self.dtype)

    def generator(self) -> torch.Generator:
        """A fresh CPU generator for data and shuffling, so that both implementations see the same batches."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Trajectory:
    """The losses of both implementations over the same updates, from the same weights and data, in float64."""

    torch: list[float]
    fastlstm: list[float]

    @property
    def differences(self) -> list[float]:
        """Relative difference at every update."""
        return [abs(ours - theirs) / abs(theirs) for theirs, ours in zip(self.torch, self.fastlstm, strict=True)]

    def check(self) -> Check:
        largest = torch.tensor(self.differences, dtype=torch.float64).max().item()  # unlike max(), keeps a NaN
        return Check("largest relative difference", largest, TRAJECTORY_BAR)


def compare_trajectories(
    tutorial: type[Tutorial],
    quick: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    updates: int = TRAJECTORY_UPDATES,
) -> Trajectory:
    """The first `updates` losses of `tutorial` under both implementations in float64."""
    if torch.device(device).type == "mps":
        device = "cpu"  # MPS has no float64
    task = tutorial(quick, torch.float64, device, seed)
    losses = {}
    for name in ("torch", "fastlstm"):
        model = task.build(implementation(name))
        losses[name] = list(islice(task.train(model), updates))
    return Trajectory(**losses)


@dataclass(frozen=True)
class Timing:
    """Seconds per update of both implementations, one entry per block of equal work."""

    torch: list[float]
    fastlstm: list[float]
    updates: int  # that each implementation ran on the clock

    @property
    def ratio(self) -> float:
        """Time of nn.LSTM over time of fastlstm: the median over pairs of neighbouring blocks.

        A machine busy with other work slows both of a pair, so this moves less than the times do.
        """
        return statistics.median(theirs / ours for theirs, ours in zip(self.torch, self.fastlstm, strict=True))


def time_both(task: Tutorial, blocks: int = 5, limit: float = 60.0) -> Timing:
    """Trains both implementations in turn, `task.timing_block` updates at a time; a first block each is not counted.

    Up to `blocks` blocks each, and no further pair of them once `limit` seconds have gone by.
    """

    def endless(name: str) -> Iterator[float]:
        while True:  # a task that ends before the clock does starts over
            yield from task.train(task.build(implementation(name)))

    runs = {name: endless(name) for name in ("torch", "fastlstm")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for block in range(blocks + 1):
        if block > 1 and time.perf_counter() - began > limit:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in islice(run, task.timing_block):  # every loss is read back, so a GPU has finished here
                pass
            if block:
                seconds[name].append((time.perf_counter() - start) / task.timing_block)
    return Timing(**seconds, updates=len(seconds["torch"]) * task.timing_block)


def missing_packages(tutorials: Sequence[type[Tutorial]]) -> list[str]:
    """The packages of the `tutorials` extra that these tutorials use and that are not installed."""
    wanted = dict.fromkeys(["matplotlib", "rich", *(name for tutorial in tutorials for name in tutorial.needs)])
    return [name for name in wanted if importlib.util.find_spec(name) is None]
