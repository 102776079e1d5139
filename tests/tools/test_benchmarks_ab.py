"""python -m benchmarks ab: statistics, workers, refusals, the command. No test compiles or depends on times."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

import os
import subprocess
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

np = pytest.importorskip("numpy")

from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.ab import command as ab
from benchmarks.ab import compare, paired, trees
from benchmarks.ab.compare import AbRow, Settings
from benchmarks.ab.paired import FASTER, SLOWER, WITHIN_NOISE, Launch
from benchmarks.ab.process import WorkerError, workers
from benchmarks.ab.trees import Tree, TreeError
from benchmarks.cases import MODES, Case
from benchmarks.machine import ROOT
from benchmarks.measure import Plan
from benchmarks.run import Suite

SMALL_CASE = Case(3, 2, 4, 5)
WORKING_TREE = Tree(ROOT, "here")
MINIMAL_SETTINGS = Settings(threads=1, budget=0.0, launches=2, block=1e-4)


# --- statistics


def simulated(draw: np.random.Generator, change: float = 1.0, launches: int = 4, rounds: int = 16) -> list[Launch]:
    """Times under background load: common drift, an offset per process, noise per block, and bursts."""
    simulated_launches = []
    for _ in range(launches):
        drift = np.exp(0.2 * draw.standard_normal(rounds))
        sides = []
        for time in (1.0, change):
            process = np.exp(0.005 * draw.standard_normal())
            bursts = 1 + 2.0 * (draw.random(rounds) < 0.1)
            sides.append(list(time * process * drift * bursts * np.exp(0.02 * draw.standard_normal(rounds))))
        simulated_launches.append(Launch(*sides))
    return simulated_launches


def verdicts(cases: list[list[Launch]]) -> list[str]:
    ratios = [paired.ratio_of(launches) for launches in cases]
    typical = paired.typical_spread(ratios)
    return [paired.verdict_of(ratio, paired.noise_of(ratio, typical, len(ratios))) for ratio in ratios]


def test_change_of_ten_percent_is_detected():
    draw = np.random.default_rng(1)
    cases = [simulated(draw, change) for change in (1.0, 1.1, 1.0, 1 / 1.1, 1.0, 1.0)]
    assert verdicts(cases) == [WITHIN_NOISE, SLOWER, WITHIN_NOISE, FASTER, WITHIN_NOISE, WITHIN_NOISE]


def test_equal_revisions_are_within_noise():
    draw = np.random.default_rng(2)
    assert {found for _ in range(3) for found in verdicts([simulated(draw) for _ in range(8)])} == {WITHIN_NOISE}


def test_ratio_is_old_over_new_with_interval():
    launches = [Launch([2.0, 4.0, 2.2], [1.0, 2.0, 1.0]), Launch([2.0, 1.0, 3.0], [1.0, 0.5, 1.5])]
    ratio = paired.ratio_of(launches)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low + 1e-9 >= 2.0
    assert ratio.high <= 2.2
    assert ratio.launch_spread == 0.0
    assert paired.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "launches",
    [[], [Launch([1.0], [1.0])], [Launch([1.0], [1.0]), Launch([1.0, 1.0], [1.0, 1.0])]],
    ids=["none", "one", "unequal rounds"],
)
def test_single_launch_and_unequal_rounds_are_refused(launches):
    with pytest.raises(ValueError, match="at least two launches of equally many rounds"):
        paired.ratio_of(launches)


def test_noise_grows_with_spread_and_number_of_cases():
    steady = paired.Ratio(1.0, 0.99, 1.01, launch_spread=0.001, round_error=0.001, launches=4)
    disturbed = paired.Ratio(1.0, 0.9, 1.1, launch_spread=0.001, round_error=0.05, launches=4)
    assert paired.noise_of(steady, 0.001, 10) == paired.MIN_CHANGE
    assert paired.noise_of(steady, 0.1, 10) > paired.noise_of(disturbed, 0.001, 10) > paired.MIN_CHANGE
    assert paired.noise_of(disturbed, 0.001, 100) > paired.noise_of(disturbed, 0.001, 10)
    assert paired.typical_spread([]) == 0.0


# --- workers


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Workers of the working tree, and one of a tree whose LSTM is wrong. Importing torch takes seconds: one start."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "fastlstm").mkdir()
    (folder / "fastlstm" / "__init__.py").write_text(
        "import torch\n"
        "LSTMCell = torch.nn.LSTMCell\n"
        "class LSTM(torch.nn.LSTM):\n"
        "    def forward(self, x, hx=None):\n"
        "        output, states = super().forward(x, hx)\n"
        "        return output * (1 + 1e-3), states\n"
    )
    with workers({"old": WORKING_TREE, "new": WORKING_TREE, "wrong": Tree(folder, "wrong")}) as started:
        yield started


@pytest.fixture
def measure(processes, monkeypatch):
    """Return measure_case on the running processes, with worker `new` as the new revision."""

    def run(new: str) -> list[AbRow]:
        pair = {"old": processes["old"], "new": processes[new]}
        monkeypatch.setattr(compare, "workers", lambda sides: nullcontext(pair))
        sides = {side: worker.tree for side, worker in pair.items()}
        return compare.measure_case(Suite("quick", [SMALL_CASE]), SMALL_CASE, sides, MINIMAL_SETTINGS)

    return run


def test_worker_continues_after_an_error(processes):
    worker = processes["old"]
    with pytest.raises(WorkerError, match="old: ValueError: the command must be one of"):
        worker.run("__init__")
    with pytest.raises(WorkerError, match="old: RuntimeError: no case is loaded"):
        worker.run("sample", "train", 1)
    assert worker.run("load", SMALL_CASE, 1, "cpu") in ("native", "eager")
    assert worker.run("calibrate", "forward", Plan(min_sample=1e-4, warm_up=1e-3)) >= 1
    assert worker.run("sample", "forward", 3) > 0
    assert worker.run("results", "train")["output"].shape == (3, 2, 5)
    assert all(0 < seconds < 2 for seconds in worker.rest_s)


def test_equal_trees_are_measured_with_equal_errors(measure):
    rows = measure("new")
    assert [row.mode for row in rows] == list(MODES)
    for row in rows:
        assert row.status == "ok"
        assert (row.launches, row.old_commit, row.new_commit, row.clock) == (2, "here", "here", "wall")
        assert row.rounds >= 4
        assert row.rounds % 2 == 0
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.old_p50_ms > 0
        assert row.old_error == row.new_error <= row.error_allowed
    compare.decide(rows)
    assert all(row.noise >= paired.MIN_CHANGE for row in rows)


def test_wrong_result_has_no_time(measure):
    rows = measure("wrong")
    assert len(rows) == 2
    for row in rows:
        assert row.status.startswith("refused: new is WRONG: ")
        assert row.new_error > row.error_allowed
        assert row.ratio is None
        assert row.old_p50_ms is None


def test_rows_report_a_dead_worker(processes, measure):
    processes["wrong"]._process.kill()
    processes["wrong"]._process.wait()
    assert {row.status for row in measure("wrong")} == {"failed: wrong: the worker of wrong died (exit status -9)"}


# --- trees


def test_unknown_revision_is_an_error(capsys):
    assert command.main(["ab", "no-such-revision"]) == 2
    assert "unknown revision 'no-such-revision'" in capsys.readouterr().out


def test_build_is_cached_and_its_failure_is_an_error(tmp_path, monkeypatch):
    calls: list[list[str]] = []

    def run(words, stdout, status=0, **_):
        calls.append(words)
        stdout.write("compiling\nerror: planted\n")
        return subprocess.CompletedProcess(words, len(calls) == 1)

    monkeypatch.setattr(trees, "CACHE", tmp_path)
    monkeypatch.setattr(trees, "resolve", lambda revision: "0123456789abcdef")
    monkeypatch.setattr(trees, "_check_out", lambda full, tree: tree.mkdir(exist_ok=True))
    monkeypatch.setattr(trees.subprocess, "run", run)
    with pytest.raises(TreeError, match="0123456789ab does not build: error: planted"):
        trees.built("v1")
    for _ in range(2):
        assert trees.built("v1") == Tree(tmp_path / "0123456789ab", "0123456789ab")
    assert len(calls) == 2
    monkeypatch.setattr(torch, "__version__", "0.0")  # an extension works with the torch it was built for
    trees.built("v1")
    assert len(calls) == 3


def test_stale_extension_is_reported(tmp_path):
    (tmp_path / "fastlstm").mkdir()
    (tmp_path / "csrc").mkdir()
    assert trees.stale_extension(tmp_path) == "fastlstm has no extension there"
    source, extension = tmp_path / "csrc" / "cell.h", tmp_path / "fastlstm" / "_C.so"
    for file in (source, extension):
        file.touch()
    os.utime(source, (1, 1))
    assert trees.stale_extension(tmp_path) == ""
    os.utime(extension, (0, 0))
    assert trees.stale_extension(tmp_path) == "its extension is older than csrc/cell.h"


# --- the command


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement: every case has the ratio `measured["ratio"]`."""
    outcome = {"ratio": 1.0, "status": "ok"}

    def measure(suite, case, sides, settings):
        rows = [AbRow(suite.name, case.name, mode, status=outcome["status"]) for mode in MODES]
        for row in rows if outcome["status"] == "ok" else []:
            row.ratio, row.ratio_low, row.ratio_high = (outcome["ratio"] * x for x in (1.0, 0.99, 1.01))
            row.launch_spread, row.round_error, row.launches, row.rounds, row.calls = 0.005, 0.005, 4, 6, 1
            row.old_p50_ms, row.new_p50_ms = outcome["ratio"], 1.0
        return rows

    monkeypatch.setattr(ab, "measure_case", measure)
    monkeypatch.setattr(trees, "resolve", lambda revision: revision)
    monkeypatch.setattr(trees, "built", lambda revision, say: Tree(ROOT, revision))
    monkeypatch.setattr(trees, "commit", lambda: "0123456789ab-dirty")
    return outcome


def test_command_reports_changes_means_and_a_dirty_tree(tmp_path, measured, capsys):
    measured["ratio"] = 0.9
    file = tmp_path / "ab.csv"
    assert command.main(["ab", "old", "--suite", "quick", "random", "--filter", "T=1 B=1", "--output", str(file)]) == 0
    text = capsys.readouterr().out
    assert "new: 0123456789ab-dirty (the working tree)" in text
    assert "uncommitted changes" in text
    assert "quick, train: geometric mean 0.900x over 1 cases, min 0.900x (T=1 B=1 I=64 H=64 streaming)" in text
    assert "slower: T=1 B=1 I=64 H=64 streaming, forward: 0.900x (0.891 .. 0.909; noise 2.0%)" in text
    rows = results.read(file, AbRow)
    assert {row.verdict for row in rows} == {SLOWER}
    assert all([row.device, row.threads, row.torch, row.date] for row in rows)
    assert file.read_text().splitlines()[0].split(",") == [field.name for field in fields(AbRow)]
    measured["ratio"] = 1.0
    assert command.main(["ab", "old", "--suite", "quick"]) == 0
    assert "no case is outside noise" in capsys.readouterr().out


@pytest.mark.parametrize(("side", "status"), [("old", 0), ("new", 1)])
def test_command_fails_if_the_new_revision_is_wrong(side, status, measured, capsys):
    measured["status"] = f"refused: {side} is WRONG: output"
    assert command.main(["ab", "old", "--new", "newer", "--suite", "quick", "--filter", "T=1 B=1"]) == status
    text = capsys.readouterr().out
    assert f"{side} is WRONG" in text
    assert "geometric mean" not in text


@pytest.mark.parametrize("words", [["--launches", "1"], ["--clock", "cpu", "--threads", "2"]], ids=" ".join)
def test_invalid_settings_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["ab", "old", *words])
    assert words[0] in capsys.readouterr().err
