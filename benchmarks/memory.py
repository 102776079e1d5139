"""Peak memory of a training step, each implementation in a new process: `peak_rows`.

python -m benchmarks.memory IMPL DEVICE THREADS CASE is that process. It reports the peak resident memory during two
training steps minus that before them, after inputs and weights are allocated and libraries are warm; on CUDA, the same
difference in the caching allocator's allocated bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.data import make_inputs
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.machine import ROOT
from benchmarks.results import Row


def peak_mib(impl: str, case: Case, device: str = "cpu") -> float:
    """MiB that a training step of `case` needs beyond its inputs and weights, measured in a new process.

    Raises RuntimeError with the process's last line of output if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", impl, device, str(torch.get_num_threads())]
    command.append(json.dumps(asdict(case)))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{impl} on {case.name}: {last[0]}")
    return float(done.stdout)


def peak_rows(suite: str, case: Case, impls: list[str], device: str = "cpu") -> list[Row]:
    """One row per implementation; the ratio is nn.LSTM's peak / its peak, with a target of 1."""
    rows = []
    for impl in impls:
        row = Row(suite=suite, case=case.name, mode="memory", impl=impl, target=None if impl == "nn" else 1.0)
        row.T, row.B, row.I, row.H, row.L, row.D, row.P = case.T, case.B, case.I, case.H, case.L, case.D, case.P
        row.kind, row.rows, row.dtype = case.kind, case.rows, case.dtype
        try:
            row.peak_mib = peak_mib(impl, case, device)
        except RuntimeError as error:
            row.status = f"failed: {error}"
        rows.append(row)
    theirs = rows[0].peak_mib
    for row in rows:
        row.ratio = theirs / row.peak_mib if theirs and row.peak_mib else None
    return rows


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _cpu_peak(step: Callable[[], None]) -> int:
    """Peak resident bytes during `step()` minus those before it."""
    try:
        # Resets VmHWM, so that an earlier peak (imports, the warm-up) does not hide this one.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _cuda_peak(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _measure(impl: str, case: Case, device: str) -> int:
    """Peak bytes of two training steps, in this process."""

    def two_steps(of: Case) -> Callable[[], None]:
        program = IMPLEMENTATIONS[impl].build(of, make_inputs(of, device))

        def run() -> None:
            with program.mode("train") as step:
                step()
                step()

        return run

    two_steps(replace(case, T=min(case.T, 2)))()  # allocates thread pools, code pages and library workspaces
    steps = two_steps(case)
    return _cuda_peak(steps) if device == "cuda" else _cpu_peak(steps)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(_measure(sys.argv[1], Case(**json.loads(sys.argv[4])), sys.argv[2]) / 2**20)
