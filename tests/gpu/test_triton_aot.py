"""The Triton kernels compiled ahead of time, without a GPU: every row of the tile table for sm_80, sm_90 and gfx942.

`recorded` runs the backend's launch code on CPU tensors with a driver that has a target and no device, and stops where
Triton would compile. So signatures and the number of recompilations are those of real calls.
tests/gpu/interpreted_triton.py tests the results; nothing here shows that the kernels run on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlstm import backends
from fastlstm.ops.schema import LayerInputs, forward_outputs

from .gpu_support import Arithmetic

triton = pytest.importorskip("triton")
if backends.triton.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastlstm.backends.triton import launch, plan, resident, tiled  # noqa: E402

pytestmark = pytest.mark.toolchain

# name: (Triton's target, the launch code's name for it, KiB of shared memory a block may use)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "cuda", 163),
    "sm_90": (GPUTarget("cuda", 90, 32), "cuda", 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hip", 64),
}
KERNELS = (
    *(resident.layer_resident_fwd, resident.layer_resident_bwd, tiled.layer_streamed_fwd, tiled.layer_streamed_bwd),
    *(tiled.step_tiled_fwd, tiled.step_tiled_bwd),
)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


def arguments(
    T: int, B: int, H: int, dtype: torch.dtype, D: int = 2, everything: bool = True, offset: int = 0
) -> LayerInputs:
    """Arguments of the forward op; the states have a storage offset of `offset` elements, as slices do."""

    def state() -> torch.Tensor:
        return torch.zeros(D * B * H + offset, dtype=dtype)[offset:].view(D, B, H)

    sizes = ((4 * H, 3), (4 * H, H), (4 * H,), (4 * H,)) if everything else ((4 * H, 3), (4 * H, H))
    weights = [torch.zeros(size, dtype=dtype) for _ in range(D) for size in sizes]
    x = torch.zeros(T, B, 3, dtype=dtype)
    if not everything:
        return LayerInputs(x, None, None, weights)
    return LayerInputs(x, state(), state(), weights, torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool))


def run(inputs: LayerInputs, everything: bool = True) -> None:
    """Forward and backward through the launch code; no kernel runs, so results are undefined."""
    launch.forward(inputs, everything, True)
    y, h_n, c_n, cells, reserve = forward_outputs(inputs, everything, True)
    needs = [True, inputs.h0 is not None, inputs.c0 is not None] + [True] * len(inputs.weights)
    grads = (y, h_n, c_n, cells) if everything else (y, None, None, None)
    launch.backward(grads, inputs, y, cells, reserve, needs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, dict[str, Any]]]]:
    """record(target, precision, calls): what Triton would compile, by kernel and Triton's cache key."""

    def record(target: str, precision: str, calls: Callable[[], None]) -> dict[str, dict[str, Any]]:
        gpu, name, shared = TARGETS[target]
        found: dict[str, dict[str, Any]] = {}

        def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            specialization = json.loads(compile["specialization_data"])["options"]
            options = {name: specialization[name] for name in OPTIONS if name in specialization}
            source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
            found.setdefault(fn.jit_function.__name__, {})[key] = (source, gpu, options)
            return True  # "already compiled", so Triton stops here

        driver = SimpleNamespace(
            get_current_target=lambda: gpu, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
        clear()
        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", driver)
            patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
            patch.setattr(launch, "_target", lambda device: (name, shared))
            patch.setattr(launch, "_tf32", lambda: precision == "tf32")
            calls()
        return found

    def clear() -> None:
        for kernel in KERNELS:  # Triton's cache of device 0 is for another target
            kernel.device_caches.clear()

    yield record
    clear()


def figures(target: str, source: ASTSource, gpu: GPUTarget, options: dict[str, int]) -> dict[str, int]:
    """Compile for `target`; return bytes of shared memory, registers per thread, and bytes spilled."""
    compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        value = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # noqa: E731
        return {
            "shared": compiled.metadata.shared,
            "registers": value("vgpr_count"),
            "spilled": value("private_segment_fixed_size"),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"shared": compiled.metadata.shared, "registers": int(registers), "spilled": int(stack)}


def variants() -> Iterator[Any]:
    """(target, "half", "tf32" or "ieee", H, row) for the rows of the table, each at its widest H.

    On sm_80, which has the kernels and tiles of sm_90, only the widest of the rows with equal kernels.
    """
    for target, (_, name, shared) in TARGETS.items():
        for (owner, kind), rows in plan.TABLE.items():
            if owner == name:
                fitting = [row for row in rows if row.shared <= shared]
                if target == "sm_80":
                    fitting = list({row.kernel: row for row in fitting}.values())
                for row in fitting:
                    H = min(row.max_h, 512)
                    yield pytest.param(target, kind, H, row, id=f"{target}-{kind}-{row.kernel}-{H}")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines to print after all compilations."""
    lines = [f"\n{'target':7} {'kind':5} {'kernel':20} {'H':>4} {'shared':>7} {'registers':>9} {'spilled':>7}"]
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(*lines, sep="\n")


@pytest.mark.parametrize(("target", "kind", "H", "row"), list(variants()))
def test_compiles_without_spills_within_shared_memory(target, kind, H, row, recorded, table):
    """With lengths, resets, both directions and all gradients: the variants that use the most registers."""
    assert row.shared <= TARGETS[target][2]
    results = recorded(target, kind, lambda: run(arguments(2, 3, H, DTYPES[kind])))
    assert all(row.kernel in name or (row.kernel == "step" and "step" in name) for name in results), results
    assert len(results) == 2
    wrong = []
    for kernel, keys in results.items():
        ((_, (source, gpu, options)),) = keys.items()
        resources = figures(target, source, gpu, options)
        table.append(
            f"{target:7} {kind:5} {kernel:20} {H:4} {resources['shared']:7} {resources['registers']:9} "
            f"{resources['spilled']:7}"
        )
        if resources["shared"] > row.shared * 1024 or resources["spilled"]:
            wrong.append(f"{kernel}: {resources}, allowed {row.shared} KiB of shared memory and no spills")
    assert not wrong, "\n".join(wrong)


def test_ieee_products_are_summed_in_blocks(recorded):
    """Blockwise sums over K: one running sum over K = 1024 had more than twice cuDNN's error on an H100."""
    results = recorded("sm_90", "ieee", lambda: run(arguments(2, 3, 300, torch.float32)))
    for kernel, keys in results.items():
        ((_, (source, gpu, options)),) = keys.items()
        text = triton.compile(source, target=gpu, options=options).asm["ttgir"]
        dots = re.findall(r"(%\w+) = tt\.dot .*maxNumImpreciseAcc", text)
        assert dots, kernel
        assert len(dots) == len(re.findall(r"tt\.dot ", text)), kernel
        assert all(re.search(rf"arith\.addf .*{dot}\b", text) for dot in dots), kernel


SHAPES = ((1, 1), (1, 16), (16, 1), (2, 3), (15, 7), (17, 33), (16, 16), (40, 64), (3, 100), (128, 2))  # (T, B)


@pytest.mark.parametrize(("kind", "H"), [("half", 33), ("half", 128), ("half", 200), ("ieee", 65), ("half", 300)])
def test_ten_shapes_compile_once(kind, H, recorded):
    """Counts Triton's compilation keys; every second call has misaligned states."""

    def ten() -> None:
        for k, (T, B) in enumerate(SHAPES):
            run(arguments(T, B, H, DTYPES[kind], offset=k % 2))

    results = recorded("sm_90", kind, ten)
    assert {name: len(keys) for name, keys in results.items()} == dict.fromkeys(results, 1)
    assert len(results) == 2


def test_h_of_equal_alignment_reuses_compiled_kernels(recorded):
    def several() -> None:
        for H in (512, 520, 1000, 2048):
            run(arguments(2, 3, H, torch.bfloat16, everything=False), everything=False)

    results = recorded("sm_90", "half", several)
    assert {name: len(keys) for name, keys in results.items()} == {"step_tiled_fwd": 1, "step_tiled_bwd": 1}


def test_each_step_of_the_tiled_kernels_is_one_launch(recorded, monkeypatch):
    """Launches after the first reuse its kernel without Triton's lookup, with all arguments."""
    launched = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args, stream: launched.append((grid, args))

    class Kernel:
        arg_names = tiled.step_tiled_fwd.arg_names

        def __getitem__(self, grid):
            def run(*args, **options):
                launched.append((grid, args))
                return Compiled()

            return run

    monkeypatch.setattr(tiled, "step_tiled_fwd", Kernel())
    inputs = arguments(5, 70, 300, torch.bfloat16)
    recorded("sm_90", "half", lambda: launch.forward(inputs, True, True))
    names = Kernel.arg_names
    assert [args[names.index("s")] for _, args in launched] == [0, 1, 2, 3, 4]
    assert {(grid, len(args)) for grid, args in launched} == {((38, 2, 1), len(names))}
    for step, (_, args) in enumerate(launched):
        arguments_by_name = dict(zip(names, args, strict=True))
        assert (
            arguments_by_name["T"],
            arguments_by_name["B"],
            arguments_by_name["spans"] * arguments_by_name["ALIGN"],
            arguments_by_name["D"],
        ) == (5, 70, 300, 2), step
        assert arguments_by_name["KEEP_GATES"] is True, step


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
def test_flags_of_tf32(rnn, matmul, enabled, monkeypatch):
    """As in nn.LSTM: the RNN flag applies, or the matmul flag if cuDNN is off."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    with Arithmetic(torch.float32, rnn, matmul).flags():
        assert launch._tf32() == ((rnn if enabled else matmul) == "tf32")


@pytest.mark.parametrize("widened", [True, False])
def test_products_around_the_loop(widened, monkeypatch):
    monkeypatch.setattr(launch, "_widened", lambda out: widened)
    a, b, bias, before = torch.randn(5, 7), torch.randn(7, 3), torch.randn(3), torch.randn(5, 3)
    out = torch.empty(5, 3)
    launch._multiply(out, a, b)
    torch.testing.assert_close(out, a @ b)
    launch._multiply(out, a, b, bias)
    torch.testing.assert_close(out, a @ b + bias)
    out = before.clone()
    launch._multiply(out, a, b, out)
    torch.testing.assert_close(out, a @ b + before)
