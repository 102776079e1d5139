"""The correctness gate of the benchmarks: the right is timed, the wrong refused, for every implementation."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

for package in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import machine, peers, rivals, run
from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.gate import expected, judge, precision
from benchmarks.measure import Plan
from benchmarks.programs import build_program
from benchmarks.results import Row
from fastlstm import reference

HASTY = Plan(budget=0.0, min_rounds=1, min_sample=0.0, warm_up=0.0)
KINDS = [
    Case(5, 3, 4, 6),
    Case(5, 3, 4, 6, 2, bidirectional=True),
    Case(4, 2, 3, 6, proj=2),
    Case(1, 2, 4, 6, kind="stream"),
    Case(6, 3, 4, 5, 2, kind="cells"),
    Case(7, 4, 3, 5, kind="packed", ragged="random"),
    Case(6, 3, 4, 6, dtype="float64"),
    Case(6, 3, 4, 6, dtype="bfloat16"),
]


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
    """The machine's limit is measured at every case; its size is no matter here."""
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 64)


def name(case: Case) -> str:
    return case.name


class LoopOfReference(nn.LSTM):
    """nn.LSTM's surface over fastlstm.reference; `bend` is where tests make it wrong."""

    def bend(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def forward(self, x, hx=None):
        h_n, c_n = [], []
        D = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            own = [w for weights in self.all_weights[layer * D : (layer + 1) * D] for w in weights]
            at = slice(layer * D, (layer + 1) * D)
            x, h, c, _ = reference.layer(x, *((None, None) if hx is None else (hx[0][at], hx[1][at])), own)
            h_n.append(h)
            c_n.append(c)
        return self.bend(x), (torch.cat(h_n), torch.cat(c_n))


class SlightlyWrong(LoopOfReference):
    def bend(self, output):
        return output * (1 + 1e-4)


class Diverging(LoopOfReference):
    def bend(self, output):
        return output * float("nan")


class ForgetsGradients(LoopOfReference):
    """Right going forward; its gradients are a hundredth too large."""

    def bend(self, output):
        return output + 0.01 * (output - output.detach())


def peer(lstm: type) -> peers.Peer:
    return peers.Peer(lambda case, inputs: build_program(case, inputs, lstm, nn.LSTMCell), ours=True)


def measured(case: Case, lstm: type) -> dict[tuple[str, str], Row]:
    suite = run.Suite("test", [case], plan=HASTY, attempts=1)
    both = {"nn": peers.PEERS["nn"], "fastlstm": peer(lstm)}
    return {(row.impl, row.mode): row for row in run.run_suite(suite, both)}


@pytest.mark.parametrize("case", KINDS, ids=name)
def test_every_kind_of_case_passes_with_every_backend_that_runs_here(case):
    ours = {impl: one for impl, one in peers.PEERS.items() if (one.ours and not one.missing("cpu")) or impl == "nn"}
    for impl, found in run.judge_all(case, "cpu", ours).items():
        for mode in MODES:
            assert found.status(mode) == "ok" or found.status(mode).startswith("skipped"), (impl, found.status(mode))


@pytest.mark.parametrize("lstm", [SlightlyWrong, Diverging])
def test_a_wrong_output_is_refused_without_a_time(lstm):
    rows = measured(Case(5, 3, 4, 6), lstm)
    for mode in MODES:
        assert rows["nn", mode].p50_ms > 0
        refused = rows["fastlstm", mode]
        assert refused.status.startswith("WRONG: ")
        assert refused.p50_ms is refused.ratio is refused.fraction is None
        assert not refused.error <= refused.error_allowed
    assert len(run.failures(list(rows.values()), {"fastlstm": peer(lstm), "nn": peers.PEERS["nn"]})) == 2


def test_wrong_gradients_are_refused_in_training_alone():
    rows = measured(Case(5, 3, 4, 6), ForgetsGradients)
    assert rows["fastlstm", "train"].status.startswith("WRONG: d_")
    assert rows["fastlstm", "forward"].status == "ok"


def test_a_right_one_is_timed_and_its_columns_agree():
    rows = measured(Case(5, 3, 4, 6), LoopOfReference)
    for mode in MODES:
        row, nn_row = rows["fastlstm", mode], rows["nn", mode]
        assert row.status == "ok"
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.ratio == pytest.approx(nn_row.p50_ms / row.p50_ms)
        assert row.fraction == pytest.approx(row.floor_ms / row.p50_ms)
        assert row.floor_ms == pytest.approx(row.flops / row.limit_gflops / 1e6)
        assert row.us_per_step == pytest.approx(row.p50_ms * 1e3 / 5)
        assert row.gate_T == 5


def test_a_case_in_a_process_of_its_own_gives_the_same_rows(monkeypatch):
    case = Case(5, 3, 4, 6)
    here = measured(case, LoopOfReference)
    monkeypatch.delattr(run, "measure_case")  # in this process
    suite = run.Suite("test", [case], plan=HASTY, attempts=1, alone=True)
    told = []
    rows = run.run_suite(suite, peers.chosen([], "cpu"), lambda case, made: told.append((case.name, len(made))))
    assert told == [(case.name, 4)]
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        same = here[row.impl, row.mode]
        assert row.p50_ms > 0
        assert (row.flops, row.gate_T, row.rows) == (same.flops, same.gate_T, same.rows)


def test_an_exception_is_a_row_and_a_failure():
    class Raises(LoopOfReference):
        def bend(self, output):
            raise RuntimeError("no kernel\nsecond line")

    rows = measured(Case(5, 3, 4, 6), Raises)
    assert {rows["fastlstm", mode].status for mode in MODES} == {"failed: RuntimeError: no kernel"}
    assert rows["nn", "train"].status == "ok"


def test_without_a_baseline_nothing_is_timed():
    class Raises(LoopOfReference):
        def bend(self, output):
            raise RuntimeError("not on this device")

    suite = run.Suite("test", [Case(5, 3, 4, 6)], plan=HASTY, attempts=1)
    rows = run.run_suite(suite, {"nn": peer(Raises), "fastlstm": peer(LoopOfReference)})
    assert [row.status for row in rows[:2]] == [
        "failed: RuntimeError: not on this device",
        "skipped: nn.LSTM gave nothing to compare with",
    ]
    assert all(row.p50_ms is None for row in rows)


def test_a_missing_gradient_or_a_wrong_shape_is_refused():
    case = Case(5, 3, 4, 6)
    right = expected(case, make_inputs(case), precision(case, ours=True))
    rounded = {key: value.float() for key, value in right.truth.items()}
    assert judge(rounded, right, "train").ok
    without = {key: value for key, value in rounded.items() if key != "d_x"}
    assert judge(without, right, "forward").ok
    assert judge(without, right, "train").name == "d_x"
    assert not judge(without, right, "train").ok
    assert not judge(rounded | {"h_n": rounded["h_n"][0]}, right, "forward").ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "tf32"])
def test_an_error_beyond_rounding_is_refused_in_every_result(dtype):
    case = Case(5, 3, 4, 6, dtype=dtype)
    right = expected(case, make_inputs(case), precision(case, ours=True))
    for name in right.truth:
        for part, ok in ((0.9, True), (1.1, False)):
            off = right.truth[name].clone()
            off.view(-1)[0] += part * right.bounds[name]
            assert judge({**right.truth, name: off}, right, "train").ok is ok, name


# --- rivals, with stand-ins of their documented interfaces where they need a GPU


def assert_right(case: Case, build) -> None:
    inputs = make_inputs(case)
    right, program = expected(case, inputs, precision(case, ours=False)), build(case, inputs)
    for mode in MODES:
        found = judge(program.results(mode), right, mode)
        assert found.ok, str(found)


@pytest.mark.parametrize("case", [Case(4, 3, 5, 6, 2, bidirectional=True), Case(2, 2, 5, 6, kind="stream")], ids=name)
def test_the_compiled_loop_computes_an_lstm(case):
    with torch.compiler.set_stance("force_eager"):
        assert_right(case, rivals.compiled_loop)


def test_hastes_weights_and_gradients_are_converted(monkeypatch):
    class HasteLSTM(nn.Module):
        """Gates i, g, f, o along the second dimension of the kernels; one bias; one layer."""

        def __init__(self, I, H, batch_first):  # noqa: E741
            super().__init__()
            assert not batch_first
            self.H = H

        def from_native_weights(self, w_ih, w_hh, b_ih, b_hh):
            def igfo(w):
                i, f, g, o = w.chunk(4, dim=-1)
                return nn.Parameter(torch.cat([i, g, f, o], dim=-1))

            self.kernel, self.recurrent_kernel, self.bias = igfo(w_ih.T), igfo(w_hh.T), igfo(b_ih + b_hh)

        def forward(self, x, state=None):
            h, c = state or (x.new_zeros(1, x.shape[1], self.H),) * 2
            ys = []
            h, c = h[0], c[0]
            for step in x:
                i, g, f, o = (step @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                ys.append(h)
            return torch.stack(ys), (h[None], c[None])

    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LSTM=HasteLSTM))
    for case in (Case(4, 3, 5, 6), Case(1, 3, 5, 6, kind="stream")):
        assert rivals.haste_refuses(case) is None
        assert_right(case, rivals.haste)
    assert "float32" in rivals.haste_refuses(Case(4, 3, 5, 6, dtype="bfloat16"))


def test_flashrnns_layouts_are_converted(monkeypatch):
    def kernel(Wx, R, b, *, function, backend, dtype):
        """Wx [B, T, 4, 1, H], R [4, 1, H, H], b [4, 1, H] -> states [2, B, T, 1, H] of y and c."""
        assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
        B, T, _, _, H = Wx.shape
        y, c, kept = Wx.new_zeros(B, H), Wx.new_zeros(B, H), []
        for t in range(T):
            i, f, g, o = (Wx[:, t, :, 0] + torch.einsum("ghp,bp->bgh", R[:, 0], y) + b[:, 0]).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = o.sigmoid() * c.tanh()
            kept.append(torch.stack([y, c]))
        states = torch.stack(kept, dim=2)[:, :, :, None]
        return states, states[:, :, -1:]

    fake = ModuleType("flashrnn")
    fake.flashrnn = kernel
    monkeypatch.setitem(sys.modules, "flashrnn", fake)
    assert rivals.flashrnn_refuses(Case(4, 3, 5, 6)) is None
    assert_right(Case(4, 3, 5, 6), rivals.flashrnn)
    assert rivals.flashrnn_refuses(Case(4, 3, 5, 6, 2))
