"""fastlstm's CUDA layers by the step-wise kernels only, to compare with the planned ones: `StepwiseProgram`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from benchmarks.programs import Outputs, Program
from fastlstm.backends import native


class StepwiseProgram(Program):
    """Another program with the persistent kernels off while it runs."""

    def __init__(self, program: Program) -> None:
        self.program, self.leaves = program, program.leaves

    @contextmanager
    def mode(self, mode: str) -> Iterator[Callable[[], Outputs]]:
        """Enter the program's mode without the persistent kernels."""
        extension = native.extension
        assert extension is not None
        before, tier = extension.persistent_enabled(), extension.persistent_tier()
        extension.enable_persistent(False, "")
        try:
            with self.program.mode(mode) as run:
                yield run
        finally:
            extension.enable_persistent(before, tier)

    def named_results(self, mode: str, outputs: Outputs) -> dict[str, Tensor]:
        return self.program.named_results(mode, outputs)

    def chosen(self) -> tuple[str, str | None]:
        return self.program.chosen()
