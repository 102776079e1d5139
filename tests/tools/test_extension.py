"""When the native backend loads fastlstm._C, decided from the file's bytes before loading it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastlstm.backends import native


@pytest.fixture
def why(monkeypatch, tmp_path):
    """Return the reason that torch 2.13.0+cu130 does not load a file of these bytes (None: no file), "" if it does."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def ask(content: bytes | None) -> str:
        origin = None if content is None else str(tmp_path / "_C.so")
        if content is not None:
            (tmp_path / "_C.so").write_bytes(content)
        spec = None if content is None else SimpleNamespace(origin=origin)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        return native._why_not_loaded()

    return ask


@pytest.mark.parametrize("built", ["2.13.0+cu130", "2.13.0+cpu", "2.13.0", "2.13.0+cu130 with CUDA 13.0"])
def test_extension_loads_with_its_torch(built, why):
    """A CPU extension works with every variant of one version."""
    assert why(b"\x7fELF\0fastlstm._C was built for torch %b\0\xff" % built.encode()) == ""


@pytest.mark.parametrize("built", ["2.12.1+cu130", "2.13.1+cu130", "2.13.0a0+git1234567", "2.1", "2.13.0.dev20260101"])
def test_extension_of_another_torch_is_refused(built, why):
    expected = f"it was built for torch {built} and this is torch 2.13.0+cu130"
    assert why(b"\0fastlstm._C was built for torch %b\0" % built.encode()) == expected


def test_extension_of_another_cuda_is_refused(why):
    reason = why(b"\0fastlstm._C was built for torch 2.13.0+cu126 with CUDA 12.6\0")
    assert reason == "it was built for torch 2.13.0+cu126 with CUDA 12.6 and this is torch 2.13.0+cu130"


def test_file_without_a_record_is_refused(why):
    assert why(b"\x7fELF\0 of before this was written down") == "it does not say which torch it was built for"
    assert why(None) == "it was not built"


@pytest.mark.skipif(native.extension is None, reason=native.load_error)
def test_extension_records_its_torch():
    content = Path(native.extension.__file__).read_bytes()
    assert f"fastlstm._C was built for torch {torch.__version__}".encode() in content
