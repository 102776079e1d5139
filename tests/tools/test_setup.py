"""Detection in setup.py: CUDA without a GPU, OpenMP, a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import BuildExtension

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def setup(monkeypatch):
    """The namespace of setup.py, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("FASTLSTM_BUILD", "python")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # so that the variables are restored
    spec = importlib.util.spec_from_file_location("fastlstm_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_toolkit_behind_an_nvcc_wrapper_is_found(setup, monkeypatch, tmp_path):
    """torch would use the parent folder of a wrapper script of nvcc, which has no headers."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    setup.set_cuda_home()
    assert Path(os.environ["CUDA_HOME"], "bin", "nvcc").exists()
    assert not Path(os.environ["CUDA_HOME"]).is_relative_to(tmp_path)


def test_cuda_home_is_not_overridden(setup, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/given")
    setup.set_cuda_home()
    assert os.environ["CUDA_HOME"] == "/given"


@pytest.mark.parametrize(("gpu", "arch_list", "expected"), [(False, "", None), (False, "9.0", "9.0"), (True, "", "")])
def test_architectures(gpu, arch_list, expected, setup, monkeypatch):
    """The default list if none is set and there is no GPU to query."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    setup.set_architectures()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == (setup.ARCHITECTURES if expected is None else expected)


def fake_compiler(folder: Path, status: int) -> str:
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >{folder}/arguments\nexit {status}\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize(
    ("system", "flags", "link"),
    [("linux", ["-fopenmp"], ["-fopenmp"]), ("darwin", ["-Xclang", "-fopenmp"], ["-lomp"])],
    ids=["linux", "darwin"],
)
def test_openmp(system, flags, link, setup, monkeypatch, tmp_path):
    """Links torch's runtime, which on macOS is in torch's folder, not the compiler's."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 0))
    found, linked, reason = setup.openmp()
    assert (found, linked[:1], reason) == (flags, link, "")
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(" ".join(flags))
    assert f"-I{Path(torch.__file__).parent / 'include'} " in arguments
    assert not linked[1:] or linked[1:] == ["-Wl,-rpath,@loader_path/../torch/lib"]


def test_build_without_openmp_is_single_threaded(setup, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 1)
    monkeypatch.setenv("CXX", compiler)
    assert setup.openmp() == ([], [], f"{compiler} finds no omp.h")


def test_windows_gets_pure_python(setup, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "MSVC" in setup.why_no_extension()
    assert setup.extensions("auto")[0] == []
    assert len(setup.notes) == 1
    assert setup.notes[0].startswith("installing as pure Python, because csrc/")
    with pytest.raises(SystemExit, match="FASTLSTM_BUILD=cpu: csrc/"):
        setup.extensions("cpu")


def test_notes_are_printed_once(setup, capsys):
    setup.notes.append("a note")
    setup.print_notes()
    setup.print_notes()
    assert capsys.readouterr().err == "fastlstm: a note\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not on the PATH")
@pytest.mark.parametrize(("torch_built_for", "again"), [(torch.__version__, False), ("2.10.0", True)])
def test_another_torch_forces_a_rebuild(torch_built_for, again, setup, monkeypatch, tmp_path):
    """Even if the extension is newer than its sources: a clone keeps its build folder when torch is upgraded."""
    forced = []
    monkeypatch.setattr(BuildExtension, "build_extension", lambda self, _: forced.append(bool(self.force)), False)
    (extension,), commands = setup.extensions("cpu")
    command = commands["build_ext"](setuptools.Distribution())
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "_C.so"))
    (tmp_path / "_C.so").write_bytes(b"fastlstm._C was built for torch %b\0" % torch_built_for.encode())
    command.build_extension(extension)
    assert forced == [again]
    # It is on every command line, so that ninja rebuilds objects of another torch.
    assert f'-DFASTLSTM_BUILT_FOR="{torch.__version__}"' in extension.extra_compile_args["cxx"]
