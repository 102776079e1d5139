"""The machine: its description (`describe`), and its peak rates (`Peak`), measured next to each case.

The peaks are the rate of one large GEMM in the case's dtype and, on a GPU, of a copy through its memory.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastlstm
from benchmarks.cases import TORCH_DTYPES, Case
from benchmarks.measure import Measurement, Plan, alternate, timer_for

ROOT = Path(__file__).resolve().parent.parent
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 1 << 30


def cpu_model() -> str:
    """The CPU's name by /proc/cpuinfo, otherwise by platform."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, "-dirty" with uncommitted changes; "unknown" outside a checkout with commits."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A benchmark's CSVs and plots do not change the code that was measured.
        changed = git("status", "--porcelain", "--", ":!benchmarks/results", ":!README.md", ":!docs/benchmarks.md")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str:
    """NVIDIA driver version, or "" if nvidia-smi reports none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def describe(device: str) -> dict[str, object]:
    """The columns that make a row reproducible; no host name and no path."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
        "driver": driver() if cuda else "",
        "python": platform.python_version(),
        "fastlstm": fastlstm.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def slug(machine: dict[str, object]) -> str:
    """Folder name under benchmarks/results: the device; for a CPU also its vector extension and threads."""
    name = str(machine["device"])
    if name == machine["cpu"]:
        name += f" {machine['cpu_capability']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def has_fast_bf16() -> bool:
    """Returns true if this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX, or Arm's BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|avx_ne_convert|bf16)\b", flags))


class Peak:
    """Peak rates of the machine in a case's dtype. Call `sample` before and after a case, then read the rates.

    The caller sets torch's precision (TF32 or IEEE), which applies to the GEMM as to the case.
    """

    def __init__(self, dtype: str, device: str) -> None:
        if dtype == "bf16_products":  # the flag of a GEMM is another
            dtype = "float32"
        reduced = dtype in ("bfloat16", "float16")
        self.dtype = "float32" if reduced and device == "cpu" and not has_fast_bf16() else dtype
        n = GEMM_SIZE[device]
        self.name = f"gemm {n}^3 {self.dtype}"
        if self.dtype != dtype:
            self.name += f" (no {dtype} hardware)"
        self._timer = timer_for(device)
        a, b = (torch.rand(n, n, device=device, dtype=TORCH_DTYPES[self.dtype]) for _ in range(2))
        out = torch.empty_like(a)
        self._flops = 2.0 * n**3
        self._gemm = Measurement.of(lambda: torch.mm(a, b, out=out))
        self._bytes = 2.0 * COPY_BYTES  # read once, written once
        self._copy: Measurement | None = None
        if device == "cuda":
            source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
            destination = torch.empty_like(source)
            self._copy = Measurement.of(lambda: destination.copy_(source))
        # Few samples, right before and right after the case, so that the machine is in the same state.
        self._plan = Plan(budget=0.0, min_rounds=3, warm_up=0.0)

    def sample(self) -> None:
        measurements = {"gemm": self._gemm} | ({"copy": self._copy} if self._copy else {})
        with torch.no_grad():
            alternate(measurements, self._timer, self._plan)

    def reset(self) -> None:
        self._gemm.samples.clear()
        if self._copy:
            self._copy.samples.clear()

    @property
    def gemm_rate(self) -> float:
        """Flops per second."""
        return self._flops / float(torch.tensor(self._gemm.samples).median())

    @property
    def copy_rate(self) -> float | None:
        """Bytes per second of a copy in GPU memory, reads plus writes; None on a CPU."""
        return self._bytes / float(torch.tensor(self._copy.samples).median()) if self._copy else None

    def lower_bound(self, case: Case, mode: str) -> float:
        """Lower bound of a case's time in seconds (roofline): its GEMMs at the peak rate, its traffic at the copy's.

        It excludes synchronization per step, so short steps on a GPU stay well above it. On a CPU only the GEMMs
        count, because caches hold what a GPU streams from memory.
        """
        compute = case.flops(mode) / self.gemm_rate
        return max(compute, case_bytes(case, mode) / self.copy_rate) if self.copy_rate else compute


def case_bytes(case: Case, mode: str) -> int:
    """Minimum traffic of a case in GPU memory, in bytes.

    Forward: x read, the output written, the weights read. Training adds the activated gates (4H) and the cell states
    (H) of every row, written and read back; x, the weights and the incoming gradient read; dx and dW written.
    """
    size = case.torch_dtype.itemsize
    weights = activations = reserve = 0
    for layer in range(case.L):
        inputs = case.I if layer == 0 else case.D * case.P
        weights += case.D * (4 * case.H * (inputs + case.P + 2) + case.proj * case.H)
        activations += case.rows * (inputs + case.D * case.P)
        reserve += case.rows * case.D * 5 * case.H
    forward = weights + activations
    return size * (forward if mode == "forward" else 3 * weights + 3 * activations + 2 * reserve)
