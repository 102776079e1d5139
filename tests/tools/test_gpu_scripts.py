"""scripts/gpu_*.sh without a GPU: stages, time limits and archive; other programs are replaced by stubs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {
    "gpu_first": ("build", "compile_exchange", "compile_latency", "crash_probe", "exchange", "latency", "adversarial"),
    "gpu_correctness": (
        "build",
        "persistent",
        "graphs",
        "parity",
        "memcheck",
        "launches_A",
        "launches_B",
        "launches_D",
        "racecheck",
    ),
    "gpu_numbers": ("build", "compile_steps", "steps", "ragged", "data_flags", "points", "ncu_512", "ncu_1024"),
}


@pytest.fixture
def call(tmp_path):
    """Run a script in a copy of its files; the stub of nvcc makes programs that print a line."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not on the PATH")
    tree, programs = tmp_path / "tree", tmp_path / "bin"
    (tree / "fastlstm").mkdir(parents=True)
    (tree / "fastlstm" / "_C.test.so").write_text("")
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    programs.mkdir()
    made = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf "#!/bin/sh\\necho row" >"$2"\nchmod +x "$2"\n'
    tests = '#!/bin/sh\ncase "$*" in *pytest*) exit ${STATUS:-0} ;; esac\n'
    nothing = dict.fromkeys(("nvidia-smi", "compute-sanitizer", "ncu"), "#!/bin/sh\n")
    for name, text in {"nvcc": made, "python": tests, **nothing}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(name: str, **environment: str) -> tuple[int, str, Path]:
        out = tmp_path / "out"
        given = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": str(programs / "python")}
        command = ["bash", str(tree / "scripts" / f"{name}.sh"), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, env=given | environment, timeout=60)
        return ran.returncode, ran.stdout + ran.stderr, out

    return run


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_and_writes_a_log(name, call):
    status, output, out = call(name)
    assert status == 0, output
    summary = (out / "summary.txt").read_text().splitlines()
    done = [line.split()[1].rstrip(":") for line in summary if line.startswith("==") and "exit 0" in line]
    assert tuple(dict.fromkeys(done)) == STAGES[name]
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {f"./{stage}.log" for stage in STAGES[name]} <= set(logs.getnames())


def test_built_extension_is_cached(call):
    call("gpu_first")
    status, output, out = call("gpu_numbers")
    assert status == 0, output
    assert (out / "_C.test.so").exists()
    assert "== build" not in output.split("== compile_steps")[0]


def test_stages_skipped_for_lack_of_time_are_named(call):
    call("gpu_first")
    status, output, out = call("gpu_correctness", CALL_SECONDS="10")
    assert status == 0, output
    assert "== persistent: left, for want of time" in (out / "summary.txt").read_text()


def test_failed_stage_sets_the_status_and_later_stages_run(call):
    status, output, out = call("gpu_correctness", STATUS="3")
    assert status == 3, output
    summary = (out / "summary.txt").read_text()
    assert all(f"== {stage}: exit 3" in summary for stage in STAGES["gpu_correctness"][1:4])
    assert "== racecheck: exit 0" in summary  # the exit status of compute-sanitizer


def test_script_without_arguments_prints_its_usage():
    ran = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_numbers.sh")], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "usage" in ran.stderr
