"""A program captured in CUDA graphs, so that a host that launches slowly does not decide a comparison: `GraphProgram`.

A replay is one launch, whatever is inside. What a user pays without a graph is measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.programs import Outputs, Program

WARM_UP = 3  # calls before a capture: cuDNN, cuBLAS and Triton choose and allocate in the first ones


@dataclass(frozen=True)
class Graph:
    """A captured call. `replay` runs it on the memory it was captured with and returns `outputs`, always the same."""

    replay: Callable[[], Outputs]
    outputs: Outputs


def capture(run: Callable[[], Outputs]) -> Graph:
    """`run` in a CUDA graph; a capture executes nothing, so outputs and gradients hold no numbers before a replay.

    The outputs are detached: the nodes of their autograd graph would hold on to the streams of the capture.
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
        """As the program's; the function to run replays."""
        with self.program.mode(mode) as run:
            if mode not in self.graphs:
                self.graphs[mode] = capture(run)
            yield self.graphs[mode].replay

    def results(self, mode: str) -> dict[str, torch.Tensor]:
        """One replay's, over NaN: what the graph does not compute is wrong, and no leftover of the capture is right."""
        with self.mode(mode) as replay, torch.no_grad():
            gradients = [leaf.grad for leaf in self.program.leaves if leaf.grad is not None]
            for written in (*self.graphs[mode].outputs, *(gradients if mode == "train" else ())):
                written.fill_(float("nan"))
            return self.program.named_results(mode, replay())

    def chosen(self) -> tuple[str, str | None]:
        return self.program.chosen()
