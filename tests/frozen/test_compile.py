"""torch.compile, torch.export and AOTInductor of frozen modules: one graph, equal results, dynamic T and B."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

import fastlstm

from ..module_pairs import naming
from .forms import FORMS, NO_EXTENSION, WEIGHTS

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

EACH_FORM = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


class Model(nn.Module):
    """x [T, B, 3] -> [B, 5], both classes between other layers."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 6, 2, bidirectional=True, **kwargs)
        self.cell = nn.LSTMCell(12, 5)
        self.head = nn.Linear(5, 5)

    def forward(self, x, hx=None, lengths=None, reset_mask=None):
        options = {"lengths": lengths, "reset_mask": reset_mask, "return_cell_states": lengths is not None}
        output, (h_n, c_n), *cells = self.lstm(x, hx, **options)
        h, c = self.cell(output[-1].tanh())
        return self.head(h + c) + h_n.sum() + c_n.mean() + sum(c.sum() for c in cells)


def frozen(weights: torch.dtype | None, **kwargs) -> Model:
    return fastlstm.freeze(Model(**kwargs), weights).requires_grad_(False)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


X, STATE = torch.randn(4, 2, 3), torch.randn(4, 2, 6)
CALLS = {
    "plain": {},
    "hx": {"hx": (STATE, STATE)},
    "lengths": {"lengths": torch.tensor([4, 0])},
    "list of lengths": {"lengths": [1, 3]},
    "resets": {"reset_mask": torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]).bool()},
}


@EACH_FORM
def test_one_graph(weights):
    """One op per layer and per cell; nothing but them and the other layers."""
    model = frozen(weights)
    for name, call in CALLS.items() if weights == torch.int8 else [("plain", {})]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(X, **call), model(X, **call), rtol=0, atol=0, msg=naming(name))
        names = [str(node.target) for node in counter.graphs[0].graph.nodes if "fastlstm" in str(node.target)]
        assert names == ["fastlstm.frozen_layer.default"] * 3, (name, names)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_no_recompilation_for_another_t_or_b(ragged):
    model = frozen(torch.int8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for T, B in ((6, 7), (9, 7), (8, 4), (2, 13)):
        x = torch.randn(T, B, 3)
        call = {"lengths": torch.arange(B) % T, "reset_mask": x[..., 0] > 1} if ragged else {}
        torch.testing.assert_close(compiled(x, **call), model(x, **call), rtol=0, atol=0, msg=naming(f"T={T}, B={B}"))


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_gradient_raises_where_it_is_compiled():
    """AOTAutograd traces backward with forward, so that the error of backward comes at the first call."""
    model, x = frozen(torch.int8), X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"a frozen LSTM has no gradient: call it under torch\.no_grad"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert not output.requires_grad
    assert torch.equal(output, model(X))


def test_export_with_dynamic_t_and_b():
    """In memory and from a file; test_isa.py exports every form."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = frozen(torch.int8)

        def forward(self, x, lengths):
            return self.model(x, lengths=lengths)

    caller, file = Caller(), io.BytesIO()
    T, B = Dim("T", min=2, max=1000), Dim("B", min=2, max=1000)
    program = export(caller, (X, torch.tensor([4, 0])), dynamic_shapes={"x": {0: T, 1: B}, "lengths": {0: B}})
    assert sum("fastlstm.frozen_layer" in str(node.target) for node in program.graph.nodes) == 3
    torch.export.save(program, file)
    file.seek(0)
    programs = {"exported": program, "decomposed": program.run_decompositions(), "loaded": torch.export.load(file)}
    for name, found in programs.items():
        for T_run, B_run in ((4, 3), (9, 2), (30, 5)):
            x, lengths = torch.randn(T_run, B_run, 3), torch.arange(B_run)
            case = naming(f"{name}, T={T_run}, B={B_run}")
            torch.testing.assert_close(found.module()(x, lengths), caller(x, lengths), rtol=0, atol=0, msg=case)


@pytest.mark.slow
@EACH_FORM
def test_inductor_and_ahead_of_time_package(weights, tmp_path, monkeypatch):
    """torch.compile, and a .pt2 package of AOTInductor."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    model = frozen(weights).eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(X), model(X))
    T, B = Dim("T", min=2, max=1000), Dim("B", min=2, max=1000)
    with torch.no_grad():
        program = export(model, (X,), dynamic_shapes={"x": {0: T, 1: B}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for T_run, B_run in ((4, 3), (17, 5)):
        x = torch.randn(T_run, B_run, 3)
        torch.testing.assert_close(loaded(x), model(x), msg=naming(f"T={T_run}, B={B_run}"))


@pytest.mark.parametrize("form", ["float64", "int8"])
def test_opcheck(form):
    """Schema, fake kernel, autograd key and AOTAutograd with dynamic sizes, of every kind of argument."""
    dtype, weights = FORMS[form]
    kinds = {}
    for proj, D in ((0, 1), (7, 2)):
        module = fastlstm.freeze(fastlstm.LSTM(8, 16, bidirectional=D == 2, proj_size=proj, dtype=dtype), weights)
        P = proj or 16
        packed, sizes, x = module.packed_l0, [16, P, D], torch.randn(5, 3, 8).to(dtype)
        h0, c0 = torch.randn(D, 3, P).to(dtype), torch.randn(D, 3, 16).to(dtype)
        lengths, mask = torch.tensor([5, 0, 2]), torch.rand(5, 3) > 0.5
        name = f"P={P}, D={D}"
        kinds[f"{name}, plain"] = (x, None, None, packed, sizes, None, None, False)
        kinds[f"{name}, everything"] = (x, h0, c0, packed, sizes, lengths, mask, True)
        kinds[f"{name}, packed rows"] = (x.view(-1, 8)[:8], h0, c0, packed, sizes, torch.tensor([4, 3, 1]), None, True)
        kinds[f"{name}, no rows"] = (x[:, :0], None, None, packed, sizes, None, None, False)
    for name, arguments in kinds.items():
        found = torch.library.opcheck(torch.ops.fastlstm.frozen_layer.default, arguments, raise_exception=False)
        assert set(found.values()) == {"SUCCESS"}, (name, found)


@EACH_FORM
def test_fake_tensors(weights):
    """Shapes, dtypes and strides are those of a run; sizes that are symbols stay symbols."""
    model = frozen(weights)
    for name, call in CALLS.items():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tree_map_only(torch.Tensor, mode.from_tensor, call)
            found = model(mode.from_tensor(X), **fake)
        expected = model(X, **call)
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride()), name
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.empty(5, 6, 3), symbolic_context=free)
    with mode, torch.no_grad():
        output, (h_n, _) = model.lstm(x)
    assert output.shape == (*x.shape[:2], 12)
    assert h_n.shape == (4, x.shape[1], 6)
    assert not mode.shape_env.guards


def test_freeze_under_fake_tensors_changes_nothing():
    with FakeTensorMode():
        model = nn.Sequential(nn.LSTM(3, 4))
        with pytest.raises(RuntimeError, match="data is not allocated"):
            fastlstm.freeze(model)
        assert type(model[0]) is nn.LSTM
        assert len(list(model.parameters())) == 4


@EACH_FORM
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_compiled_for_a_gradient(weights):
    """The compiler asks for a gradient before the first call: the message says that there is none, and what to do."""
    compiled = torch.compile(frozen(weights), backend="aot_eager")
    x = X.clone().requires_grad_()
    with pytest.raises(BackendCompilerFailed, match=r"a frozen LSTM has no gradient: call it under torch\.no_grad\(\)"):
        compiled(x)
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with mode():
            torch.testing.assert_close(compiled(x), frozen(weights)(x), rtol=0, atol=0, msg=naming(mode))
