"""python -m benchmarks.ab.worker TREE FD: runs fastlstm of TREE at the parent's command, over the socket FD.

The driver (this file and the modules of benchmarks it imports) is that of the working tree for both revisions; only
fastlstm comes from TREE. It uses LSTM and LSTMCell of it, and explain where there is one.
"""

from __future__ import annotations

import gc
import importlib
import pickle
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.load import wait_for_rest

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.cases import Case
    from benchmarks.measure import Measurement, Plan, Timer
    from benchmarks.programs import Program

COMMANDS = ("hello", "load", "results", "calibrate", "sample")


class Worker:
    """Holds one case at a time. Each method is a command."""

    def __init__(self) -> None:
        self.program: Program | None = None
        self.clock = "wall"

    def hello(self) -> str:
        """Where fastlstm was imported from."""
        return str(importlib.import_module("fastlstm").__file__)

    def load(self, case: Case, threads: int, clock: str) -> str:
        """Build the module and inputs of a case; return the backend that runs it, "" if this revision has no explain.

        clock: "wall", or "cpu" for CPU time.
        """
        import torch

        import fastlstm
        from benchmarks.data import make_inputs
        from benchmarks.programs import build_program

        torch.set_num_threads(threads)
        self.clock = clock
        self.program = None
        gc.enable()
        gc.collect()
        self.program = build_program(case, make_inputs(case), fastlstm.LSTM, fastlstm.LSTMCell)
        explain = getattr(fastlstm, "explain", None)
        return explain(*self.program.example()).backend if explain else ""

    def results(self, mode: str) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._loaded().results(mode).items()}

    def calibrate(self, mode: str, plan: Plan) -> int:
        """Warm up; return the number of calls a block needs to last plan.min_sample."""
        from benchmarks.measure import calibrate

        gc.collect()
        gc.disable()
        measurement = self._measurement(mode)
        # A process's first call starts threads and loads code; calibrate would count that as the length of a call.
        with measurement.enter() as run:
            run()
        return calibrate(measurement, self._timer(), plan)

    def sample(self, mode: str, calls: int) -> float:
        """Seconds per call of one block, by this process's own clock."""
        from benchmarks.measure import sample

        measurement = self._measurement(mode)
        measurement.calls = calls
        return sample(measurement, self._timer())

    def _loaded(self) -> Program:
        if self.program is None:
            raise RuntimeError("no case is loaded")
        return self.program

    def _timer(self) -> Timer:
        from benchmarks.measure import cpu_time_timer, wall_timer

        return cpu_time_timer if self.clock == "cpu" else wall_timer

    def _measurement(self, mode: str) -> Measurement:
        from benchmarks.measure import Measurement

        program = self._loaded()
        return Measurement(lambda: program.mode(mode))


def serve(connection: Connection) -> None:
    """Answer commands (name, arguments) with ("ok", value, seconds to rest) or ("error", message, seconds)."""
    worker = Worker()
    while True:
        try:
            name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            if name not in COMMANDS:
                raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}")
            value = getattr(worker, name)(*arguments)
            rest = wait_for_rest()  # the other worker's block comes next
            answer = "ok", value
        except Exception as error:
            # The parent reports it with the case; this process remains usable.
            lines = str(error).splitlines()
            answer, rest = ("error", f"{type(error).__name__}: {lines[0] if lines else ''}"), 0.0
        connection.send_bytes(pickle.dumps((*answer, rest)))


if __name__ == "__main__":
    # benchmarks is imported already, from the working tree; fastlstm comes from the tree put first.
    sys.path.insert(0, str(Path(sys.argv[1])))
    warnings.simplefilter("ignore")
    serve(Connection(int(sys.argv[2])))
