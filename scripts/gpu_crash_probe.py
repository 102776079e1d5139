"""Which error raised in C++ kills the process? Each way to raise one in a fresh process: gpu_crash_probe.py [DEVICE]

tests/gpu/test_gpu_adversarial.py once died of signal 11 where the op refused CUDA tensors without gradients, before
Python checked the arguments first. The suspects differ in no-grad mode, a fresh process, and an integer formatted into
the message. The first two that die are run again under gdb or cuda-gdb, if there is one. Exit status 1 if any died.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

PRELUDE = """
import faulthandler, sys
faulthandler.enable()
import torch, fastlstm
from fastlstm.backends import native
extension, op, device = native.extension, torch.ops.fastlstm.native_layer, sys.argv[1]

def weights(grad=False, H=17, I=3):
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    return [torch.randn(*shape, device=device, requires_grad=grad) for shape in shapes]

def bad_sizes(grad=False):  # "bias_hh must be [68], got []"
    made = weights(grad)
    return [*made[:3], made[3].detach().sum(0)]

def bad_dtype(grad=False):  # no number in the message
    made = weights(grad)
    return [*made[:3], made[3].detach().half()]

x = torch.randn(5, 2, 3, device=device)

def call(given, x=x):
    return op(x, None, None, given, None, None, False, False)

def expect(run):
    try:
        run()
    except RuntimeError as error:
        print("RAISED", str(error).splitlines()[0][:90])
    else:
        print("NOT RAISED")
"""
WAYS = {
    "pybind, no tensor and no number": "expect(lambda: extension.enable_persistent(False, 'Q'))",
    "pybind, a dtype": "expect(lambda: extension.activation(torch.zeros(3, dtype=torch.int64), 'tanh'))",
    "sizes, no grad": "expect(lambda: call(bad_sizes()))",
    "sizes, grad": "expect(lambda: call(bad_sizes(True)))",
    "dtype, no grad": "expect(lambda: call(bad_dtype()))",
    "dtype, grad": "expect(lambda: call(bad_dtype(True)))",
    "ten weights": "expect(lambda: call(weights() + weights() + weights()[:2]))",
    "sizes, after a good call": "call(weights()); expect(lambda: call(bad_sizes()))",
    "sizes, after torch raised": "expect(lambda: torch.mm(x[0], x[0])); expect(lambda: call(bad_sizes()))",
    "sizes, in a thread": (
        "import threading\nt = threading.Thread(target=lambda: expect(lambda: call(bad_sizes())))\nt.start(); t.join()"
    ),
    "sizes, CPU tensors in this build": "device = 'cpu'; x = x.cpu(); expect(lambda: call(bad_sizes(), x))",
    "sizes, inference mode": "expect(torch.inference_mode()(lambda: call(bad_sizes())))",
    "backward's check": (
        "y = call(weights())\nbackward = torch.ops.fastlstm.native_layer_backward\n"
        "rest = (x, None, None, weights(), None, None, y[0], y[3], y[4], [False] * 7)\n"
        "expect(lambda: backward(y[0], None, None, None, *rest))"
    ),
    "out of memory, no grad": (
        "X = torch.empty(1, device=device).expand(2**20, 2**16, 1)\n"
        "expect(lambda: call(weights(I=1), X)) if device == 'cuda' else print('RAISED not tried')"
    ),
    "Python's checks before the op": (
        "expect(lambda: fastlstm.functional.lstm(x, None, bad_sizes(), True, 1, 0.0, True, False, False))"
    ),
}


def main(device: str) -> int:
    died = []
    for name, code in WAYS.items():
        for stacks in ("0", "1") if name == "sizes, no grad" else ("0",):
            environment = {**os.environ, "TORCH_SHOW_CPP_STACKTRACES": stacks}
            command = [sys.executable, "-c", PRELUDE + code, device]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            said = [line for line in ran.stdout.splitlines() if "RAISED" in line]
            what = said[-1] if said else (ran.stdout + ran.stderr)[-700:]
            print(f"{ran.returncode:4d} {name}{' (C++ stacks)' if stacks == '1' else ''}: {what}", flush=True)
            if ran.returncode < 0:
                died.append(name)
    debugger = shutil.which("cuda-gdb") or shutil.which("gdb")
    for name in died[:2] if debugger else ():
        with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
            program.write(PRELUDE + WAYS[name])
            program.flush()
            asks = ("set pagination off", "run", "bt 40", "info registers rip rsp", "x/6i $rip", "info sharedlibrary")
            command = [str(debugger), "--batch", *(part for ask in asks for part in ("-ex", ask))]
            command += ["--args", sys.executable, program.name, device]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
            print(f"== {name}\n{ran.stdout[-9000:]}\n{ran.stderr[-1500:]}")
    print(f"{len(died)} of {len(WAYS)} ways killed the process" + "".join(f"\n  {name}" for name in died))
    return 1 if died else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
