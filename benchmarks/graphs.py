"""A program captured in CUDA graphs, so that the host's launch overhead does not decide a comparison: `GraphProgram`.

A replay is one launch. Times without a graph, which users without one get, are measured next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.programs import Outputs, Program

WARM_UP = 3  # calls before a capture: cuDNN, cuBLAS and Triton select algorithms and allocate in the first ones


@dataclass(frozen=True)
class Graph:
    """A captured call. `replay` runs it on the memory of the capture and returns `outputs`, always the same tensors."""

    replay: Callable[[], Outputs]
    outputs: Outputs


def capture(run: Callable[[], Outputs]) -> Graph:
    """Capture `run` in a CUDA graph. A capture executes nothing: outputs and gradients are undefined before a replay.

    The outputs are detached, because nodes of their autograd graph would keep the streams of the capture alive.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, h_n, c_n = (t.detach() for t in run())
    outputs = output, h_n, c_n

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return Graph(replay, outputs)


class GraphProgram(Program):
    """Another program with each of its modes captured when first entered."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graphs: dict[str, Graph] = {}

    @contextmanager
    def mode(self, mode: str) -> Iterator[Callable[[], Outputs]]:
        """Enter the program's mode; the function it yields replays the graph."""
        with self.program.mode(mode) as run:
            if mode not in self.graphs:
                self.graphs[mode] = capture(run)
            yield self.graphs[mode].replay

    def results(self, mode: str) -> dict[str, torch.Tensor]:
        """Fill outputs and gradients with NaN, then replay, so that whatever the graph does not compute is wrong."""
        with self.mode(mode) as replay, torch.no_grad():
            gradients = [leaf.grad for leaf in self.program.leaves if leaf.grad is not None]
            for written in (*self.graphs[mode].outputs, *(gradients if mode == "train" else ())):
                written.fill_(float("nan"))
            return self.program.named_results(mode, replay())

    def chosen(self) -> tuple[str, str | None]:
        return self.program.chosen()
