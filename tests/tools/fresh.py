"""New virtual environments outside the checkout: torch and its requirements, linked from the running interpreter's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BUILD = ("torch", "setuptools", "wheel", "ninja", "pip")


def distributions(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The distributions `names` and their requirements, by name; extras are not followed."""
    found: dict[str, metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = re.sub("[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        requirements = map(Requirement, found[name].requires or ())
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link(distribution: metadata.Distribution, site: Path, without: Iterable[str] = ()) -> None:
    """Link the files of `distribution` in site-packages, without bytecode, which would be rewritten."""
    for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__", *without}:
        if not (site / name).exists():  # packages share nvidia/
            (site / name).symlink_to(Path(distribution.locate_file(name)).resolve())


def repository_files() -> set[str]:
    """All files of the repository that git does not ignore; an empty set outside a clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ran.returncode != 0 or not (ROOT / ".git").exists():
        return set()
    return {name for name in ran.stdout.splitlines() if (ROOT / name).exists()}


def sdist(folder: Path, **variables: str) -> Path:
    """Build the sdist from a copy of the repository without build artifacts."""
    tree = folder / "tree"
    files = repository_files()
    if not files:
        pytest.skip("not a clone of the repository")
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "gztar", "--dist-dir", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tree, env={**os.environ, **variables})
    assert ran.returncode == 0, ran.stderr
    (archive,) = folder.glob("fastlstm-*.tar.gz")
    return archive


class Environment:
    """A virtual environment at `path` with the packages `names` and their requirements, without fastlstm.

    With `torch_version`, torch's metadata and torch/version.py name that version. torch.version.cuda is always None, so
    that tests are independent of the installed build.
    """

    def __init__(self, path: Path, names: Iterable[str] = BUILD, torch_version: str | None = None) -> None:
        venv.create(path, with_pip=False, symlinks=True)
        self.python = path / "bin" / "python"
        self.home = path.parent
        (site,) = path.glob("lib/python*/site-packages")
        found = distributions(names)
        torch = found.pop("torch")
        for distribution in found.values():
            link(distribution, site)
        self.torch_version = torch_version or torch.version
        (info,) = {file.parts[0] for file in torch.files or () if file.parts[0].endswith(".dist-info")}
        link(torch, site, without=("torch", info))
        (site / f"torch-{self.torch_version}.dist-info").mkdir()
        text = Path(torch.locate_file(info), "METADATA").read_text()
        text = re.sub("^Version: .*$", f"Version: {self.torch_version}", text, flags=re.M)
        (site / f"torch-{self.torch_version}.dist-info" / "METADATA").write_text(text)
        (site / "torch").mkdir()
        for entry in Path(torch.locate_file("torch")).resolve().iterdir():
            if entry.name not in ("__pycache__", "version.py"):
                (site / "torch" / entry.name).symlink_to(entry)
        text = Path(torch.locate_file("torch"), "version.py").read_text()
        text = re.sub("^__version__ = .*$", f"__version__ = {self.torch_version!r}", text, flags=re.M)
        (site / "torch" / "version.py").write_text(re.sub("^cuda.*$", "cuda = None", text, flags=re.M))

    def run(self, *arguments: str, path: Iterable[Path | str] = (), **variables: str) -> str:
        """Run `python *arguments` outside the checkout; return both output streams; fail if it fails.

        PATH has the folders `path` and that of ninja only; other variables are those in `variables`.
        """
        keep = {k: v for k, v in os.environ.items() if k in ("HOME", "TMPDIR", "LD_LIBRARY_PATH", "LANG", "MAX_JOBS")}
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        folders = [*map(str, path), str(self.python.parent)]
        if ninja:
            (self.python.parent / "ninja").unlink(missing_ok=True)
            (self.python.parent / "ninja").symlink_to(ninja)
        keep |= {"PATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1", **variables}
        ran = subprocess.run(
            [str(self.python), *arguments], capture_output=True, text=True, env=keep, cwd=self.home, errors="replace"
        )
        said = ran.stdout + ran.stderr
        assert ran.returncode == 0, said
        return said

    def pip(self, *arguments: str, path: Iterable[Path | str] = (), **variables: str) -> str:
        """Run pip with -v, which shows the output of setup.py."""
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
        return self.run("-m", "pip", arguments[0], "-v", *options, *arguments[1:], path=path, **variables)
