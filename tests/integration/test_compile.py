"""torch.compile and torch.export of models with fastlstm.LSTM: one graph, equal results, dynamic T and B."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fastlstm

from ..device import TEST_DEVICE
from ..module_pairs import data, flat, naming


class Model(nn.Module):
    """x [T, B, 3] -> [T, B, 2]."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fastlstm.LSTM(3, 4, **{"num_layers": 2, "bidirectional": True, **kwargs}, dtype=TEST_DEVICE.dtype)
        width = (2 if self.lstm.bidirectional else 1) * (self.lstm.proj_size or 4)
        self.head = nn.Linear(width, 2, dtype=TEST_DEVICE.dtype)

    def forward(self, x, hx=None, **kwargs):
        output, (h_n, c_n), *cells = self.lstm(x, hx, **kwargs)
        return self.head(output.tanh()) + h_n.sum() + c_n.mean() + sum(c.sum() for c in cells)


def loss_and_gradients(function, model, *args, **kwargs):
    model.zero_grad()
    x = args[0].detach().requires_grad_()
    out = function(x, *args[1:], **kwargs)
    out.pow(2).sum().backward()
    return [out.detach(), x.grad, *(w.grad.clone() for w in model.parameters())]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


X = data(4, 3, 3)
LENGTHS = torch.tensor([4, 0, 2])
MASK = torch.tensor([[False, True, False], [True, False, False], [False, False, True], [False, False, False]])


def test_one_graph_on_every_backend(backend):
    model = Model(num_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, model, X), loss_and_gradients(model, model, X))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize(
    ("kwargs", "call"),
    [
        pytest.param({}, {"hx": (data(4, 3, 4), data(4, 3, 4, seed=1))}, id="states"),
        pytest.param({}, {"lengths": LENGTHS}, id="lengths"),
        pytest.param({}, {"lengths": [4, 0, 2]}, id="list of lengths"),
        pytest.param({}, {"reset_mask": MASK}, id="resets"),
        pytest.param(
            {"bidirectional": False},
            {"lengths": LENGTHS, "reset_mask": MASK, "return_cell_states": True},
            id="lengths, resets and cell states",
        ),
        pytest.param({"proj_size": 2, "bias": False}, {}, id="projection without bias"),
        pytest.param({"batch_first": True}, {"lengths": torch.tensor([3, 1, 0, 2])}, id="batch_first"),
    ],
)
def test_one_graph_with_every_argument(kwargs, call):
    model = Model(**kwargs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = loss_and_gradients(model, model, X, **call)
    torch.testing.assert_close(loss_and_gradients(compiled, model, X, **call), expected)


def test_inductor(inductor_cache):
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    model = Model()
    compiled = torch.compile(model, fullgraph=True)
    expected = loss_and_gradients(model, model, X, lengths=LENGTHS)
    torch.testing.assert_close(loss_and_gradients(compiled, model, X, lengths=LENGTHS), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("ragged", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_no_recompilation_for_another_t_or_b(ragged, training):
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for T, B in ((6, 7), (9, 7), (6, 5), (11, 2), (2, 13)):  # 3 and 4 would be identified with I and H
        x = data(T, B, 3)
        call = {"lengths": torch.arange(B) % T, "reset_mask": x[..., 0] > 1} if ragged else {}
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, **call), model(x, **call), msg=naming(f"T={T}, B={B}"))
            continue
        expected = loss_and_gradients(model, model, x, **call)
        got = loss_and_gradients(compiled, model, x, **call)
        torch.testing.assert_close(got, expected, msg=naming(f"T={T}, B={B}"))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kwargs", [{}, {"lengths": LENGTHS, "return_cell_states": True}], ids=["plain", "everything"])
def test_compiled_autograd(kwargs, backend):
    if backend == "reference":
        pytest.skip("has no autograd node of its own")
    model = Model(bidirectional=False)
    expected = loss_and_gradients(model, model, X, **kwargs)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = loss_and_gradients(model, model, X, **kwargs)
    torch.testing.assert_close(got, expected)


def test_no_recompilation_after_a_step_of_the_optimizer():
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-4), []
    for _ in range(3):
        loss = compiled(X).pow(2).sum()
        torch.testing.assert_close(loss, model(X).pow(2).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_graph_has_one_op_per_layer():
    counter = CompileCounterWithBackend("eager")
    torch.compile(Model(), backend=counter, fullgraph=True)(X)
    names = [str(node.target) for node in counter.graphs[0].graph.nodes if "fastlstm" in str(node.target)]
    assert len(names) == 2, names  # independent of T


def test_dropout_and_eval_mode_compile():
    model = Model(dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(X), compiled(X))
    model.eval()
    torch.testing.assert_close(compiled(X), model(X))


def test_lengths_out_of_range_raise_in_a_compiled_graph(backend):
    model = Model(num_layers=1, bidirectional=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises((RuntimeError, ValueError), match="lengths must lie in"):
        compiled(X, lengths=torch.tensor([4, 9, 2]))


def test_cell():
    cell = fastlstm.LSTMCell(3, 4, dtype=TEST_DEVICE.dtype)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    hx = (data(3, 4), data(3, 4, seed=1))
    for case, args in {"without states": (X[0],), "with states": (X[0], hx)}.items():
        results = []
        for function in (compiled, cell):
            h, c = function(*args)
            results.append([h, c, *torch.autograd.grad((h * c).sum(), list(cell.parameters()))])
        torch.testing.assert_close(*results, msg=naming(case))


def test_converted_model_compiles():
    model = nn.ModuleList([nn.LSTM(3, 4, dtype=TEST_DEVICE.dtype)])
    expected = model[0](X)
    compiled = torch.compile(fastlstm.convert(model)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(flat(compiled(X)), flat(expected))


@pytest.mark.parametrize("ragged", [False, True])
def test_export_with_dynamic_t_and_b(ragged):
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x, lengths):
            return self.model(x, lengths=lengths if ragged else None)

    caller = Caller()
    T, B = Dim("T", min=2, max=1000), Dim("B", min=2, max=1000)
    program = export(caller, (X, LENGTHS), dynamic_shapes={"x": {0: T, 1: B}, "lengths": {0: B}})
    assert sum("fastlstm" in str(node.target) for node in program.graph.nodes) == 2
    for T_run, B_run in ((4, 3), (9, 2), (30, 5)):
        x, lengths = data(T_run, B_run, 3), torch.arange(B_run)
        case = f"T={T_run}, B={B_run}"
        torch.testing.assert_close(program.module()(x, lengths), caller(x, lengths), msg=naming(case))


@pytest.mark.parametrize("ragged", [False, True])
def test_one_compilation_covers_training_at_every_t_and_b(ragged):
    """Counts graphs that reach the compiler, forward and backward; `error_on_recompile` checks Dynamo's guards only."""
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(num_layers=1)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for T, B in ((6, 7), (9, 5), (40, 2), (2, 13)):
        x = data(T, B, 3)
        loss_and_gradients(compiled, model, x, **({"lengths": torch.arange(B) % T} if ragged else {}))
        assert counter.frame_count == 1, (T, B)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("option", ["none", "hx", "lengths", "reset_mask", "recompute"])
def test_symbolic_sizes_stay_symbolic_outside_a_compiler(option, grad, backend):
    """As under make_fx and aot_function, where Python sees symbols that must not be specialized."""
    if backend == "reference":
        pytest.skip("the reference unrolls the loop over T")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(
        torch.empty(5, 6, 3, dtype=TEST_DEVICE.dtype, device=TEST_DEVICE.device), symbolic_context=free
    )
    with mode, torch.set_grad_enabled(grad):
        lstm = fastlstm.LSTM(3, 4, dtype=TEST_DEVICE.dtype, device=TEST_DEVICE.device)
        T, B = x.shape[:2]
        kwargs = {
            "hx": {"hx": (x.new_zeros(1, B, 4), x.new_zeros(1, B, 4))},
            "lengths": {"lengths": x.new_zeros(B, dtype=torch.int64)},
            "reset_mask": {"reset_mask": x.new_zeros(T, B, dtype=torch.bool)},
        }.get(option, {})
        lstm.recompute = 2 if option == "recompute" else False
        output, (h_n, _) = lstm(x, **kwargs)
    assert output.shape == (*x.shape[:2], 4)
    assert h_n.shape == (1, x.shape[1], 4)
    assert not mode.shape_env.guards


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_weights_with_symbolic_sizes(ragged, backend):
    """functorch's aot_function traces once for all sizes, those of weights included."""
    if backend == "reference":
        pytest.skip("the reference unrolls the loop over T")
    lstm = fastlstm.LSTM(3, 4, dtype=TEST_DEVICE.dtype, device=TEST_DEVICE.device)
    graphs = []

    def run(x, lengths, *weights):
        return fastlstm.functional.lstm(
            x, None, weights, True, 1, 0.0, True, False, False, lengths=lengths if ragged else None
        )[0]

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    traced = aot_function(run, fw_compiler=keep, bw_compiler=keep, dynamic=True)
    for T, B in ((5, 6), (7, 9)):
        x = data(T, B, 3).requires_grad_()
        lengths = torch.arange(B, device=TEST_DEVICE.device) % T
        expected = lstm(x, **({"lengths": lengths} if ragged else {}))[0]
        output = traced(x, lengths, *lstm.parameters())
        torch.testing.assert_close(output, expected, msg=naming(f"T={T}, B={B}"))
        inputs = [x, *lstm.parameters()]
        grads = [torch.autograd.grad(out.sum(), inputs) for out in (output, expected)]
        torch.testing.assert_close(*grads, msg=naming(f"T={T}, B={B}"))
    assert len(graphs) == 2


def test_compile_time_does_not_grow_with_t():
    """The graph of a long sequence is that of a short one: nothing is unrolled."""
    sizes = []
    for T in (4, 2048):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        torch.compile(Model(), backend=counter, fullgraph=True)(data(T, 2, 3))
        sizes.append(len(counter.graphs[0].graph.nodes))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path):
    """A .pt2 package of AOTInductor; the process that loads it needs `import fastlstm` for the ops."""
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    model = Model().eval()
    T, B = Dim("T", min=2, max=1000), Dim("B", min=2, max=1000)
    with torch.no_grad():
        program = export(model, (X,), dynamic_shapes={"x": {0: T, 1: B}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for T_run, B_run in ((4, 3), (17, 5)):
        x = data(T_run, B_run, 3)
        torch.testing.assert_close(loaded(x), model(x), msg=naming(f"T={T_run}, B={B_run}"))


class Plain(nn.Module):
    """x [B, T, 3] -> [B, T, 2]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fastlstm.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.filterwarnings("ignore")
def test_onnx_through_nn_lstm(tmp_path):
    """torch's exporter maps nn.LSTM to ONNX's LSTM operator; it has no mapping for fastlstm's ops."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x, path = Plain().eval(), data(2, 5, 3).float(), tmp_path / "model.onnx"
    expected = model(x)
    exported = fastlstm.convert(copy.deepcopy(model), to="torch")
    torch.onnx.export(exported, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "B", 1: "T"}})
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
    longer = data(3, 9, 3).float()
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": longer.numpy()})[0]), model(longer))
