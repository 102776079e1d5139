"""The CUDA backend without a GPU: its host code and kernel bodies, compiled for the CPU.

Everything but the launches, cuBLAS itself and the order of memory accesses between threads is what runs on the device:
masks, offsets, choice of vector width, chunks, the order of steps, arguments of cuBLAS, weight gradients.
tests/gpu/cuda_host replaces the rest. The GPU suite is tests/gpu/test_gpu_*.py.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

import fastlstm
from fastlstm import dispatch
from fastlstm.ops import register, schema

from ..cases import Case, random_case, tensors
from ..module_pairs import naming
from ..runners import check, gradients, run_backend
from . import gpu_support
from .gpu_support import Arithmetic

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[2]
NAME = "cuda_host"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A few steps of a case per chunk of x W_ih^T, twice as many per chunk of dgates; csrc/cuda/layer.h.
CHUNK_BYTES = 4096
LIBRARIES: list[torch.library.Library] = []  # destroying one would remove its registrations


def unavailable_reason() -> str:
    """The reason the CUDA sources cannot be compiled for the host here, "" if they can."""
    compiler, nvcc = shutil.which("g++"), shutil.which("nvcc")
    if compiler is None:
        return "there is no g++"
    return "" if nvcc and cuda_headers() else "the CUDA headers were not found (no nvcc)"


def cuda_headers() -> str:
    """The include folder nvcc uses; "" if there is none."""
    told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, input="").stderr
    for word in told.split():
        folder = word.strip('"').removeprefix("-I").strip('"')
        if Path(folder, "cuda_runtime_api.h").exists():
            return folder
    return ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The op fastlstm::cuda_host_layer, compiled once for all modules that import this fixture, and for all workers."""
    if LIBRARIES:
        return
    if reason := unavailable_reason():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the run's folder has one for each worker
        folder = folder.parent
    with FileLock(folder / f"{NAME}.lock"):
        if not (folder / NAME / "cuda_host.so").exists():
            compile_host(folder / NAME)
    register_host(folder / NAME / "cuda_host.so")


def compile_host(built: Path) -> None:
    """Compile the backend to built/cuda_host.so."""
    built.mkdir(exist_ok=True)
    sources = ROOT / "tests" / "gpu" / "cuda_host"
    command = ["g++", "-std=c++20", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-DFASTLSTM_CUDA_CHUNK_BYTES={CHUNK_BYTES}", f"-I{sources}", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem{folder}" for folder in (*include_paths(), cuda_headers())]
    # In kernels a misaligned vector access aborts, as it would on the device. Torch's headers take twice as long to
    # compile with that check, and the kernels 39 s at -O1 instead of 21 s.
    aligned = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
    objects = {built / "kernels.o": ("-Og", *aligned), built / "host.o": ("-O0",)}
    running = [
        subprocess.Popen([*command, *options, "-c", str(sources / f"{path.stem}.cpp"), "-o", str(path)])
        for path, options in objects.items()
    ]
    assert not any([process.wait() for process in running])
    libraries = [f"-L{folder}" for folder in library_paths()] + ["-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(built / "cuda_host.so"), *libraries], check=True)


def register_host(path: Path) -> None:
    """Define the ops of the library at `path` and of the backend."""
    library = torch.library.Library("fastlstm_cuda_host", "DEF")
    library.define("native_layer" + schema.FORWARD)
    library.define("native_layer_backward" + schema.BACKWARD)
    library.define("multiply(Tensor(a!) out, Tensor a, Tensor b, bool add) -> int")
    library.define("persistent(bool enabled, str tier) -> ()")
    library.define("launches_left(int n) -> ()")
    library.define("occupancy_queries() -> int")
    torch.ops.load_library(str(path))
    torch.ops.fastlstm_cuda_host.persistent(False, "")
    ops = torch.ops.fastlstm_cuda_host
    register.define(
        NAME,
        lambda inputs, *keep: ops.native_layer(*schema.arguments(inputs, *keep)),
        lambda grads, inputs, *others: ops.native_layer_backward(*grads, *schema.arguments(inputs, *others)),
    )
    LIBRARIES.append(library)


@pytest.fixture
def backend(compiled: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register the simulated CUDA backend for a test."""
    module = SimpleNamespace(NAME=NAME, supports=lambda call: None)
    monkeypatch.setitem(dispatch.BACKENDS, NAME, module)
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, NAME))
    with fastlstm.use_backend(NAME):
        yield NAME


@pytest.fixture(params=["A", "B", "D", "S"])
def persistent(request: pytest.FixtureRequest, backend: str) -> Iterator[str]:
    """The backend with the persistent kernels of one tier, on a device of 8 SMs; float32 GEMMs use TF32.

    S supports layers of up to 128 units in 16 bits, D one batch tile per group; B runs the others.
    """
    torch.ops.fastlstm_cuda_host.persistent(True, request.param)
    yield backend
    torch.ops.fastlstm_cuda_host.persistent(False, "")


RAGGED = {"lengths": (4, 0, 7, 1, 6), "resets": ((0, 0), (3, 0), (5, 0), (2, 2), (6, 2), (6, 3), (4, 4))}
WITH_CELLS = Case(T=9, B=5, I=3, H=8, hx="tuple", cells=True)  # H is a multiple of the vector width
RAGGED_PROJECTION = Case(T=7, B=5, I=4, H=8, bidirectional=True, cells=True, proj=3, hx="tuple", **RAGGED)
CASES = (
    Case(T=1, B=1, I=1, H=1),
    Case(T=1, hx="tuple", bidirectional=True),
    WITH_CELLS,
    Case(T=9, B=5, I=3, H=8, bias=False),
    Case(T=9, B=5, I=3, H=7, hx="strided", bidirectional=True, batch_first=True),
    Case(T=7, B=5, I=4, H=8, proj=4, hx="tuple", bidirectional=True, cells=True),
    Case(T=7, B=5, I=4, H=8, proj=3, layers=2),
    Case(T=7, B=5, I=4, H=8, bidirectional=True, cells=True, hx="tuple", **RAGGED),
    RAGGED_PROJECTION,
    Case(T=7, B=5, I=4, H=8, bidirectional=True, lengths=RAGGED["lengths"]),
    Case(T=7, B=5, I=4, H=8, bidirectional=True, hx="expanded", resets=RAGGED["resets"]),
    Case(T=17, B=3, I=2, H=16, bidirectional=True, hx="tuple"),  # several chunks, of which the last is shorter
    Case(T=18, B=3, I=2, H=16, proj=8, bidirectional=True, hx="tuple", lengths=(18, 7, 0)),
    Case(T=5, B=0),
    Case(hx="shared", frozen=("weight_ih_l0", "bias_hh_l0")),
    Case(hx="tuple", x_grad=False, hx_grad=False, frozen=("bias_ih_l0", "bias_hh_l0")),
    Case(T=6, B=4, hx="tuple", strided=("x", "weights", "grads"), used=("c_n",), bidirectional=True),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, backend, poisoned_empty):
    check(case.to(dtype), backend)


def test_random_cases(backend, poisoned_empty):
    rng = random.Random(20240229)
    for _ in range(40):
        check(random_case(rng, DTYPES), backend)


# More units than one block, an odd number; more rows than one slice; several launches of each kernel.
PERSISTENT = (
    *(case for case in CASES if not case.proj and case.T > 3),
    Case(T=9, B=5, I=3, H=40, hx="tuple", cells=True, bidirectional=True),
    Case(T=7, B=5, I=4, H=70, cells=True, bidirectional=True, hx="tuple", **RAGGED),
    Case(T=6, B=37, I=4, H=67, hx="tuple", cells=True, strided=("x", "weights", "grads")),
    Case(T=17, B=3, I=2, H=33, bidirectional=True, hx="tuple", lengths=(17, 7, 0)),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_parity_of_the_persistent_kernels(case, dtype, persistent, poisoned_empty):
    check(case.to(dtype), persistent)


@pytest.mark.parametrize("persistent", ["A", "B", "D"], indirect=True)
@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_tf32_of_the_persistent_kernels(case, persistent, poisoned_empty):
    check(case, persistent, gpu_support.TF32.rounding("native"))


@pytest.mark.parametrize("persistent", ["A"], indirect=True)
def test_largest_clusters(persistent, poisoned_empty):
    """The max number of CTAs of a cluster, with W_hh partly in shared memory."""
    case = Case(T=4, B=9, I=4, H=500, hx="tuple", cells=True, lengths=(4, 2, 3, 0, 4, 4, 1, 3, 4))
    check(case, persistent, gpu_support.TF32.rounding("native"))


def test_random_cases_of_the_persistent_kernels(persistent, poisoned_empty):
    rng = random.Random(20240229)
    for _ in range(25):
        check(random_case(rng, (torch.float16, torch.bfloat16, torch.float64)), persistent)


def test_persistent_kernels_are_bitwise_deterministic(persistent):
    case = Case(T=20, B=19, I=4, H=40, bidirectional=True, hx="tuple", dtype=torch.bfloat16)
    first, second = run_backend(case, persistent), run_backend(case, persistent)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("persistent", ["D"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_states_are_not_taken_for_empty_words(dtype, persistent):
    """Data flags: a NaN whose bits are all ones, in h0, reaches the results of its row and stalls no other CTA."""
    h0 = torch.zeros(1, 3, 40, dtype=dtype)
    h0.view(torch.int32 if dtype.itemsize == 4 else torch.int16)[0, 1] = -1
    weights = [torch.full(size, 0.01, dtype=dtype) for size in ((160, 2), (160, 40), (160,), (160,))]
    x, layer = torch.ones(9, 3, 2, dtype=dtype), torch.ops.fastlstm_cuda_host.native_layer
    y, *_ = layer(x, h0, None, weights, None, None, False, False)
    assert y[:, 1].isnan().all()
    assert not y[:, ::2].isnan().any()


@pytest.mark.parametrize("persistent", ["D"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_gradients_are_not_taken_for_empty_words(dtype, persistent):
    """Data flags: dy whose bits are all ones makes all four gates' gradients NaN, in float32 with the same bits."""
    weights = [torch.full(size, 0.01, dtype=dtype) for size in ((160, 2), (160, 40), (160,), (160,))]
    x, ops = torch.ones(9, 3, 2, dtype=dtype), torch.ops.fastlstm_cuda_host
    y, h_n, _, cells, reserve = ops.native_layer(x, None, None, weights, None, None, True, True)
    dy = torch.zeros_like(y)
    dy.view(torch.int32 if dtype.itemsize == 4 else torch.int16)[:, 1] = -1
    needs, zeros = [True] * (3 + len(weights)), torch.zeros_like(h_n)
    dx, *_ = ops.native_layer_backward(
        dy, zeros, zeros, None, x, None, None, weights, None, None, y, cells, reserve, needs
    )
    assert dx[:, 1].isnan().all()
    assert not dx[:, ::2].isnan().any()


@pytest.mark.parametrize("launches", [0, 1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=17, B=3, I=2, H=33, bidirectional=True, hx="tuple", cells=True, lengths=(17, 7, 0), dtype=torch.float16),
        Case(T=40, B=3, I=2, H=33, resets=((0, 0), (16, 1), (20, 2)), hx="tuple", dtype=torch.bfloat16),
        Case(T=9, B=3, I=2, H=8, dtype=torch.float16),
    ],
    ids=str,
)
def test_step_kernels_run_if_cooperative_launch_does_not_fit(case, launches, persistent, poisoned_empty):
    """With a green context or MPS a stream may have fewer SMs than the device: the step-wise kernels run instead."""
    torch.ops.fastlstm_cuda_host.launches_left(launches)
    try:
        check(case, persistent)
    finally:
        torch.ops.fastlstm_cuda_host.launches_left(-1)


def test_device_properties_are_queried_once(persistent):
    case = Case(T=6, B=3, I=2, H=24, dtype=torch.bfloat16)
    run_backend(case, persistent)
    asked = torch.ops.fastlstm_cuda_host.occupancy_queries()
    run_backend(case, persistent)
    assert torch.ops.fastlstm_cuda_host.occupancy_queries() == asked > 0


@pytest.mark.parametrize("backend", ["persistent", "step-wise"], indirect=False)
@pytest.mark.parametrize("D", [1, 2])
def test_no_units(D, backend, compiled):
    """hidden_size 0, which modules refuse and the op allows: results are empty."""
    torch.ops.fastlstm_cuda_host.persistent(backend == "persistent", "")
    x = torch.ones(5, 2, 3, dtype=torch.float16)
    weights = [torch.ones(0, 3), torch.ones(0, 0), torch.ones(0), torch.ones(0)] * D
    weights = [w.to(x.dtype) for w in weights]
    results = torch.ops.fastlstm_cuda_host.native_layer(x, None, None, weights, None, None, True, True)
    torch.ops.fastlstm_cuda_host.persistent(False, "")
    y, h_n, c_n, cells, reserve = results
    assert [tuple(t.shape) for t in results] == [(5, 2, 0), (D, 2, 0), (D, 2, 0), (5, 2, 0), (D, 5, 2, 0)]
    needs = [True] * (3 + len(weights))
    dx, *_ = torch.ops.fastlstm_cuda_host.native_layer_backward(
        y, h_n, c_n, None, x, None, None, weights, None, None, y, cells, reserve, needs
    )
    assert not dx.any()


def test_addresses_that_do_not_fit_the_vector_width(backend):
    """Each tensor separately is misaligned by one element: the kernels must fall back to scalar loads."""
    case = Case(T=3, B=2, I=4, H=8, hx="tuple", dtype=torch.float16, lengths=(3, 2))
    expected = run_backend(case, backend)
    for off in ("x", "h0", "c0", *tensors(case).weights, "d output", "d c_n"):
        case_tensors = tensors(case)

        def shifted(t: torch.Tensor, name: str, off: str = off) -> torch.Tensor:
            if name != off:
                return t.detach()
            return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t.detach())

        weights = {name: torch.nn.Parameter(shifted(w, name)) for name, w in case_tensors.weights.items()}
        hx = tuple(shifted(s, name) for s, name in zip(case_tensors.hx, ("h0", "c0"), strict=True))
        output, (h_n, c_n) = case.module(fastlstm.LSTM, weights)(
            shifted(case_tensors.input, "x"), hx, lengths=case_tensors.lengths
        )
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        grads = [shifted(g, f"d {name}") for name, g in zip(results, gradients(case, results), strict=True)]
        collected = torch.autograd.grad(list(results.values()), list(weights.values()), grads)
        results |= {f"d {name}": grad for name, grad in zip(weights, collected, strict=True)}
        for name, got in results.items():
            assert torch.equal(got.detach(), expected[name]), f"{name} with {off} one element off"


def test_results_are_bitwise_deterministic(backend):
    case = Case(T=20, B=3, I=4, H=8, bidirectional=True, hx="tuple", lengths=(20, 3, 11))
    first, second = run_backend(case, backend), run_backend(case, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_does_not_modify_saved_tensors(backend):
    case = Case(T=9, B=3, H=8, bidirectional=True, hx="tuple", proj=4)
    case_tensors = tensors(case)
    output, states = case.module(fastlstm.LSTM, case_tensors.weights)(case_tensors.input, case_tensors.hx)
    leaves = list(case_tensors.grad_leaves().values())
    first = torch.autograd.grad(output.sum() + states[1].sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(output.sum() + states[1].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]], ids=["whole", "lengths"])
def test_h_is_recomputed_if_the_output_was_changed(options, lengths, backend, poisoned_empty):
    lstm, results = fastlstm.LSTM(3, 4, **options), []
    for in_place in (True, False):
        x = torch.linspace(-1, 1, 36).view(4, 3, 3).requires_grad_()
        y = lstm(x, lengths=lengths)[0]
        y = y.tanh_() if in_place else y.tanh()
        results.append(torch.autograd.grad(y.sum(), [x, *lstm.parameters()]))
    torch.testing.assert_close(*results)


def test_bias_gradients_do_not_alias(backend):
    case = Case()
    case_tensors = tensors(case)
    output, _ = case.module(fastlstm.LSTM, case_tensors.weights)(case_tensors.input)
    db_ih, db_hh = torch.autograd.grad(
        output.sum(), [case_tensors.weights["bias_ih_l0"], case_tensors.weights["bias_hh_l0"]]
    )
    assert torch.equal(db_ih, db_hh)
    assert db_ih.data_ptr() != db_hh.data_ptr()


@pytest.mark.parametrize("case", [WITH_CELLS, RAGGED_PROJECTION], ids=str)
def test_reserve_is_fully_written(case, backend, poisoned_empty):
    """Every element of every result is written, padding included; otherwise torch.library.opcheck fails at random."""
    case_tensors = tensors(case)
    D, none = case.directions, (None, None)
    h0, c0 = none if case_tensors.hx is None else (state[:D].detach() for state in case_tensors.hx)
    weights = [w.detach() for w in case_tensors.weights.values()]
    lengths = None if case_tensors.lengths is None else torch.as_tensor(case_tensors.lengths).long()
    layer = torch.ops.fastlstm_cuda_host.native_layer
    results = layer(case_tensors.input.detach(), h0, c0, weights, lengths, case_tensors.reset_mask, True, True)
    assert not any(result.isnan().any() for result in results)


SUM64, SUM32, TF32, ATEN = 70, 68, 77, 0  # cublasComputeType_t, and where ATen multiplies


def layouts(*shape: int) -> list[torch.Tensor]:
    """Layouts of a matrix: dense, transposed, with gaps between rows or columns, with gaps between elements."""
    *batch, rows, columns = shape
    dense = torch.randn(shape)
    wide = torch.randn(*batch, rows, columns + 3)[..., :columns]
    sparse = torch.randn(*batch, rows, 2 * columns)[..., ::2]
    tall = torch.randn(*batch, columns, rows + 2)[..., :rows].mT
    return [dense, torch.randn(*batch, columns, rows).mT, wide, tall, sparse]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "two"])
@pytest.mark.parametrize("sizes", [(5, 3, 4), (1, 3, 4), (5, 1, 4), (5, 3, 1), (1, 1, 1)], ids=str)
def test_products(sizes, batch, dtype, compiled):
    """Every layout of both operands, with float32 and `dtype` outputs, with and without accumulation."""
    M, K, N = sizes
    computes = {torch.float64: SUM64, torch.float32: TF32, torch.float16: SUM32, torch.bfloat16: SUM32}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for a in layouts(*batch, M, K):
        for b in layouts(*batch, K, N):
            a, b = (torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in (a, b))
            for out_dtype in {dtype, wide}:
                for add in (False, True) if out_dtype == dtype else (False,):
                    out = torch.randn(*batch, M, N).to(out_dtype)
                    expected = a.to(wide) @ b.to(wide) + (out.to(wide) if add else 0)
                    how = torch.ops.fastlstm_cuda_host.multiply(out, a, b, add)
                    case = f"strides {a.stride()} and {b.stride()}, {out_dtype} output, add={add}"
                    torch.testing.assert_close(out, expected.to(out_dtype), msg=naming(case))
                    assert how == (ATEN if out_dtype.itemsize == 2 else computes[dtype]), case


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
def test_flags_of_tf32(rnn, matmul, enabled, compiled, monkeypatch):
    """As in nn.LSTM: the RNN flag applies, or the matmul flag if cuDNN is off."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    with Arithmetic(torch.float32, rnn, matmul).flags():
        how = torch.ops.fastlstm_cuda_host.multiply(torch.empty(2, 2), torch.ones(2, 2), torch.ones(2, 2), False)
    assert how == (TF32 if (rnn if enabled else matmul) == "tf32" else SUM32)


def test_products_of_nothing(compiled):
    out = torch.ones(2, 3)
    assert torch.ops.fastlstm_cuda_host.multiply(out, torch.empty(2, 0), torch.empty(0, 3), False) == ATEN
    assert not out.any()
