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
from fastlstm.backends import BACKENDS, native
from fastlstm.explain import explain

# T, B, I, H of the check
SHAPES = ((10, 1, 1, 100), (100, 16, 64, 128))


def main() -> int:
    """Print the report; 0 when fastlstm's numbers are nn.LSTM's, else 1."""
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
    truth = [t.double() for t in _step(theirs.double(), x.double(), dy.double())]
    theirs.float()

    def error(module: nn.Module) -> list[float]:
        return [float((a.double() - b).abs().max()) for a, b in zip(_step(module, x, dy), truth, strict=True)]

    # a few ulp of the scale, for results where nn.LSTM happens to be exact
    floors = [8 * torch.finfo(x.dtype).eps * float(b.abs().max()) for b in truth]
    right = all(a <= 2 * b + floor for a, b, floor in zip(error(ours), error(theirs), floors, strict=True))
    ratio = _ratio(lambda: _step(theirs, x, dy), lambda: _step(ours, x, dy), device)
    print(
        f"{device.type}, T={T} B={B} I={I} H={H}, float32: "
        f"output and gradients {'as' if right else 'NOT AS'} nn.LSTM's; "
        f"training step {ratio:.1f}x nn.LSTM's speed on backend {explain(ours, x).backend}"
    )
    return right


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """A training step: the output and the gradients of all weights."""
    for weight in module.parameters():
        weight.grad = None
    y, _ = module(x)
    y.backward(dy)
    return [y.detach(), *(weight.grad for weight in module.parameters() if weight.grad is not None)]


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
