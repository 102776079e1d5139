"""Packaging: the sdist contains the whole repository, and pyproject.toml declares what the code imports."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tarfile
from pathlib import Path

import pytest

from .fresh import ROOT, repository_files, sdist

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MADE = re.compile(r"(PKG-INFO|setup\.cfg|fastlstm\.egg-info(/.*)?)$")  # by setuptools

MODULES = {
    "pytorch-lightning": "pytorch_lightning",
    "pytest-benchmark": "pytest_benchmark",
    "Resemblyzer": "resemblyzer",
    "sb3-contrib": "sb3_contrib",
    "stable-baselines3": "stable_baselines3",
}
INDIRECT = {("models", "setuptools")}  # Resemblyzer imports pkg_resources
PLUGINS = {"pytest-xdist": "-n 2 --dist"}  # of pytest, in use if the Makefile has this option
BY_HAND = {"haste_pytorch", "flashrnn"}  # baselines of the benchmarks that are not on PyPI
# (folder, extras whose packages its files may import); subfolders first.
PLACES = (
    ("fastlstm/tutorials", ["tutorials"]),
    ("fastlstm/backends/triton", ["triton"]),
    ("fastlstm", []),
    ("benchmarks/models", ["benchmarks", "models"]),
    ("benchmarks", ["benchmarks", "xla"]),
    ("tests", ["test", "integrations", "triton", "xla"]),
    ("scripts", []),
    ("docs", []),
)


def requirements(extra: str | None) -> set[str]:
    listed = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    return {re.match(r"[\w.-]+", line)[0] for line in listed if not line.startswith("fastlstm[")}


@functools.lru_cache
def imported(path: Path) -> set[str]:
    """Other top-level modules that a file imports, also by import_module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and re.search(r"import_?(module|orskip)$", ast.unparse(node.func)):
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    ours = {"fastlstm", "benchmarks", "tests"} | set(sys.stdlib_module_names)
    return {name.split(".")[0] for name in found} - ours


def imports_of(folder: str) -> dict[Path, set[str]]:
    """Imports of the files in `folder` that are in no earlier folder of PLACES."""
    names = [name for name, _ in PLACES]
    before = [ROOT / name for name in names[: names.index(folder)]]
    files = [path for path in (ROOT / folder).rglob("*.py") if not any(path.is_relative_to(b) for b in before)]
    return {path: imported(path) for path in files}


def test_sdist_contains_every_file_of_the_repository(tmp_path):
    """Sources for every device, the tests and their data included, even if nothing is built."""
    with tarfile.open(sdist(tmp_path, FASTLSTM_BUILD="python")) as packed:
        names = {member.name.partition("/")[2] for member in packed if member.isfile()}
    files = repository_files()
    assert sorted(files - names) == []
    assert sorted(name for name in names - files if not MADE.match(name)) == []


@pytest.mark.parametrize(("folder", "extras"), PLACES, ids=[name for name, _ in PLACES])
def test_every_import_is_declared(folder, extras):
    declared = requirements(None).union(*map(requirements, extras))
    modules = {MODULES.get(name, name) for name in declared}
    for path, names in imports_of(folder).items():
        assert names - modules - BY_HAND == set(), path.relative_to(ROOT)


@pytest.mark.parametrize("extra", [None, "triton", "tutorials", "benchmarks", "models", "test", "integrations", "xla"])
def test_every_dependency_is_imported(extra):
    folders = [folder for folder, extras in PLACES if (extra in extras if extra else folder == "fastlstm")]
    used = set().union(*(names for folder in folders for names in imports_of(folder).values()))
    makefile = (ROOT / "Makefile").read_text()
    for name in requirements(extra):
        if (extra, name) not in INDIRECT:
            assert MODULES.get(name, name) in used or (name in PLUGINS and PLUGINS[name] in makefile), name


def test_development_tools_are_makefile_commands():
    for name in requirements("dev"):
        assert re.search(rf"\$\(BIN\)/(python -m )?{name}\b", (ROOT / "Makefile").read_text()), name


def test_docs_tools_are_used():
    used = (ROOT / "Makefile").read_text() + (ROOT / "docs" / "conf.py").read_text()
    for name in requirements("docs"):
        assert re.search(rf"\b{name.replace('-', '_')}\b", used), name


def test_tools_know_the_oldest_python():
    """requires-python, ruff and mypy have one Python version, so that accepted code runs there."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == "py" + oldest.replace(".", "")
