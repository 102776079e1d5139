"""How setup.py finds CUDA, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import setuptools
import torch

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py; nothing is built."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("FASTLSTM_BUILD", "python")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # so that what the functions set goes away again
    spec = importlib.util.spec_from_file_location("fastlstm_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_the_toolkit_behind_a_wrapper_is_found(setup, monkeypatch, tmp_path):
    """torch would take the folder above a script that only starts nvcc, where no header is."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    setup.set_cuda_home()
    assert Path(os.environ["CUDA_HOME"], "bin", "nvcc").exists()
    assert not Path(os.environ["CUDA_HOME"]).is_relative_to(tmp_path)


def test_a_given_toolkit_is_left_alone(setup, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/given")
    setup.set_cuda_home()
    assert os.environ["CUDA_HOME"] == "/given"


@pytest.mark.parametrize(("gpu", "given", "expected"), [(False, "", None), (False, "9.0", "9.0"), (True, "", "")])
def test_architectures(gpu, given, expected, setup, monkeypatch):
    """Ours where nobody says any and torch sees no GPU to ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    setup.set_architectures()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == (setup.ARCHITECTURES if expected is None else expected)
