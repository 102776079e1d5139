"""Calls on the GPU that no well-meaning program makes: an error or the reference's result, and the GPU works on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlstm

from .gpu_support import DEVICE, each_backend, gpu  # noqa: F401
from .test_hostile import run_hostile

pytestmark = gpu


@pytest.mark.parametrize("seed", [3000, 4000, 5000, 6000])
def test_hostile_calls(seed, backend):
    """tests/hostile.py's generator, in a process of its own."""
    run_hostile(backend, seed, 40 if backend == "triton" else 100, DEVICE)


X, HX = torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
ELSEWHERE = {
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


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two kinds of device")
@pytest.mark.parametrize("place", ELSEWHERE)
def test_tensors_of_cpu_and_gpu_in_one_call(place, backend):
    """Refused as by nn.LSTM, with an error of the same type, before any kernel runs; and the next call is right."""
    x, hx = X.to(DEVICE), tuple(s.to(DEVICE) for s in HX)
    raised = []
    for cls in (nn.LSTM, fastlstm.LSTM):
        with pytest.raises(RuntimeError) as caught:
            ELSEWHERE[place](cls(3, 4, device=DEVICE), x, hx)
        raised.append(caught.type)
    assert raised[0] is raised[1]
    assert fastlstm.LSTM(3, 4, device=DEVICE)(x, hx)[0].isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two kinds of device")
def test_arguments_beside_the_input_on_cpu(backend):
    """lengths may lie anywhere, as pack_padded_sequence's do; a mask may not."""
    lstm, x = fastlstm.LSTM(3, 4, device=DEVICE), torch.randn(5, 2, 3, device=DEVICE)
    found = [lstm(x, lengths=lengths)[0] for lengths in ([5, 2], torch.tensor([5, 2]), x.new_tensor([5, 2]).long())]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not found[0][2:, 1].any()
    with pytest.raises(ValueError, match="reset_mask must be on the input's device cuda:0, got cpu"):
        lstm(x, reset_mask=torch.zeros(5, 2, dtype=torch.bool))


@pytest.mark.parametrize("lengths", [[6, 1], [-1, 2], torch.tensor([2**62, 1]), torch.tensor([1, -(2**63)])], ids=str)
def test_lengths_out_of_range(lengths, backend):
    """From the host, where they are looked at."""
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
sys.exit("not noticed")
"""


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no assertion on a device")
def test_lengths_out_of_range_on_the_device(backend):
    """The host would have to wait for them: torch's assertion on the device, as for an embedding's indices."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", ASSERTED, backend]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU's tests have it")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_stays_alone(value, backend):
    """A number that is not finite reaches its own row from its step on, and no other row or earlier step."""
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
