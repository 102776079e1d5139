"""The parent's side of a worker: `WorkerProcess`, and `workers`, one for each revision."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.ab.trees import Tree
from benchmarks.machine import ROOT

SIDES = ("old", "new")
DEATH_S = 2.0  # to wait for the exit status of a worker that no longer answers


class WorkerError(Exception):
    """A command failed in a worker, or the worker died. The message begins with the side, old or new."""


class WorkerProcess:
    """A process that imports fastlstm from a tree. `start` sends a command, `finish` waits for its answer."""

    def __init__(self, side: str, tree: Tree) -> None:
        self.side, self.tree = side, tree
        self.rest_s: list[float] = []  # seconds until the worker was at rest, one entry per command
        parent, child = multiprocessing.Pipe()
        self._connection: Connection = parent
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        with child:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ab.worker", str(tree.path), str(child.fileno())],
                cwd=ROOT,  # -m takes benchmarks, the driver, from here
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[child.fileno()],
            )
        self.start("hello")

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.kill()  # it has no state to save, and a normal exit of torch takes long
        self._process.wait()
        self._stderr.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_import(self) -> None:
        """Finish "hello". Raises WorkerError if fastlstm does not come from the tree."""
        file = Path(self.finish())
        if not file.resolve().is_relative_to(self.tree.path.resolve()):
            raise WorkerError(f"{self.side}: fastlstm was imported from elsewhere than {self.tree.commit}'s tree")

    def start(self, command: str, *arguments: object) -> None:
        try:
            self._connection.send_bytes(pickle.dumps((command, arguments)))
        except OSError as error:
            raise self._death() from error

    def finish(self) -> Any:
        """The answer to the last `start`. Raises WorkerError."""
        try:
            status, value, rest = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        if status != "ok":
            raise WorkerError(f"{self.side}: {value}")
        self.rest_s.append(rest)
        return value

    def run(self, command: str, *arguments: object) -> Any:
        self.start(command, *arguments)
        return self.finish()

    def _death(self) -> WorkerError:
        try:
            status = f"exit status {self._process.wait(DEATH_S)}"
        except subprocess.TimeoutExpired:
            status = "no answer"
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        return WorkerError(": ".join([self.side, f"the worker of {self.tree.commit} died ({status})", *last]))


@contextmanager
def workers(trees: dict[str, Tree]) -> Iterator[dict[str, WorkerProcess]]:
    """New processes, one per side, that have imported torch and fastlstm."""
    with ExitStack() as stack:
        started = {side: stack.enter_context(WorkerProcess(side, tree)) for side, tree in trees.items()}
        for worker in started.values():
            worker.check_import()
        yield started
