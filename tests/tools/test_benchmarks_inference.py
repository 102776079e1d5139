"""The suite `inference`: engines do the same work, wrong ones have no time, and its tables."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

for package in ("matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import plot, report, results, suites
from benchmarks.cases import Case
from benchmarks.data import Inputs, make_inputs
from benchmarks.gate import OUTPUTS
from benchmarks.inference import engines, gate, streaming, suite
from benchmarks.inference.engines import ENGINES, ModuleLayer
from benchmarks.inference.gate import References
from benchmarks.inference.streaming import Stream
from benchmarks.measure import Plan
from benchmarks.results import InferenceRow

SHORT = Plan(budget=0.0, min_rounds=1, slow_rounds=1, min_sample=0.0, warm_up=0.0)
SMALL = {
    "one layer": Case(5, 2, 3, 8),
    "two layers, both directions": Case(4, 3, 5, 8, 2, bidirectional=True),
    "states": Case(3, 1, 4, 8, kind="stream"),
    "states of two layers and both directions": Case(2, 2, 4, 8, 2, bidirectional=True, kind="stream"),
}


@pytest.fixture(params=list(ENGINES))
def name(request) -> str:
    """An engine whose packages are installed."""
    if reason := ENGINES[request.param].missing():
        pytest.skip(reason)
    return request.param


def results_of(name: str, case: Case, inputs: Inputs, setting: engines.Setting) -> dict[str, torch.Tensor]:
    call = ENGINES[name].build(case, inputs.weights, 1, setting).bind(inputs.x, inputs.hx)
    with torch.inference_mode():
        call.run()
    return dict(zip(OUTPUTS, (t.clone() for t in call.outputs()), strict=True))


@pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))
def test_every_setting_of_an_engine_passes_the_gate(name, case):
    inputs = make_inputs(case)
    references = References(case, inputs)
    for setting in ENGINES[name].settings:
        errors = references.check(results_of(name, case, inputs, setting), ENGINES[name].weights)
        assert errors.status == "ok", setting
        assert (ENGINES[name].weights == "int8") == (errors.accuracy is None), setting


def test_carried_states_are_those_of_one_long_call(name):
    """Each call of a stream continues where the one before ended, whatever buffers it uses."""
    if name not in streaming.IMPLS:
        pytest.skip("not measured step by step")
    stream = Stream(8, 1)
    inputs = make_inputs(stream.case)
    call = (
        ENGINES[name]
        .build(stream.case, inputs.weights, 1, ENGINES[name].settings[0])
        .bind(inputs.x, inputs.hx, carry=True)
    )
    T = streaming.CHECKED_STEPS
    long = References(replace(stream.case, T=T), replace(inputs, x=inputs.x.expand(T, 1, 8).contiguous()))
    assert long.check(streaming.first_steps(call), ENGINES[name].weights).status == "ok"


def test_gate_refuses_swapped_gates_nan_and_shapes():
    case = SMALL["one layer"]
    inputs = make_inputs(case)
    right = results_of("nn", case, inputs, {})
    swapped = {k: torch.cat([w.chunk(4)[g] for g in (0, 2, 1, 3)]) for k, w in inputs.weights.items()}
    wrong = {
        "gates": results_of("nn", case, replace(inputs, weights=swapped), {}),
        "NaN": right | {"c_n": right["c_n"].clone().fill_(float("nan"))},
        "shape": right | {"output": right["output"][:, :1]},
    }
    references = References(case, inputs)
    for weights in ("float32", "bfloat16", "int8"):
        assert references.check(right, "float32").status == "ok"
        for what, values in wrong.items():
            assert references.check(values, weights).status.startswith("WRONG"), (what, weights)


def test_int8_bound_is_relative_to_the_result():
    case = SMALL["one layer"]
    inputs = make_inputs(case)
    references, right = References(case, inputs), results_of("nn", case, inputs, {})
    for factor, status in ((1 + 0.9 * gate.INT8_BOUND, "ok"), (1 + 1.1 * gate.INT8_BOUND, "WRONG")):
        scaled = {name: factor * value for name, value in right.items()}
        assert references.check(scaled, "int8").status.startswith(status)


@pytest.fixture
def two_engines(monkeypatch) -> None:
    """nn.LSTM under three names: as itself, as ours and wrong, and as another runtime."""

    def wrong(case, weights, threads, out):
        return ENGINES["nn"].build(case, {name: 1.01 * w for name, w in weights.items()}, threads, {})

    chosen = {"nn": ENGINES["nn"]}
    chosen["frozen"] = replace(ENGINES["frozen"], build_with=ENGINES["fastlstm"].build_with, settings=({},))
    chosen["frozen_bf16"] = replace(ENGINES["frozen_bf16"], build_with=lambda *_, **__: 1 / 0)
    chosen["frozen_int8"] = replace(ENGINES["frozen_int8"], weights="float32", build_with=wrong)
    chosen["ort"] = replace(ENGINES["ort"], build_with=lambda *given, **_: ENGINES["nn"].build(*given, {}), packages=())
    monkeypatch.setattr(suite, "installed", lambda: chosen)
    monkeypatch.setattr(streaming, "installed", lambda: chosen)
    for name, engine in chosen.items():
        monkeypatch.setitem(ENGINES, name, engine)


def test_rows_of_right_wrong_and_failing_engines(two_engines, tmp_path):
    rows = {row.impl: row for row in suite.measure_case(SMALL["one layer"], SHORT)}
    assert rows["frozen"].status == rows["ort"].status == rows["nn"].status == "ok"
    assert rows["frozen_int8"].status.startswith("WRONG")
    assert rows["frozen_bf16"].status == "failed: ZeroDivisionError: division by zero"
    assert rows["frozen_int8"].p50_ms is rows["frozen_bf16"].p50_ms is None
    assert (rows["frozen"].compared_with, rows["ort"].compared_with) == ("ort", "")
    assert rows["frozen"].speedup == pytest.approx(rows["ort"].p50_ms / rows["frozen"].p50_ms)
    assert rows["nn"].weight_bytes == 4 * sum(w.numel() for w in make_inputs(SMALL["one layer"]).weights.values())
    results.write(rows.values(), tmp_path / "inference.csv")
    assert [row.impl for row in results.read(tmp_path / "inference.csv")] == list(rows)


def test_fastest_setting_is_measured(monkeypatch):
    """A slow setting and a fast one: the fast one is bound."""

    class Slow(ModuleLayer):
        def bind(self, x, hx, carry=False):
            call = super().bind(x, hx, carry)
            run = call.run
            call.run = lambda: [run() for _ in range(20)]
            return call

    def build(case, weights, threads, slow):
        layer = ENGINES["nn"].build(case, weights, threads, {})
        return Slow(layer.module) if slow else layer

    monkeypatch.setitem(
        ENGINES, "ort", replace(ENGINES["ort"], build_with=build, settings=({"slow": True}, {"slow": False}))
    )
    monkeypatch.setattr(suite, "TRIAL", SHORT)
    assert suite.fastest_setting("ort", SMALL["one layer"], make_inputs(SMALL["one layer"]), 1).setting == {
        "slow": False
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_of_all_threads_are_counted(two_engines, monkeypatch, threads):
    monkeypatch.setattr(streaming, "STEPS", 120)
    rows = {row.impl: row for row in streaming.stream_rows(Stream(8, threads), 1.0)}
    assert list(rows) == ["frozen", "frozen_int8", "ort"]
    row = rows["frozen"]
    assert row.steps == 120
    assert row.python_threads == threads
    assert 0 < row.p50_us <= row.p99_us <= row.p999_us
    assert row.speedup == pytest.approx(row.steps_per_s / rows["ort"].steps_per_s)
    assert rows["frozen_int8"].status.startswith("WRONG")


def test_absent_engines_are_named_once_and_have_no_rows(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert set(engines.installed()) == {"nn", "fastlstm", "frozen", "frozen_bf16", "frozen_int8", "torch_int8"}
    install = "not installed (pip install 'fastlstm[benchmarks]')"
    assert engines.missing() == [
        f"without ONNX Runtime and ONNX Runtime int8: onnxruntime, onnx {install}",
        f"without OpenVINO: openvino, onnx {install}",
    ]


def test_suite_has_cases_and_streams_with_unique_names():
    names = [case.name for case in suite.chosen()]
    assert len(names) == len(set(names)) == suites.size_of("inference") == len(suite.CASES) + 6
    assert [case.name for case in suite.chosen("H=64,", done={names[-6]})] == names[-5:-3]


def test_tables_show_speedups_errors_and_percentiles(tmp_path):
    common = {"threads": 2, "device": "Testing CPU", "rms_output": 0.2}
    times = {"nn": 3.0, "frozen": 1.0, "frozen_int8": 0.5, "ort": 2.0, "openvino": 1.5, "ort_int8": 0.75}
    rows = [
        InferenceRow("inference", "layer", "forward", impl, p50_ms=ms, weight_bytes=2048, rms_error=0.001, **common)
        for impl, ms in times.items()
    ]
    for row in rows:
        row.weights, row.package = ENGINES[row.impl].weights, "onnxruntime 1.0" if "ort" in row.impl else ""
    suite.compare({row.impl: row for row in rows}, times)
    rows.append(InferenceRow("inference", "steps", "stream", "frozen", p50_us=5.0, p99_us=6.0, p999_us=70.0, **common))
    text = report.markdown(rows)
    assert "With onnxruntime 1.0." in text
    assert "| layer | 3 |  | 1 |  | 0.5 | 2 | 1.5 | 0.75 |  | 1.50x | 1.50x |" in text
    assert "frozen relative to the faster of ONNX Runtime and OpenVINO: geometric mean 1.50x over 1 cases" in text
    assert "| layer | 0.2 |  | 1.0e-03 | 1.0e-03 |  | 2 |  | 2 | 2 |  |" in text
    assert "| steps | 5 / 6 / 70 |" in text
    assert plot.draw(rows, tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")
