"""Frozen modules where they run: gradients asked for, transforms, threads, processes, modes of torch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastlstm

from ..cpu.test_threads import together
from ..module_pairs import naming
from .forms import FORMS, NO_EXTENSION, WEIGHTS

pytestmark = pytest.mark.skipif(**NO_EXTENSION)

ROOT = Path(__file__).parents[2]
EACH_FORM = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
X, STATE, CELL_STATE = torch.randn(5, 3, 8), torch.randn(2, 3, 16), torch.randn(3, 16)
NO_GRADIENT = r"a frozen LSTM has no gradient: call it under torch\.no_grad\(\), or make it trainable by fastlstm\.thaw"


def lstm(weights: torch.dtype | None, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return fastlstm.freeze(fastlstm.LSTM(8, 16, bidirectional=True, **kwargs), weights)


def cell(weights: torch.dtype | None) -> nn.Module:
    torch.manual_seed(0)
    return fastlstm.freeze(fastlstm.LSTMCell(8, 16), weights)


def calls(weights: torch.dtype | None):
    """Calls by name, each of x, h0 and c0; the fast paths and the general ones."""
    module, step = lstm(weights), cell(weights)
    return {
        "lstm": lambda x, h, c: module(x, (h, c))[0],
        "last state": lambda x, h, c: module(x, (h, c))[1][1],
        "lengths": lambda x, h, c: module(x, (h, c), lengths=[5, 0, 3])[0],
        "cell states": lambda x, h, c: module(x, (h, c), return_cell_states=True)[2],
        "unbatched": lambda x, h, c: module(x[:, 0], (h[:, 0], c[:, 0]))[0],
        "cell": lambda x, h, c: step(x[0], (h[0], c[0]))[0],
        "unbatched cell": lambda x, h, c: step(x[0, 0], (h[0, 0], c[0, 0]))[1],
    }


@EACH_FORM
def test_gradient(weights):
    """The forward pass of an input that requires a gradient runs; backward raises. Without, there is no graph."""
    for name, call in calls(weights).items():
        expected = call(X, STATE, STATE)
        assert not expected.requires_grad, name
        for wanted in range(3):
            inputs = [t.clone().requires_grad_(k == wanted) for k, t in enumerate((X, STATE, STATE))]
            output = call(*inputs)
            case = f"{name}, gradient of argument {wanted}"
            torch.testing.assert_close(output.detach(), expected, rtol=0, atol=0, msg=naming(case))
            assert output.requires_grad, case
            with pytest.raises(RuntimeError, match=NO_GRADIENT):
                output.sum().backward()
            with pytest.raises(RuntimeError, match=NO_GRADIENT):
                torch.autograd.grad(call(*inputs).sum(), inputs[wanted])
            assert inputs[wanted].grad is None, case
            with torch.no_grad():
                assert not call(*inputs).requires_grad, case
            with torch.inference_mode():
                assert call(*inputs).is_inference(), case


def test_other_branches_of_a_loss_have_gradients():
    """A frozen encoder's output is constant where its input needs no gradient."""
    head, module = nn.Linear(32, 2), lstm(torch.int8)
    head(module(X)[0]).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    x = X.clone().requires_grad_()
    (head(module(x.detach())[0]).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@EACH_FORM
def test_derivative_forward(weights):
    """A tangent must not be lost: forward-mode AD raises, of any argument, and by torch.func."""
    for name, call in calls(weights).items():
        for wanted in range(3):
            arguments = [X, STATE, STATE]
            with forward_ad.dual_level():
                arguments[wanted] = forward_ad.make_dual(arguments[wanted], torch.ones_like(arguments[wanted]))
                with pytest.raises(RuntimeError, match="a frozen LSTM has no derivative"):
                    pytest.fail(f"{name}, argument {wanted}: {forward_ad.unpack_dual(call(*arguments)).tangent}")
        with pytest.raises(RuntimeError, match="a frozen LSTM has no derivative"):
            pytest.fail(f"{name}: {torch.func.jvp(lambda x, call=call: call(x, STATE, STATE), (X,), (X,))[1]}")
        assert call(X, STATE, STATE).isfinite().all(), name


@EACH_FORM
def test_gradient_by_torch_func(weights):
    for name, call in calls(weights).items():
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            with pytest.raises(RuntimeError, match=r"a frozen LSTM has no (gradient|derivative): .*thaw"):
                pytest.fail(f"{name}: {transform(lambda x, call=call: call(x, STATE, STATE).sum())(X)}")
        for wanted in (1, 2):
            with pytest.raises(RuntimeError, match=r"a frozen LSTM has no gradient: torch\.func"):
                torch.func.grad(lambda *args, call=call: call(*args).sum(), wanted)(X, STATE, STATE)
        if name != "lengths":
            of_each = torch.func.grad(lambda x, call=call: call(x, STATE, STATE).sum())
            with pytest.raises(RuntimeError, match=r"a frozen LSTM has no gradient: torch\.func"):
                torch.func.vmap(of_each)(torch.stack([X, X]))
    # Of what is not the frozen module's input there is one.
    module = lstm(weights)
    for constant in (lambda: X, lambda: X * 1):
        grad = torch.func.grad(lambda w, x=constant: (module(x())[0] @ w).sum())(torch.ones(32))
        torch.testing.assert_close(grad, module(X)[0].sum((0, 1)))


@EACH_FORM
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(weights):
    """Equals a loop, over any argument and dimension."""
    xs, states = torch.stack([X, 2 * X, X - 1]), torch.stack([STATE, -STATE, STATE * 0])
    for name, call in calls(weights).items():
        for dims in ((0, None, None), (None, 0, None), (0, 0, 0), (1, None, 0)):
            of_x = xs.transpose(0, 1) if dims[0] == 1 else xs
            arguments = [t if d is not None else t[0] for t, d in zip((of_x, states, states), dims, strict=True)]
            expected = torch.stack(
                [
                    call(*(t if d is None else t.select(d, k) for t, d in zip(arguments, dims, strict=True)))
                    for k in range(3)
                ]
            )
            found = torch.func.vmap(call, dims)(*arguments)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=naming(f"{name}, {dims}"))
    module, lengths = lstm(weights), torch.tensor([[5, 0, 1], [2, 3, 4]])
    found = torch.func.vmap(lambda n: module(X, lengths=n)[0])(lengths)
    expected = torch.stack([module(X, lengths=n)[0] for n in lengths])
    assert torch.equal(found, expected)


@EACH_FORM
def test_flop_counter(weights):
    """As for the unfrozen module."""
    calls = {
        "plain": (X, {}),
        "lengths": (X, {"lengths": [5, 0, 2]}),
        "packed": (nn.utils.rnn.pack_padded_sequence(X, torch.tensor([5, 4, 1])), {}),
        "unbatched": (X[:, 0], {}),
    }
    for kwargs in ({}, {"num_layers": 2, "proj_size": 5}):
        for name, (x, options) in calls.items():
            flops = []
            for module in (fastlstm.LSTM(8, 16, bidirectional=True, **kwargs), lstm(weights, **kwargs)):
                with FlopCounterMode(display=False) as counter:
                    module(x, **options)
                flops.append(counter.get_total_flops())
            assert flops[0] == flops[1] > 0, (name, kwargs)


def test_functional_call():
    module = lstm(None)
    assert torch.equal(torch.func.functional_call(module, {}, (X,))[0], module(X)[0])


@EACH_FORM
def test_inference_mode_and_inference_tensors(weights):
    module = lstm(weights)
    expected = module(X)[0]
    with torch.inference_mode():
        inside = X.clone()
        torch.testing.assert_close(module(inside)[0].clone(), expected, rtol=0, atol=0)
        made_inside = fastlstm.freeze(fastlstm.LSTM(8, 16, bidirectional=True), weights)
    assert torch.equal(module(inside)[0], expected)
    made_inside.load_state_dict(module.state_dict())
    assert torch.equal(made_inside(X)[0], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_with_a_state_each(form, threads):
    """Eight streams of single steps on one module, which another thread copies meanwhile."""
    dtype, weights = FORMS[form]
    torch.manual_seed(0)
    module = fastlstm.freeze(fastlstm.LSTM(5, 33, 2, proj_size=17, dtype=dtype), weights)
    step = fastlstm.freeze(fastlstm.LSTMCell(5, 33, dtype=dtype), weights)
    inputs = torch.randn(8, 20, 1, 5).to(dtype)

    def stream(x):
        outputs, state, cell_state = [], None, None
        for row in x:
            output, state = module(row[None], state)
            cell_state = step(row, cell_state)
            outputs.append(torch.cat([output[0], cell_state[0]], 1))
        return torch.cat(outputs)

    expected = [stream(x) for x in inputs]

    def work(k):
        if k == 8:
            for _ in range(20):
                module.state_dict()
            return
        for _ in range(3):
            assert torch.equal(stream(inputs[k]), expected[k]), k

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together(9, work)
    finally:
        torch.set_num_threads(before)


PROCESSES = """
import sys, torch, fastlstm
from torch import multiprocessing

def run(module, x, queue):
    queue.put([bytes(module(x)[0].numpy()), [b.is_shared() for b in module.buffers()]])

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, x = fastlstm.freeze(fastlstm.LSTM(8, 16, 2), torch.int8), torch.randn(5, 3, 8)
    expected = bytes(module(x)[0].numpy())
    module.share_memory()
    assert all(b.is_shared() for b in module.buffers())
    for method in sys.argv[1:]:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=run, args=(module, x, queue))
        worker.start()
        output, shared = queue.get(timeout=100)
        worker.join()
        assert worker.exitcode == 0 and output == expected, method
        assert all(shared), method  # one copy of the weights for all
"""


def test_worker_processes(tmp_path):
    methods = [name for name in ("fork", "spawn") if name in torch.multiprocessing.get_all_start_methods()]
    (tmp_path / "processes.py").write_text(PROCESSES)
    command = [sys.executable, str(tmp_path / "processes.py"), *methods]
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr


@EACH_FORM
@pytest.mark.filterwarnings("ignore")
def test_trace(weights):
    """torch.jit.trace, saved and loaded, for other T and B."""
    module, file = lstm(weights, num_layers=2), io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (X,)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for T, B in ((5, 3), (9, 2)):
        x = torch.randn(T, B, 8)
        torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0, msg=naming(f"T={T}, B={B}"))
