"""torch.jit.trace: the recorded graph is independent of grad mode and of the lengths while tracing."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastlstm

from ..module_pairs import assert_same, data, flat, module_pair, naming

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# The reference's loop over steps is unrolled, so its trace supports one T only.
on_ops = pytest.mark.parametrize("backend", ["native", "eager"], indirect=True)
MODES = {"grad": nullcontext, "no_grad": torch.no_grad}


class Packed(nn.Module):
    """x [B, T, 3], lengths [B] -> padded output, final states."""

    def __init__(self, lstm: nn.Module, enforce_sorted: bool) -> None:
        super().__init__()
        self.lstm, self.enforce_sorted = lstm, enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        output, (h_n, c_n) = self.lstm(packed)
        return pad_packed_sequence(output, batch_first=True)[0], h_n, c_n


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    return data(len(lengths), max(lengths), 3), torch.tensor(lengths)


def trace(module: nn.Module, args: tuple, mode: str, **kwargs):
    with MODES[mode]():
        return torch.jit.trace(module, args, **kwargs)


@on_ops
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "any_order"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2, "bias": False}, {"recompute": 2}], ids=str
)
def test_trace_with_packed_input_supports_other_lengths(kwargs, enforce_sorted, mode, backend):
    """Equal and other sums of lengths, more and fewer rows and steps than while tracing."""
    kwargs = dict(kwargs)
    recompute = kwargs.pop("recompute", False)
    pair = module_pair(**kwargs, batch_first=True)
    pair[0].recompute = recompute
    if recompute and mode == "grad":
        pytest.skip("one of the modes is enough")
    ours, theirs = (Packed(lstm, enforce_sorted) for lstm in pair)
    first = batch(5, 3, 2) if enforce_sorted else batch(3, 5, 2)
    traced, yours = (trace(module, first, mode) for module in (ours, theirs))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    others = [(4, 3, 2, 1), (5, 3, 2), (7,), (2, 2), (6, 5, 4, 4, 1)]
    for lengths in others if enforce_sorted else [*others, (1, 4, 2), (2, 3, 5)]:
        for which, mine in {"traced": traced, "loaded": loaded}.items():
            assert_same(mine, yours, *batch(*lengths), case=f"{which}, lengths {lengths}")
        with torch.no_grad():
            torch.testing.assert_close(traced(*batch(*lengths)), theirs(*batch(*lengths)), msg=naming(lengths))


@on_ops
def test_trace_with_packed_input_draws_nn_lstms_dropout(backend):
    ours, theirs = (Packed(lstm, True) for lstm in module_pair(num_layers=2, dropout=0.5, batch_first=True))
    traced, yours = (trace(m, batch(5, 3, 2), "grad", check_trace=False) for m in (ours, theirs))
    results = []
    for module in (traced, yours):
        torch.manual_seed(3)
        results.append(module(*batch(6, 4, 4, 1)))
    torch.testing.assert_close(*results)


class Options(nn.Module):
    """A layer called with arguments that nn.LSTM does not have."""

    def __init__(self, lstm: nn.Module, **kwargs: bool) -> None:
        super().__init__()
        self.lstm, self.wanted = lstm, kwargs

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor, reset_mask: Tensor):
        options = {"lengths": lengths, "reset_mask": reset_mask, "return_cell_states": True}
        return self.lstm(x, (h0, c0), **{name: value for name, value in options.items() if self.wanted.get(name)})


def arguments(T: int, B: int) -> tuple[Tensor, ...]:
    x = data(T, B, 3)
    return x, data(2, B, 4, seed=1), data(2, B, 4, seed=2), torch.arange(B) % T + 1, x[..., 0] > 0.5


@on_ops
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recompute", [False, 2])
@pytest.mark.parametrize(
    "wanted", [(), ("lengths",), ("reset_mask",), ("lengths", "reset_mask", "return_cell_states")], ids=str
)
def test_trace_equals_the_module(wanted, recompute, mode, backend):
    """For other T and B than while tracing, under no_grad and in training."""
    lstm, _ = module_pair(bidirectional=True)
    lstm.recompute = recompute
    module = Options(lstm, **dict.fromkeys(wanted, True))
    traced = trace(module, arguments(5, 3), mode)
    for T, B in ((5, 3), (2, 6), (9, 1), (1, 2)):
        case = f"T={T}, B={B}"
        assert_same(traced, module, *arguments(T, B), case=case)
        with torch.no_grad():
            torch.testing.assert_close(traced(*arguments(T, B)), module(*arguments(T, B)), msg=naming(case))


class Steps(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor):
        hx, outputs = None, []
        for step in x.unbind(0):
            hx = self.cell(step, hx)
            outputs.append(hx[0])
        return torch.stack(outputs), hx[1]


@on_ops
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}], ids=str)
def test_loop_of_cells(kwargs, mode, backend):
    ours, theirs = (Steps(cell) for cell in module_pair(cell=True, **kwargs))
    traced = trace(ours, (data(4, 3, 3),), mode)
    for B in (3, 5):
        assert_same(traced, theirs, data(4, B, 3), case=f"B={B}")
        with torch.no_grad():
            torch.testing.assert_close(traced(data(4, B, 3)), theirs(data(4, B, 3)), msg=naming(f"B={B}"))


@on_ops
@pytest.mark.parametrize("packed", [False, True])
def test_graph_is_independent_of_grad_mode(packed, backend):
    lstm, _ = module_pair(num_layers=2, batch_first=True)
    module, args = (Packed(lstm, True), batch(3, 2)) if packed else (lstm, (data(2, 3, 3),))
    graphs = []
    for mode, frozen in (("grad", False), ("no_grad", False), ("grad", True)):
        lstm.requires_grad_(not frozen)
        graph = str(trace(module, args, mode).inlined_graph)
        graphs.append(re.sub(r"__torch__[\w.]*|Double\([^()]*\)", "", graph))  # names, and the sizes of the reserve
    assert graphs[0] == graphs[1] == graphs[2]


@on_ops
def test_add_graph_of_tensorboard(backend):
    """torch.utils.tensorboard.SummaryWriter.add_graph calls this and iterates over the graph."""
    ours, _ = module_pair(num_layers=2)
    traced = torch.jit.trace(ours, data(4, 2, 3), strict=False)
    graph = traced.graph
    torch._C._jit_pass_inline(graph)
    assert "fastlstm" in str(graph)


@on_ops
@pytest.mark.parametrize("recompute", [False, 2])
def test_inference_on_a_trace_keeps_no_reserve(recompute, backend):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            if "fastlstm" in str(function):
                kept.append(sum(t.numel() for t in flat(results)[4 if not recompute else 3 :]))
            return results

    ours, _ = module_pair()
    ours.recompute = recompute
    traced, kept = trace(ours, (data(4, 2, 3),), "grad"), []
    with torch.no_grad(), Record():
        traced(data(4, 2, 3))
    assert kept == [0]


def in_a_fresh_process(*lines: str) -> str:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_loading_a_trace_requires_importing_fastlstm(tmp_path):
    """The import registers the ops of a saved trace or program; without it the errors are those in the README."""
    lstm, x = fastlstm.LSTM(3, 4).eval(), data(5, 2, 3).float()
    torch.jit.trace(lstm, (x,)).save(tmp_path / "trace.pt")
    torch.export.save(torch.export.export(lstm, (x,)), tmp_path / "program.pt2")
    torch.save((x, lstm(x)[0].detach()), tmp_path / "expected.pt")
    trace = f"torch.jit.load({str(tmp_path / 'trace.pt')!r})"
    program = f"torch.export.load({str(tmp_path / 'program.pt2')!r}).module()"
    in_a_fresh_process(
        "import torch, fastlstm",
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})",
        *(f"torch.testing.assert_close({load}(x)[0], y)" for load in (trace, program)),
    )
    attempt = "try: {}\nexcept RuntimeError as error: print(error)"
    printed = in_a_fresh_process("import torch", attempt.format(trace), attempt.format(program))
    assert "Unknown builtin op: fastlstm::" in printed
    assert "error when deserializing" in printed
    assert "_layer.default" in printed
