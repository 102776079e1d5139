"""Adversarial inputs on the GPU: an error or the reference's result, and the GPU remains usable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlstm

from ..tools.test_adversarial import run_adversarial
from .gpu_support import DEVICE, each_backend, gpu  # noqa: F401

pytestmark = gpu


@pytest.mark.parametrize("seed", [3000, 4000, 5000, 6000])
def test_adversarial_calls(seed, backend):
    """Calls of tests/adversarial.py, in a new process."""
    run_adversarial(backend, seed, 40 if backend == "triton" else 100, DEVICE)


X, HX = torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
CALLS_ACROSS_DEVICES = {
    "input": lambda lstm, x, hx: lstm(x.cpu()),
    "h0": lambda lstm, x, hx: lstm(x, (hx[0].cpu(), hx[1])),
    "c0": lambda lstm, x, hx: lstm(x, (hx[0], hx[1].cpu())),
    "module": lambda lstm, x, hx: lstm.cpu()(x, hx),
    "weight_hh": lambda lstm, x, hx: functional(lstm, "weight_hh_l0")(x, hx),
    "bias_ih": lambda lstm, x, hx: functional(lstm, "bias_ih_l0")(x, hx),
}


def functional(lstm: nn.Module, name: str) -> nn.Module:
    """The module with one of its weights on CPU."""
    setattr(lstm, name, nn.Parameter(getattr(lstm, name).detach().cpu()))
    return lstm


@pytest.mark.skipif(DEVICE == "cpu", reason="requires two kinds of device")
@pytest.mark.parametrize("argument", CALLS_ACROSS_DEVICES)
def test_tensors_on_cpu_and_gpu_are_refused(argument, backend):
    """Refused with nn.LSTM's error type before any kernel runs; the next call succeeds."""
    x, hx = X.to(DEVICE), tuple(s.to(DEVICE) for s in HX)
    raised = []
    for cls in (nn.LSTM, fastlstm.LSTM):
        with pytest.raises(RuntimeError) as caught:
            CALLS_ACROSS_DEVICES[argument](cls(3, 4, device=DEVICE), x, hx)
        raised.append(caught.type)
    assert raised[0] is raised[1]
    assert fastlstm.LSTM(3, 4, device=DEVICE)(x, hx)[0].isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="requires two kinds of device")
def test_lengths_on_any_device_and_mask_on_the_inputs(backend):
    """lengths may be on any device, as in pack_padded_sequence; reset_mask must be on the input's."""
    lstm, x = fastlstm.LSTM(3, 4, device=DEVICE), torch.randn(5, 2, 3, device=DEVICE)
    results = [lstm(x, lengths=lengths)[0] for lengths in ([5, 2], torch.tensor([5, 2]), x.new_tensor([5, 2]).long())]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not results[0][2:, 1].any()
    with pytest.raises(ValueError, match="reset_mask must be on the input's device cuda:0, got cpu"):
        lstm(x, reset_mask=torch.zeros(5, 2, dtype=torch.bool))


@pytest.mark.parametrize("lengths", [[6, 1], [-1, 2], torch.tensor([2**62, 1]), torch.tensor([1, -(2**63)])], ids=str)
def test_lengths_out_of_range_on_cpu(lengths, backend):
    """Lengths on the host are checked there."""
    lstm, x = fastlstm.LSTM(3, 4, device=DEVICE), X.to(DEVICE)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T=5\], got"):
        lstm(x, lengths=lengths)
    assert lstm(x)[0].isfinite().all()


ASSERTED = """
import sys, torch, fastlstm
fastlstm.use_backend(sys.argv[1])
lstm, x = fastlstm.LSTM(3, 4, device="cuda"), torch.zeros(5, 2, 3, device="cuda")
lstm(x, lengths=torch.tensor([5, 2], device="cuda"))
torch.cuda.synchronize()
try:
    lstm(x, lengths=torch.tensor([6, 2], device="cuda"))
    torch.cuda.synchronize()
except RuntimeError as error:
    sys.exit(0 if "device-side assert" in str(error) else str(error))
sys.exit("no error")
"""


@pytest.mark.skipif(DEVICE == "cpu", reason="device-side assertions require CUDA")
def test_lengths_out_of_range_on_the_device(backend):
    """A device-side assertion, as for an embedding's indices, because a check on the host would synchronize."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ASSERTED, backend]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cpu", reason="tests/ops/test_non_finite.py tests the CPU")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_input_affects_its_row_only(value, backend):
    """An infinity or NaN affects later steps of its row only."""
    torch.manual_seed(0)
    lstm, x = fastlstm.LSTM(16, 32, 2, device=DEVICE), torch.randn(7, 9, 16, device=DEVICE)
    with torch.no_grad():
        expected = lstm(x)[0]
        x[3, 4, 5] = value
        got, (h_n, _) = lstm(x)
    rows = [b for b in range(9) if b != 4]
    assert torch.equal(got[:, rows], expected[:, rows])
    assert torch.equal(got[:3], expected[:3])
    assert h_n[:, rows].isfinite().all()
    if value != value:
        assert got[3:, 4].isnan().all()
