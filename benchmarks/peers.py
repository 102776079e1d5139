"""Who is measured: `PEERS`, each implementation with when it is absent and which cases it refuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastlstm
from benchmarks import rivals
from benchmarks.cases import Case
from benchmarks.data import Inputs
from benchmarks.graphs import GraphProgram
from benchmarks.programs import Program, build_program
from benchmarks.results import BASELINES
from benchmarks.stepwise import StepwiseProgram
from fastlstm.backends import native
from fastlstm.dispatch import NAMES as BACKENDS


@dataclass(frozen=True)
class Peer:
    """An implementation. `missing(device)` and `refuses(case)` answer None when all is well, else why not."""

    build: Callable[[Case, Inputs], Program]
    missing: Callable[[str], str | None] = lambda device: None
    refuses: Callable[[Case], str | None] = lambda case: None
    ours: bool = False  # a wrong result of ours fails the run; a rival's is reported
    default: bool = False  # measured when --impl names nobody, if it is there


def torch_program(case: Case, inputs: Inputs) -> Program:
    """nn.LSTM, or nn.LSTMCell for cells: the baseline of every ratio, or in a graph where that is faster."""
    return build_program(case, inputs, nn.LSTM, nn.LSTMCell)


def _fastlstm(backend: str, default: bool = False) -> Peer:
    def build(case: Case, inputs: Inputs) -> Program:
        return build_program(case, inputs, fastlstm.LSTM, fastlstm.LSTMCell, backend)

    return Peer(build, ours=True, default=default)


def _stepwise(peer: Peer) -> Peer:
    """The same without the persistent CUDA kernels."""

    def build(case: Case, inputs: Inputs) -> Program:
        return StepwiseProgram(peer.build(case, inputs))

    def missing(device: str) -> str | None:
        if device != "cuda":
            return "persistent kernels exist on CUDA alone"
        return None if "cuda" in native.devices else f"fastlstm._C: {', '.join(native.devices) or native.load_error}"

    return Peer(build, missing, peer.refuses, peer.ours)


def _in_graphs(peer: Peer, default: bool = True) -> Peer:
    """The same captured in CUDA graphs."""

    def build(case: Case, inputs: Inputs) -> Program:
        return GraphProgram(peer.build(case, inputs))

    def missing(device: str) -> str | None:
        return peer.missing(device) if device == "cuda" else "CUDA graphs exist on CUDA alone"

    def refuses(case: Case) -> str | None:
        if case.kind == "packed":
            return "a packed batch is copied from the host, which a CUDA graph does not replay"
        return peer.refuses(case)

    return Peer(build, missing, refuses, peer.ours, default)


def _needs(module: str) -> Callable[[str], str | None]:
    """A `missing` for a package that is not ours and runs on CUDA alone."""

    def missing(device: str) -> str | None:
        if device != "cuda":
            return f"{module} runs on CUDA alone"
        return None if importlib.util.find_spec(module) else f"{module} is not installed"

    return missing


PEERS: dict[str, Peer] = {
    "nn": Peer(torch_program, default=True),
    "nn_graph": _in_graphs(Peer(torch_program)),
    "fastlstm": _fastlstm("auto", default=True),
    "fastlstm_graph": _in_graphs(_fastlstm("auto")),
    **{name: _fastlstm(name) for name in BACKENDS if name != "auto"},
    "steps": _stepwise(_fastlstm("native")),
    "steps_graph": _in_graphs(_stepwise(_fastlstm("native")), default=False),
    "compile": Peer(rivals.compiled_loop, refuses=rivals.compiled_loop_refuses),
    "haste": Peer(rivals.haste, _needs("haste_pytorch"), rivals.haste_refuses, default=True),
    "flashrnn": Peer(rivals.flashrnn, _needs("flashrnn"), rivals.flashrnn_refuses, default=True),
}


def chosen(names: list[str], device: str) -> dict[str, Peer]:
    """The peers to run: those named (after the baselines: nn, and on CUDA nn_graph), or the defaults that are present.

    Raises ValueError for an unknown or absent name, with what there is or why it is absent.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"--impl must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    for name in names:
        why = PEERS[name].missing(device)
        if why:
            raise ValueError(f"{name} cannot be measured: {why}")
    wanted = names or [name for name, peer in PEERS.items() if peer.default and not peer.missing(device)]
    baselines = [name for name in BASELINES if not PEERS[name].missing(device)]
    return {name: PEERS[name] for name in dict.fromkeys([*baselines, *wanted])}
