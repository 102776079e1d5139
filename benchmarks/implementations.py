"""The implementations that are measured (`IMPLEMENTATIONS`), when each is absent, and which cases it refuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastlstm
from benchmarks import baselines, xla
from benchmarks.cases import Case
from benchmarks.data import Inputs
from benchmarks.graphs import GraphProgram
from benchmarks.programs import Program, build_program
from benchmarks.results import BASELINES
from benchmarks.stepwise import StepwiseProgram
from fastlstm.backends import native
from fastlstm.dispatch import NAMES as BACKENDS


@dataclass(frozen=True)
class Implementation:
    """An implementation. `missing(device)` and `refuses(case)` return None if it can run, otherwise the reason."""

    build: Callable[[Case, Inputs], Program]
    missing: Callable[[str], str | None] = lambda device: None
    refuses: Callable[[Case], str | None] = lambda case: None
    ours: bool = False  # a wrong result of ours fails the run; a baseline's is reported
    default: bool = False  # measured if --impl is not given, unless it is missing


def torch_program(case: Case, inputs: Inputs) -> Program:
    """Build nn.LSTM, or nn.LSTMCell for cells. Ratios are to it, or to it in a CUDA graph, whichever is faster."""
    return build_program(case, inputs, nn.LSTM, nn.LSTMCell)


def _fastlstm(backend: str, default: bool = False) -> Implementation:
    def build(case: Case, inputs: Inputs) -> Program:
        return build_program(case, inputs, fastlstm.LSTM, fastlstm.LSTMCell, backend)

    return Implementation(build, ours=True, default=default)


def _stepwise(implementation: Implementation) -> Implementation:
    """The implementation without the persistent CUDA kernels."""

    def build(case: Case, inputs: Inputs) -> Program:
        return StepwiseProgram(implementation.build(case, inputs))

    def missing(device: str) -> str | None:
        if device != "cuda":
            return "persistent kernels require CUDA"
        return None if "cuda" in native.devices else f"fastlstm._C: {', '.join(native.devices) or native.load_error}"

    return Implementation(build, missing, implementation.refuses, implementation.ours)


def _in_graphs(implementation: Implementation, default: bool = True) -> Implementation:
    """The implementation captured in CUDA graphs."""

    def build(case: Case, inputs: Inputs) -> Program:
        return GraphProgram(implementation.build(case, inputs))

    def missing(device: str) -> str | None:
        return implementation.missing(device) if device == "cuda" else "CUDA graphs require CUDA"

    def refuses(case: Case) -> str | None:
        if case.kind == "packed":
            return "a packed batch is copied from the host, which a CUDA graph does not replay"
        return implementation.refuses(case)

    return Implementation(build, missing, refuses, implementation.ours, default)


def _needs(module: str) -> Callable[[str], str | None]:
    """Return the `missing` of a third-party package that requires CUDA."""

    def missing(device: str) -> str | None:
        if device != "cuda":
            return f"{module} requires CUDA"
        return None if importlib.util.find_spec(module) else f"{module} is not installed"

    return missing


IMPLEMENTATIONS: dict[str, Implementation] = {
    "nn": Implementation(torch_program, default=True),
    "nn_graph": _in_graphs(Implementation(torch_program)),
    "fastlstm": _fastlstm("auto", default=True),
    "fastlstm_graph": _in_graphs(_fastlstm("auto")),
    **{name: _fastlstm(name) for name in BACKENDS if name != "auto"},
    "steps": _stepwise(_fastlstm("native")),
    "steps_graph": _in_graphs(_stepwise(_fastlstm("native")), default=False),
    "compile": Implementation(baselines.compiled_loop, refuses=baselines.compiled_loop_refuses),
    "xla": Implementation(xla.XlaProgram, xla.missing, xla.refuses),
    "haste": Implementation(baselines.haste, _needs("haste_pytorch"), baselines.haste_refuses, default=True),
    "flashrnn": Implementation(baselines.flashrnn, _needs("flashrnn"), baselines.flashrnn_refuses, default=True),
}


def select(names: list[str], device: str) -> dict[str, Implementation]:
    """Return the implementations to run: baselines of the ratios, then those named, or the defaults that are present.

    Raises ValueError for an unknown name, with the known ones, and for an absent one, with the reason.
    """
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"--impl must be among {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}")
    for name in names:
        reason = IMPLEMENTATIONS[name].missing(device)
        if reason:
            raise ValueError(f"{name} cannot be measured: {reason}")
    selected = names or [
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if implementation.default and not implementation.missing(device)
    ]
    always = [name for name in BASELINES if not IMPLEMENTATIONS[name].missing(device)]
    return {name: IMPLEMENTATIONS[name] for name in dict.fromkeys([*always, *selected])}
