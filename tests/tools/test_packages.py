"""The sdist and the wheel in fresh environments outside the checkout (pytest -m packages).

The extension is compiled once: all environments that build it have one path, so that up-to-date objects are reused.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .fresh import Environment, sdist

pytestmark = pytest.mark.packages

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="c++ is not on the PATH")
OTHER = "2.99.0+cpu"  # a torch that the extension was not built for

# A training step that equals nn.LSTM's; every warning but torch's about a missing NumPy is an error.
TRAIN = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch, fastlstm
assert "site-packages" in fastlstm.__file__, fastlstm.__file__
torch.manual_seed(0)
theirs = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
ours = fastlstm.convert(torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64))
ours.load_state_dict(theirs.state_dict())
x = torch.randn(7, 4, 3, dtype=torch.float64)
for module in (theirs, ours):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x)[0].square().sum().backward()
    optimizer.step()
for ours, theirs in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs)
print("explained:", fastlstm.explain(fastlstm.LSTM(3, 5), torch.randn(7, 4, 3)))
print("trained on", fastlstm.explain(fastlstm.LSTM(3, 5), torch.randn(7, 4, 3)).backend)
"""

USER = """
import torch
import fastlstm
lstm = fastlstm.LSTM(3, 5, num_layers=2)
backend: str = fastlstm.explain(lstm, torch.zeros(1, 1, 3)).backend
with fastlstm.use_backend("eager"):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """The unpacked sdist."""
    with tarfile.open(sdist(folder)) as packed:
        if hasattr(tarfile, "data_filter"):
            packed.extractall(folder, filter="data")
        else:
            packed.extractall(folder)
    shutil.rmtree(folder / "tree")
    (unpacked,) = (path for path in folder.glob("fastlstm-*") if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def tools(folder) -> Path:
    """A PATH folder with the compiler's tools and without nvcc. Its c++ does not optimize, to save time.

    It is Clang where there is Clang: the checkout is built by c++, and Clang compiles torch's headers faster.
    """
    compiler = shutil.which("clang++") or COMPILER
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cc", "gcc", "as", "ld", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    for name in ("c++", "g++"):
        (tools / name).write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
        (tools / name).chmod(0o755)
    return tools


@pytest.fixture
def environment(folder) -> Iterator[Environment]:
    yield Environment(folder / "environment")
    shutil.rmtree(folder / "environment")


@needs_compiler
def test_sdist_with_a_compiler(environment, source, tools):
    said = environment.pip("install", str(source), path=[tools])
    assert said.count("fastlstm: building for CPU alone, because torch") == 1
    assert "pure Python" not in said
    assert "trained on native" in environment.run("-c", TRAIN)


def test_sdist_without_a_compiler(environment, source):
    said = environment.pip("install", str(source))
    assert said.count("fastlstm: installing as pure Python, because there is no C++ compiler (c++)") == 1
    said = environment.run("-c", TRAIN)
    assert "trained on eager" in said
    assert "fastlstm._C is not available: it was not built; install" in said


@needs_compiler
def test_sdist_with_nvcc_but_a_torch_without_cuda(environment, source, tools, folder):
    toolkit = folder / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (toolkit / name).parent.mkdir(parents=True)
        (toolkit / name).write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    said = environment.pip("install", str(source), path=[toolkit / "bin", tools])
    reason = f"torch {environment.torch_version} is not a CUDA build"
    assert said.count(f"fastlstm: building for CPU alone, because {reason}\n") == 1
    assert "trained on native" in environment.run("-c", TRAIN)


@needs_compiler
def test_wheel_under_another_torch(environment, source, tools, folder):
    """It falls back and names the torch it was built for, without loading the extension."""
    environment.pip("wheel", "--wheel-dir", str(folder / "wheels"), str(source), path=[tools])
    (wheel,) = (folder / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastlstm/py.typed" in names
    assert len([name for name in names if re.fullmatch(r"fastlstm/_C\..*so", name)]) == 1
    assert not [name for name in names if not re.match(r"fastlstm(/|-[\w.]+\.dist-info/)", name)]

    other = Environment(folder / "other", torch_version=OTHER)
    other.pip("install", str(wheel))
    reason = f"it was built for torch {environment.torch_version} and this is torch {OTHER}"
    said = other.run("-c", TRAIN)
    assert "trained on eager" in said
    assert reason in said
    said = other.run("-c", "import fastlstm, sys; print(sorted(m for m in sys.modules if m.startswith('fastlstm._')))")
    assert said.splitlines()[0] == "[]"
    assert f"extension  not available: {reason}" in other.run("-m", "fastlstm")


def test_types_of_the_installed_package(folder, source):
    """mypy uses the package's type hints: it accepts a correct program and refuses a wrong one."""
    typed = Environment(folder / "typed")
    typed.pip("install", str(source), FASTLSTM_BUILD="python")
    # mypy does not follow torch, whose hints take it a minute.
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")

    def check(program: str) -> str:
        (folder / "user.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "mypy_cache"]
        command += ["--python-executable", str(typed.python), "user.py"]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout

    assert "Success" in check(USER)
    wrong = check(USER.replace('"eager"', "3").replace("backend: str", "backend: int"))
    assert "[arg-type]" in wrong
    assert "[assignment]" in wrong
