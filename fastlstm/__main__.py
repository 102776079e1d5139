"""`python -m fastlstm`: versions, what was compiled, devices, and a short check of parity and speed against nn.LSTM."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm import reference
from fastlstm.accuracy import Precision, compare, error_bounds
from fastlstm.backends import BACKENDS, native
from fastlstm.explain import explain

# T, B, I, H of the check
SHAPES = ((10, 1, 1, 100), (100, 16, 64, 128))


def main() -> int:
    """Print the report; return 0 if fastlstm's numbers are right (fastlstm/accuracy.py), otherwise 1."""
    print(f"fastlstm {fastlstm.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if native.extension is None:
        print(f"extension  not available: {native.load_error}")
    else:
        built, isa = ", ".join(native.extension.devices()), native.extension.isa()
        bfloat16 = native.extension.bfloat16_isa()
        also = f", bfloat16 on {bfloat16}" if bfloat16 != isa else ""
        print(f"extension  built for {built}; CPU kernels run on {isa}{also}")
    print(f"threads    {torch.get_num_threads()}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        print(f"GPU        {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}")
        devices.append(torch.device("cuda"))
    print(f"backends   {', '.join(BACKENDS)}, reference")
    return 0 if all([_check(device, *shape) for device in devices for shape in SHAPES]) else 1


def _check(device: torch.device, T: int, B: int, I: int, H: int) -> bool:  # noqa: E741
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, device=device)
    ours = fastlstm.LSTM(I, H, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, device=device)
    dy = torch.randn(T, B, H, device=device)
    terms = {name: T * B for name, _ in ours.named_parameters()}
    # The flag that decides for float32 on a GPU: docs/numerics.md.
    cuda = torch.backends.cudnn.rnn if torch.backends.cudnn.enabled else torch.backends.cuda.matmul
    tf32 = device.type == "cuda" and cuda.fp32_precision == "tf32"  # type: ignore[attr-defined]
    precision = Precision.of(x.dtype, "tf32" if tf32 else "ieee")
    truth, bounds = error_bounds(lambda: _in_float64(ours, x, dy), precision, terms)
    found = compare(_step(ours, x, dy), truth, bounds)
    wrong = [str(accuracy) for accuracy in found if not accuracy.ok]
    ratio = _ratio(lambda: _step(theirs, x, dy), lambda: _step(ours, x, dy), device)
    print(
        f"{device.type}, T={T} B={B} I={I} H={H}, float32: output and gradients "
        f"{'NOT ' if wrong else ''}as accurate as {'TF32' if tf32 else 'float32'} allows; "
        f"training step {ratio:.1f}x nn.LSTM's speed on backend {explain(ours, x).backend}"
    )
    for line in wrong:
        print(f"  {line}")
    return not wrong


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """A training step: the output and the gradients of all weights."""
    for weight in module.parameters():
        weight.grad = None
    y, _ = module(x)
    y.backward(dy)
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    return {"output": y.detach(), **gradients}


def _in_float64(module: fastlstm.LSTM, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same step by the reference."""
    weights = {name: weight.detach().double().requires_grad_() for name, weight in module.named_parameters()}
    y, *_ = reference.layer(x.double(), None, None, list(weights.values()))
    gradients = torch.autograd.grad(y, list(weights.values()), dy.double())
    return {"output": y.detach(), **dict(zip(weights, gradients, strict=True))}


def _ratio(theirs: Callable[[], object], ours: Callable[[], object], device: torch.device) -> float:
    """Median of theirs' time over ours', alternating, for about two seconds."""

    def seconds(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        seconds(theirs), seconds(ours)
    ratios = []
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        ratios.append(seconds(theirs) / seconds(ours))
    return statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
