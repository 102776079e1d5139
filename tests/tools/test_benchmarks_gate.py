"""The accuracy gate of the benchmarks: correct results are timed and wrong ones refused, for every implementation."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

for package in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import baselines, implementations, machine, run
from benchmarks.cases import MODES, Case
from benchmarks.data import make_inputs
from benchmarks.gate import check_accuracy, expected, precision
from benchmarks.measure import Plan
from benchmarks.programs import build_program
from benchmarks.results import Row
from fastlstm import reference

MINIMAL_PLAN = Plan(budget=0.0, min_rounds=1, min_sample=0.0, warm_up=0.0)
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
def _small_peak_gemm(monkeypatch):
    """Shrink the GEMM of the peak, which is measured at every case."""
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 64)


def name(case: Case) -> str:
    return case.name


class ReferenceLSTM(nn.LSTM):
    """nn.LSTM computed by fastlstm.reference; tests override `perturb` to make the output wrong."""

    def perturb(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def forward(self, x, hx=None):
        h_n, c_n = [], []
        D = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            layer_weights = [w for weights in self.all_weights[layer * D : (layer + 1) * D] for w in weights]
            directions = slice(layer * D, (layer + 1) * D)
            x, h, c, _ = reference.layer(
                x, *((None, None) if hx is None else (hx[0][directions], hx[1][directions])), layer_weights
            )
            h_n.append(h)
            c_n.append(c)
        return self.perturb(x), (torch.cat(h_n), torch.cat(c_n))


class SlightlyWrong(ReferenceLSTM):
    def perturb(self, output):
        return output * (1 + 1e-4)


class ReturnsNaN(ReferenceLSTM):
    def perturb(self, output):
        return output * float("nan")


class WrongGradients(ReferenceLSTM):
    """Correct outputs; gradients 1 % too large."""

    def perturb(self, output):
        return output + 0.01 * (output - output.detach())


def implementation_of(lstm: type) -> implementations.Implementation:
    return implementations.Implementation(
        lambda case, inputs: build_program(case, inputs, lstm, nn.LSTMCell), ours=True
    )


def measured(case: Case, lstm: type) -> dict[tuple[str, str], Row]:
    suite = run.Suite("test", [case], plan=MINIMAL_PLAN, attempts=1)
    pair = {"nn": implementations.IMPLEMENTATIONS["nn"], "fastlstm": implementation_of(lstm)}
    return {(row.impl, row.mode): row for row in run.run_suite(suite, pair)}


@pytest.mark.parametrize("case", KINDS, ids=name)
def test_all_available_backends_pass(case):
    ours = {
        impl: one
        for impl, one in implementations.IMPLEMENTATIONS.items()
        if (one.ours and not one.missing("cpu")) or impl == "nn"
    }
    for impl, result in run.check_all(case, "cpu", ours).items():
        for mode in MODES:
            status = result.status(mode)
            assert status == "ok" or status.startswith("skipped"), f"{impl}, {mode}: {status}"


@pytest.mark.parametrize("lstm", [SlightlyWrong, ReturnsNaN])
def test_wrong_output_has_no_time(lstm):
    rows = measured(Case(5, 3, 4, 6), lstm)
    for mode in MODES:
        assert rows["nn", mode].p50_ms > 0, mode
        refused = rows["fastlstm", mode]
        assert refused.status.startswith("WRONG: "), mode
        assert refused.p50_ms is refused.ratio is refused.fraction is None, mode
        assert not refused.error <= refused.error_allowed, mode
    assert (
        len(
            run.failures(
                list(rows.values()), {"fastlstm": implementation_of(lstm), "nn": implementations.IMPLEMENTATIONS["nn"]}
            )
        )
        == 2
    )


def test_wrong_gradients_affect_training_rows_only():
    rows = measured(Case(5, 3, 4, 6), WrongGradients)
    assert rows["fastlstm", "train"].status.startswith("WRONG: d_")
    assert rows["fastlstm", "forward"].status == "ok"


def test_columns_of_a_timed_row_are_consistent():
    rows = measured(Case(5, 3, 4, 6), ReferenceLSTM)
    for mode in MODES:
        row, nn_row = rows["fastlstm", mode], rows["nn", mode]
        assert row.status == "ok", mode
        assert row.p20_ms <= row.p50_ms <= row.p80_ms, mode
        assert row.ratio == pytest.approx(nn_row.p50_ms / row.p50_ms), mode
        assert row.fraction == pytest.approx(row.floor_ms / row.p50_ms), mode
        assert row.floor_ms == pytest.approx(row.flops / row.limit_gflops / 1e6), mode
        assert row.us_per_step == pytest.approx(row.p50_ms * 1e3 / 5), mode
        assert row.gate_T == 5, mode


def test_case_in_a_new_process_gives_equal_rows(monkeypatch):
    case = Case(5, 3, 4, 6)
    expected_rows = measured(case, ReferenceLSTM)
    monkeypatch.delattr(run, "measure_case")  # in this process
    suite = run.Suite("test", [case], plan=MINIMAL_PLAN, attempts=1, isolated=True)
    reported = []
    rows = run.run_suite(
        suite, implementations.select([], "cpu"), lambda case, new_rows: reported.append((case.name, len(new_rows)))
    )
    assert reported == [(case.name, 4)]
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        same = expected_rows[row.impl, row.mode]
        assert row.p50_ms > 0
        assert (row.flops, row.gate_T, row.rows) == (same.flops, same.gate_T, same.rows)


def test_exception_becomes_a_failed_row():
    class Raises(ReferenceLSTM):
        def perturb(self, output):
            raise RuntimeError("no kernel\nsecond line")

    rows = measured(Case(5, 3, 4, 6), Raises)
    assert {rows["fastlstm", mode].status for mode in MODES} == {"failed: RuntimeError: no kernel"}
    assert rows["nn", "train"].status == "ok"


def test_nothing_is_timed_if_the_baseline_fails():
    class Raises(ReferenceLSTM):
        def perturb(self, output):
            raise RuntimeError("not on this device")

    suite = run.Suite("test", [Case(5, 3, 4, 6)], plan=MINIMAL_PLAN, attempts=1)
    rows = run.run_suite(suite, {"nn": implementation_of(Raises), "fastlstm": implementation_of(ReferenceLSTM)})
    assert {row.impl: row.status for row in rows} == {
        "nn": "failed: RuntimeError: not on this device",
        "fastlstm": "skipped: nn.LSTM gave nothing to compare with",
    }
    assert all(row.p50_ms is None for row in rows)


def test_missing_gradient_and_wrong_shape_are_refused():
    case = Case(5, 3, 4, 6)
    reference_of_case = expected(case, make_inputs(case), precision(case, ours=True))
    rounded = {key: value.float() for key, value in reference_of_case.reference.items()}
    assert check_accuracy(rounded, reference_of_case, "train").ok
    without = {key: value for key, value in rounded.items() if key != "d_x"}
    assert check_accuracy(without, reference_of_case, "forward").ok
    assert check_accuracy(without, reference_of_case, "train").name == "d_x"
    assert not check_accuracy(without, reference_of_case, "train").ok
    assert not check_accuracy(rounded | {"h_n": rounded["h_n"][0]}, reference_of_case, "forward").ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "tf32"])
def test_error_beyond_rounding_is_refused_in_every_result(dtype):
    case = Case(5, 3, 4, 6, dtype=dtype)
    reference_of_case = expected(case, make_inputs(case), precision(case, ours=True))
    for name in reference_of_case.reference:
        for part, ok in ((0.9, True), (1.1, False)):
            perturbed = reference_of_case.reference[name].clone()
            perturbed.view(-1)[0] += part * reference_of_case.bounds[name]
            assert (
                check_accuracy({**reference_of_case.reference, name: perturbed}, reference_of_case, "train").ok is ok
            ), name


# --- baselines; those that need a GPU are replaced by stand-ins with their documented interfaces


def assert_correct(case: Case, build) -> None:
    inputs = make_inputs(case)
    reference_of_case, program = expected(case, inputs, precision(case, ours=False)), build(case, inputs)
    for mode in MODES:
        accuracy = check_accuracy(program.results(mode), reference_of_case, mode)
        assert accuracy.ok, f"{case.name}, {mode}: {accuracy}"


@pytest.mark.parametrize("case", [Case(4, 3, 5, 6, 2, bidirectional=True), Case(2, 2, 5, 6, kind="stream")], ids=name)
def test_compiled_loop_is_correct(case):
    with torch.compiler.set_stance("force_eager"):
        assert_correct(case, baselines.compiled_loop)


def test_haste_weight_and_gradient_layouts(monkeypatch):
    class HasteLSTM(nn.Module):
        """Gate order i, g, f, o along the second dimension of the kernels; one bias; one layer."""

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
        assert baselines.haste_refuses(case) is None
        assert_correct(case, baselines.haste)
    assert "float32" in baselines.haste_refuses(Case(4, 3, 5, 6, dtype="bfloat16"))


def test_flashrnn_layouts(monkeypatch):
    def kernel(Wx, R, b, *, function, backend, dtype):
        """Wx [B, T, 4, 1, H], R [4, 1, H, H], b [4, 1, H] -> states [2, B, T, 1, H] of y and c."""
        assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
        B, T, _, _, H = Wx.shape
        y, c, steps = Wx.new_zeros(B, H), Wx.new_zeros(B, H), []
        for t in range(T):
            i, f, g, o = (Wx[:, t, :, 0] + torch.einsum("ghp,bp->bgh", R[:, 0], y) + b[:, 0]).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = o.sigmoid() * c.tanh()
            steps.append(torch.stack([y, c]))
        states = torch.stack(steps, dim=2)[:, :, :, None]
        return states, states[:, :, -1:]

    stand_in = ModuleType("flashrnn")
    stand_in.flashrnn = kernel
    monkeypatch.setitem(sys.modules, "flashrnn", stand_in)
    assert baselines.flashrnn_refuses(Case(4, 3, 5, 6)) is None
    assert_correct(Case(4, 3, 5, 6), baselines.flashrnn)
    assert baselines.flashrnn_refuses(Case(4, 3, 5, 6, 2))
