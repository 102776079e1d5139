"""Benchmarks: command, interleaved timing, GPU suite, rows, reports. No test depends on a time."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import __main__ as command
from benchmarks import console, gpu, headline, implementations, load, machine, measure, memory, report, results
from benchmarks.cases import MODES, Case
from benchmarks.machine import ROOT, Peak, describe, slug
from benchmarks.measure import Measurement, Plan, Spread
from benchmarks.programs import build_program
from benchmarks.results import COLUMNS, Row

CPU_CASE = Case(100, 32, 128, 128, target_train=1.7, target_forward=1.2)


@pytest.fixture(autouse=True)
def _small_peak_gemm(monkeypatch):
    """Shrink the GEMM of the peak, which is measured at every case."""
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 64)


def name(case: Case) -> str:
    return case.name


class SlightlyWrong(torch.nn.LSTM):
    def forward(self, x, hx=None):
        output, states = super().forward(x, hx)
        return output * (1 + 1e-4), states


def test_command_fails_without_a_time_if_fastlstm_is_wrong(tmp_path, monkeypatch, capsys):
    wrong = implementations.Implementation(
        lambda case, inputs: build_program(case, inputs, SlightlyWrong, torch.nn.LSTMCell), ours=True, default=True
    )
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "fastlstm", wrong)
    arguments = ["--suite", "quick", "--filter", "T=1 B=1", "--budget", "0.01", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out
    ours = [row for row in results.read(tmp_path / "quick.csv") if row.impl == "fastlstm"]
    assert len(ours) == 2
    assert all(row.p50_ms is None and row.error > row.error_allowed for row in ours)


def test_command_writes_rows_that_identify_the_run(tmp_path):
    arguments = ["--suite", "quick", "--filter", "T=1 B=1", "--budget", "0.01", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    text = (tmp_path / "quick.csv").read_text()
    assert text.splitlines()[0].split(",") == COLUMNS
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
    for row in results.read(tmp_path / "quick.csv"):
        assert row.status == "ok"
        assert all([row.device, row.cpu, row.threads, row.torch, row.commit, row.fastlstm, row.date, row.limit_gflops])


def test_resume_continues_a_suite_that_ran_out_of_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "Console", None)  # as where rich is not installed
    arguments = ["--suite", "quick", "--filter", "T=1 B=1", "--budget", "0.01", "--out", str(tmp_path)]
    assert command.main([*arguments, "--dtype", "float64"]) == 0
    assert results.read(tmp_path / "quick.csv") == []
    assert command.main([*arguments, "--seconds", "0"]) == 0
    assert "1 cases are left" in capsys.readouterr().out
    assert results.read(tmp_path / "quick.csv") == []
    assert command.main([*arguments, "--resume"]) == 0
    printed, measured = capsys.readouterr().out, results.read(tmp_path / "quick.csv")
    assert len(measured) == 4
    assert "T=1 B=1 I=64 H=64 streaming\n" in printed
    assert "[" not in printed
    assert command.main([*arguments, "--resume"]) == 0
    assert results.read(tmp_path / "quick.csv") == measured


def test_errors_name_unknown_and_absent_implementations(capsys):
    assert command.main(["--impl", "cudnn"]) == 2
    assert "cudnn" in capsys.readouterr().out
    with pytest.raises(ValueError, match="haste_pytorch requires CUDA"):
        implementations.select(["haste"], "cpu")
    assert list(implementations.select(["eager"], "cpu")) == ["nn", "eager"]


# --- timing


def test_measurements_alternate():
    turns: list[str] = []
    measurements = {one: Measurement.of(lambda one=one: turns.append(one)) for one in "AB"}
    rounds = measure.alternate(measurements, lambda act, calls: act() or 1.0, Plan(budget=0, min_rounds=3, patience=99))
    assert rounds == 3
    # One call each to calibrate, one each to estimate a round, then the rounds.
    assert "".join(turns) == "AB" + "AB" * 4
    assert all(measurement.samples == [1.0] * 3 for measurement in measurements.values())


def test_sample_repeats_a_short_call():
    seen: list[int] = []

    def timer(act, calls):
        seen.append(calls)
        return calls * 1e-6

    measurements = {"A": Measurement.of(lambda: None)}
    measure.alternate(measurements, timer, Plan(min_rounds=3, max_rounds=3, min_sample=0.005, warm_up=0.01))
    assert measurements["A"].calls == pytest.approx(5000, rel=0.01)
    assert seen[-1] == measurements["A"].calls
    assert measurements["A"].samples == [pytest.approx(1e-6)] * 3


@pytest.mark.parametrize(("round_time", "rounds"), [(1e-4, 101), (0.1, 31), (1.0, 7), (4.0, 3), (100.0, 3)])
def test_rounds_are_odd_and_fit_the_budget(round_time, rounds):
    assert Plan(budget=3.0, min_rounds=7, slow_rounds=3, patience=12.0).rounds(round_time) == rounds


def test_spread_is_percentiles():
    assert Spread.of([float(k) for k in range(11)]) == Spread(2.0, 5.0, 8.0)


def test_peak_has_a_rate_and_a_name():
    peak = Peak("float64", "cpu")
    peak.sample()
    assert peak.gemm_rate > 1e8
    assert peak.copy_rate is None
    assert peak.name == "gemm 64^3 float64"
    case = Case(5, 3, 4, 6, dtype="float64")
    assert peak.lower_bound(case, "train") == pytest.approx(case.flops("train") / peak.gemm_rate)


def test_background_load_is_a_fraction():
    fraction = load.background_load()()
    assert fraction is None or 0 <= fraction <= 1


def test_process_seconds_are_those_of_the_cpu_clock():
    """Up to the timer ticks of time.process_time."""
    before, exact = time.process_time(), load.process_seconds()
    while time.process_time() - before < 0.05:
        pass
    assert load.process_seconds() - exact == pytest.approx(time.process_time() - before, abs=0.02)
    assert load.wait_for_rest() >= load.REST_S


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*/*.csv")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_report_of_every_committed_csv(path):
    assert "| --- | ---: |" in report.markdown(results.read(path))


def test_slug_is_a_folder_name():
    about = describe("cpu")
    assert slug(about).endswith(f"{torch.get_num_threads()}-threads")
    assert slug({"device": "NVIDIA H100 80GB HBM3", "cpu": "x"}) == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_includes_temporary_allocations():
    """In a new process, as it is used: this one may have memory left of earlier tests."""
    code = "import torch; from benchmarks import memory; print(memory._cpu_peak(lambda: torch.ones(64 * 2**18)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(said) >= 60 * 2**20


# --- the GPU suite, without a GPU


def test_gpu_suite_is_the_full_grid():
    plain = [case for case in gpu.cases() if case.kind == "sequence" and (case.L, case.D) == (1, 1)]
    assert len(plain) == 4 * 3 * 5 * 6
    assert {case.kind for case in gpu.cases()} == {"sequence", "packed", "cells"}


def test_gpu_suite_without_a_gpu_exits_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--suite", "gpu"]) == 2
    assert "CUDA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "mode", "algorithm"),
    [
        (Case(64, 16, 128, 128, dtype="float32"), "train", "cuDNN PERSIST_STATIC_SMALL_H"),
        (Case(64, 16, 192, 192, dtype="float32"), "forward", "cuDNN PERSIST_STATIC_SMALL_H"),
        (Case(64, 16, 192, 192, dtype="float32"), "train", "cuDNN STANDARD"),
        (Case(64, 16, 128, 128, dtype="float16"), "train", "cuDNN PERSIST_STATIC_SMALL_H"),
        (Case(64, 16, 128, 128, dtype="bfloat16"), "train", "cuDNN STANDARD"),
        (Case(64, 64, 768, 768, dtype="float16"), "train", "cuDNN PERSIST_STATIC"),
        (Case(64, 64, 768, 768, 2, dtype="float16"), "train", "cuDNN STANDARD"),
        (Case(64, 256, 768, 768, dtype="float16"), "train", "cuDNN STANDARD"),
        (Case(64, 64, 768, 768, dtype="bfloat16"), "train", "cuDNN STANDARD"),
        (Case(64, 64, 128, 128, kind="packed", ragged="random"), "train", "cuDNN STANDARD"),
        (Case(64, 64, 128, 128, kind="cells"), "train", "ATen fused cell"),
    ],
    ids=str,
)
def test_cudnn_algorithm_follows_aten_rules(case, mode, algorithm):
    assert gpu.cudnn_algorithm(case, mode, 91300) == algorithm
    if case.dtype == "bfloat16":
        assert gpu.cudnn_algorithm(case, mode, 91200) == "ATen"


def test_gpu_precision_is_set_and_restored():
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision
    for dtype, setting in (("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")):
        with gpu.precision(Case(1, 1, 1, 1, dtype=dtype)):
            assert (rnn.fp32_precision, matmul.fp32_precision) == (setting, setting)
    assert (rnn.fp32_precision, matmul.fp32_precision) == before


# --- rows and the report


def table() -> list[Row]:
    """Rows of a complete run: two cases in two modes."""
    rows = []
    for case, ratio in ((Case(10, 1, 1, 100, target_train=8, target_forward=8), 10.0), (CPU_CASE, 1.5)):
        for mode in MODES:
            about = {"T": case.T, "B": case.B, "H": case.H, "kind": case.kind, "flops": case.flops(mode)}
            about |= {"device": "Testing CPU", "threads": 2, "torch": "2.13.0", "commit": "abc", "date": "2026-01-02"}
            common = {
                "suite": "cpu",
                "case": case.name,
                "mode": mode,
                "target": case.target(mode),
                "limit": "gemm",
                **about,
            }
            rows.append(Row(impl="nn", p50_ms=3.0, ratio=1.0, fraction=0.3, **common))
            rows.append(
                Row(
                    impl="fastlstm", p50_ms=round(3.0 / ratio, 3), ratio=ratio, fraction=round(0.3 * ratio, 3), **common
                )
            )
    return rows


def test_csv_round_trip(tmp_path):
    results.write(table(), tmp_path / "new" / "cpu.csv")
    assert results.read(tmp_path / "new" / "cpu.csv") == table()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cpu.csv"]


def test_csv_with_other_columns_is_refused(tmp_path):
    (tmp_path / "old.csv").write_text("suite,case,speed\ncpu,a,1\n")
    with pytest.raises(ValueError, match=r"old\.csv does not have the columns.*speed"):
        results.read(tmp_path / "old.csv")


def test_report_shows_speedup_and_percentage_of_peak():
    text = report.markdown(table())
    assert "| T=10 B=1 I=1 H=100 | 3 | 0.3 | 10.00x | 300% |" in text
    assert "Geometric mean 3.87x; min 1.50x." in text
    assert "Testing CPU, 2 threads, torch 2.13.0, commit abc, 2026-01-02" in text


def test_report_hides_times_of_wrong_results_and_marks_background_load():
    rows = table()
    of_mode = {row.mode: row for row in rows if row.impl == "fastlstm" and row.T == 10}
    wrong = of_mode["train"]
    wrong.status, wrong.p50_ms, wrong.ratio = "WRONG: output error 1", None, None
    of_mode["forward"].others_cpu = 0.5
    text = report.markdown(rows)
    assert "| T=10 B=1 I=1 H=100 | 3 | WRONG |  |" in text
    assert "10.00x (busy)" in text
    assert "busy were measured" in text


def test_report_command_updates_the_readme_and_plots(tmp_path, capsys):
    file, readme = tmp_path / "cpu.csv", tmp_path / "README.md"
    results.write(table(), file)
    readme.write_text("top\n<!-- benchmarks:cpu -->\nold\n<!-- /benchmarks:cpu -->\nbottom\n")
    for _ in range(2):
        assert report.main([str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("top\n<!-- benchmarks:cpu -->\n")
    assert text.endswith("<!-- /benchmarks:cpu -->\nbottom\n")
    assert "old" not in text
    assert text.count("10.00x") == 2
    assert "](cpu.png)" in text
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_headline_includes_slowdowns_and_a_plot(tmp_path):
    rows = headline.rows()
    assert len(rows) == len(headline.SELECTED)
    assert any(row.train < 1 for row in rows)
    assert any(row.forward < 1 for row in rows)
    assert "not** in a CUDA graph" in headline.markdown()
    assert headline.draw(tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")


def test_headline_error_names_the_missing_case(monkeypatch):
    monkeypatch.setattr(headline, "SELECTED", [("CPU", "none", headline.CPU, "T=0")])
    with pytest.raises(LookupError, match="T=0"):
        headline.rows()


def test_grid_and_scaling_reports_summarize(tmp_path):
    for suite in ("grid", "random"):
        text = report.markdown([replace(row, suite=suite) for row in table()])
        assert "| Training step (forward and backward) | 2 | 3.87x | 1.50x | 0 | 0 |" in text, suite
        assert f"| {suite} | cases |" in text
    scaling = [replace(row, suite="scaling", us_per_step=row.p50_ms * 10) for row in table()]
    scaling += [
        Row(suite="scaling", case="big", mode="memory", impl=impl, peak_mib=size, ratio=200.0 / size, target=1.0)
        for impl, size in (("nn", 200.0), ("fastlstm", 160.0))
    ]
    text = report.markdown(scaling)
    assert "| big | 200 | 160 | 1.25x |" in text
    assert "µs per step" in text


def test_bf16_products_report_compares_with_float32_of_the_same_run():
    rows = []
    for H, times in ((512, (8.0, 2.0)), (256, (4.0, 2.0)), (64, (1.0, 1.25))):
        for dtype, ms in zip(("float32", "bf16_products"), times, strict=True):
            case = replace(CPU_CASE, T=50, B=16, I=H, H=H, L=1, dtype=dtype)
            about = {
                "suite": "bf16_products",
                "case": case.name,
                "mode": "train",
                "dtype": dtype,
                "T": 50,
                "B": 16,
                "H": H,
            }
            rows.append(Row(impl="nn", p50_ms=10.0, ratio=1.0, **about))
            rows.append(Row(impl="fastlstm", p50_ms=ms, ratio=10.0 / ms, **about))
    text = report.markdown(rows)
    heading = "Training step (forward and backward)"
    assert f"| {heading}, H ≥ 256 and B ≥ 16 | 2 | 2.83x | 2.00x | 5.00x | 5.00x |" in text
    assert f"| {heading}, smaller | 1 | 0.80x | 0.80x | 8.00x | 8.00x |" in text
    assert "Wrong or failed results of fastlstm: 0." in text
    assert text.index("H=64 bf16_products, train | 1 | 1.25 | 0.80x | 8.00x") < text.index("H=256 bf16_products, train")
    rows[-1].status, rows[-1].p50_ms, rows[-1].ratio = "WRONG: output error 1", None, None
    assert "Wrong or failed results of fastlstm: 1." in report.markdown(rows)
    assert "smaller" not in report.markdown(rows)


def test_peak_memory_ratio_is_to_nn_lstm(monkeypatch):
    monkeypatch.setattr(memory, "peak_mib", lambda impl, case, device: {"nn": 200.0, "fastlstm": 100.0}[impl])
    nn_row, row = memory.peak_rows("scaling", CPU_CASE, ["nn", "fastlstm"])
    assert (nn_row.peak_mib, row.peak_mib, row.ratio, row.target) == (200.0, 100.0, 2.0, 1.0)


@pytest.mark.parametrize("difference", [1e-9, 1e-3])
def test_tutorial_is_timed_if_its_losses_agree(monkeypatch, difference):
    from benchmarks import tutorials
    from fastlstm.tutorials.common import Timing, Trajectory

    losses = Trajectory(torch=[1.0, 0.5], fastlstm=[1.0, 0.5 * (1 + difference)])
    timing = Timing(torch=[0.03, 0.02, 0.04], fastlstm=[0.01, 0.01, 0.01], updates=60)
    monkeypatch.setattr(tutorials, "compare_trajectories", lambda *_, **__: losses)
    monkeypatch.setattr(tutorials, "time_both", lambda *_, **__: timing)
    monkeypatch.setattr(tutorials, "missing_packages", lambda _: [])
    nn_row, row = tutorials.tutorial_rows("gradient_regression", lambda case, rows: None)
    if difference < row.error_allowed:
        assert (nn_row.p50_ms, row.p50_ms, row.ratio) == (30.0, 10.0, 3.0)
        assert row.status == "ok"
    else:
        assert row.status.startswith("WRONG")
        assert row.p50_ms is None
