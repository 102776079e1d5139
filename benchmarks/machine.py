"""The machine: what it is (`describe`), and what it can do (`Limit`, measured beside the cases).

A limit is the rate of one big matrix product at the case's own dtype, and on a GPU a copy through its memory too.
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
from benchmarks.measure import Contender, Plan, alternate, timer_for

ROOT = Path(__file__).resolve().parent.parent
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 1 << 30


def cpu_model() -> str:
    """As the kernel names it, else as platform does."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, "-dirty" with uncommitted changes; "unknown" outside a checkout with commits."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A benchmark's own CSVs and plots do not change what was measured.
        changed = git("status", "--porcelain", "--", ":!benchmarks/results", ":!README.md", ":!docs/benchmarks.md")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str:
    """NVIDIA driver version, or "" where nvidia-smi gives none."""
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
    """Folder name under benchmarks/results: the device; of a CPU also its vectors, which names hide, and threads."""
    name = str(machine["device"])
    if name == machine["cpu"]:
        name += f" {machine['cpu_capability']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX, or Arm's BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|avx_ne_convert|bf16)\b", flags))


class Limit:
    """The machine's own rate for a case's dtype. `sample` it before and after a case, then read it.

    Under TF32 or IEEE the caller has set torch's precision already; the product obeys it like everything else.
    """

    def __init__(self, dtype: str, device: str) -> None:
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
        self._gemm = Contender.of(lambda: torch.mm(a, b, out=out))
        self._bytes = 2.0 * COPY_BYTES  # read once, written once
        self._copy: Contender | None = None
        if device == "cuda":
            source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            self._copy = Contender.of(lambda: target.copy_(source))
        # Medians of a few samples right before and right after the case: the machine as the case saw it.
        self._plan = Plan(budget=0.0, min_rounds=3, warm_up=0.0)

    def sample(self) -> None:
        contenders = {"gemm": self._gemm} | ({"copy": self._copy} if self._copy else {})
        with torch.no_grad():
            alternate(contenders, self._timer, self._plan)

    def reset(self) -> None:
        self._gemm.samples.clear()
        if self._copy:
            self._copy.samples.clear()

    @property
    def gemm_rate(self) -> float:
        """Flops a second."""
        return self._flops / float(torch.tensor(self._gemm.samples).median())

    @property
    def copy_rate(self) -> float | None:
        """Bytes a second through the GPU's memory, reads and writes together; None on a CPU."""
        return self._bytes / float(torch.tensor(self._copy.samples).median()) if self._copy else None

    def floor(self, case: Case, mode: str) -> float:
        """Seconds below which `case` cannot go: its products at the gemm's rate or its traffic at the copy's.

        Per-step synchronisation is not in it, so short steps stay well above it on a GPU. On a CPU the caches hold
        what a GPU streams, and only the products count.
        """
        products = case.flops(mode) / self.gemm_rate
        return max(products, case_bytes(case, mode) / self.copy_rate) if self.copy_rate else products


def case_bytes(case: Case, mode: str) -> int:
    """Bytes that must cross the GPU's memory at least once.

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
