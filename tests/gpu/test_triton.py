"""The Triton backend: supports(), imports, and its kernels in the interpreter.

tests/gpu/test_triton_aot.py compiles the kernels; tests/gpu/interpreted_triton.py has the tests of what they compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fastlstm
from fastlstm import backends, dispatch
from fastlstm.backends import triton as backend
from fastlstm.ops.schema import LayerCall, LayerShape

ROOT = Path(__file__).parents[2]


def why_no_interpreter() -> str:
    """The reason Triton's interpreter cannot run the kernels here, "" if it can."""
    if not backend.INSTALLED:
        return "Triton is not installed"
    if version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        return "Triton 3.6's interpreter needs numpy older than 2.4"
    return ""


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Run Python in a new process in the root of the repository, without Triton's interpreter by default."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes)


def run(program: str) -> tuple[str, str]:
    """Run `program`; return its output and errors."""
    return start("-c", program).communicate(timeout=120)


@pytest.mark.toolchain
@pytest.mark.skipif(why_no_interpreter() != "", reason=why_no_interpreter())
def test_contract_in_the_interpreter():
    """Every kernel, option and dtype against the float64 reference, in two processes."""
    command = ("-m", "pytest", "tests/gpu/interpreted_triton.py", "-p", "no:cacheprovider", "-k")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    halves = {which: start(*command, which, **environment) for which in ("resident", "not resident")}
    try:
        for which, half in halves.items():
            out, errors = half.communicate(timeout=600)
            assert half.returncode == 0, f"{which}: {out[-6000:]}\n{errors[-2000:]}"
            assert " passed" in out, which
            assert "skipped" not in out, which
    finally:
        for half in halves.values():
            half.kill()


def call(device="cpu", dtype=torch.float32, **kwargs):
    weights = list(fastlstm.LSTM(3, 4, device="meta", dtype=dtype, **kwargs).parameters())
    described = dispatch.describe(torch.zeros(1, 1, 3, dtype=dtype), weights, None, None)
    return type(described)(**{**vars(described), "device": torch.device(device)})


@pytest.fixture
def on_gpu(monkeypatch):
    """Simulate a machine with Triton and a recent NVIDIA GPU, for supports() only."""
    monkeypatch.setattr(backend, "INSTALLED", True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "_too_old", lambda device: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True, "bias": False}], ids=str)
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_gpus_support_all_but_projections_and_float64(device, kwargs, dtype, on_gpu):
    assert backend.supports(call(device, dtype, **kwargs)) is None
    assert "proj_size" in backend.supports(call(device, dtype, proj_size=2, **kwargs))
    assert "got torch.float64" in backend.supports(call(device, torch.float64, **kwargs))


def test_offsets_fit_32_bits(on_gpu):
    def supports(H):
        shape = LayerShape(H, H, 2, False)
        return backend.supports(LayerCall(torch.device("cuda"), torch.float16, 4, shape, False, False))

    assert 4 * backend.MAX_H**2 < 2**31 <= 4 * (backend.MAX_H + 1) ** 2
    assert supports(backend.MAX_H) is None
    assert supports(backend.MAX_H + 1) == "hidden_size must be at most 23170 in Triton, got 23171"


def test_refusals_say_why(on_gpu, monkeypatch):
    assert "TRITON_INTERPRET=1" in backend.supports(call("cpu"))
    assert "got mps" in backend.supports(call("mps"))
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert backend.supports(call("cpu")) is None
    monkeypatch.setattr(backend, "_too_old", lambda device: True)
    assert "8.0" in backend.supports(call("cuda"))
    monkeypatch.setattr(backend, "INSTALLED", False)
    assert backend.supports(call("cuda")) == "Triton is not installed (pip install triton)"


@pytest.mark.skipif(backend.INTERPRETED, reason="TRITON_INTERPRET is set")
def test_cpu_tensor_is_refused_by_name_and_skipped_by_auto(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    lstm, x = fastlstm.LSTM(3, 4), torch.zeros(2, 1, 3)
    assert fastlstm.explain(lstm, x).backend != "triton"
    with fastlstm.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run this call: Triton"):
        lstm(x)


def test_native_precedes_triton_and_eager_follows():
    order = list(backends.BACKENDS)
    expected = ["native", "eager", "triton"] if backend.INTERPRETED else ["native", "triton", "eager"]
    assert [name for name in order if name in expected] == expected


def test_importing_fastlstm_imports_no_triton():
    out, errors = run("import sys, torch; old = set(sys.modules); import fastlstm; print(set(sys.modules) - old)")
    assert "'fastlstm.backends.triton'" in out, errors
    assert "'triton'" not in out
    assert "'fastlstm.backends.triton.launch'" not in out


def test_torch_compile_treats_compute_capability_as_constant():
    assert vars(backend._too_old) == vars(torch.compiler.assume_constant_result(lambda device: False))


def test_fastlstm_works_without_triton_installed():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, fastlstm
lstm, x = fastlstm.LSTM(3, 4), torch.zeros(2, 1, 3)
assert lstm(x)[0].shape == (2, 1, 4)
print(fastlstm.explain(lstm, x).reasons["triton"])
"""
    out, errors = run(program)
    assert out.strip() == "Triton is not installed (pip install triton)", errors
