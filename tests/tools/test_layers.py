"""The order of the package's layers (docs/architecture.md): imports point down, and `reference` imports torch alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fastlstm

PACKAGE = Path(fastlstm.__file__).parent
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}

# Lower layers first; a file may import from its layer and those above it in this list, __init__ from all.
LAYERS = (
    ("reference", "ragged", "accuracy"),
    ("ops",),
    ("backends",),
    ("transforms",),
    ("dispatch",),
    ("masks", "module_state", "functional"),
    ("cell", "modules", "convert", "explain", "portable", "out", "frozen", "freeze"),
    ("__init__", "__main__"),
    ("tutorials",),
)
OUTSIDE = {"torch", "triton"}  # what the library itself, all but its command lines, may import


def level(module: str) -> int:
    top = module.split(".")[0]
    found = [k for k, names in enumerate(LAYERS) if top in names]
    assert found, f"fastlstm/{module} is in no layer of tests/tools/test_layers.py; docs/architecture.md describes them"
    return found[0]


def imports(source: str, module: str, is_package: bool = False) -> tuple[set[str], set[str]]:
    """(modules of fastlstm, other top-level modules) that a file imports, anywhere in its code."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "fastlstm":
                    inside.add(".".join(parts[1:]) or "__init__")
                else:
                    outside.add(parts[0])
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                parents = [part for part in module.split(".") if part]
                above = node.level - is_package  # of the file's own name in the dotted path
                base = [*parents[: len(parents) - above], *base]
            elif base and base[0] == "fastlstm":
                base = base[1:]
            else:
                outside.add(base[0])
                continue
            for alias in node.names:
                target = ".".join([*base, alias.name])
                inside.add(target if target in FILES or f"{target}.__init__" in FILES else ".".join(base) or "__init__")
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            name = node.args[0].value
            (inside if name.startswith("fastlstm") else outside).add(name.removeprefix("fastlstm.").split(".")[0])
    return inside, outside


def imports_of(module: str) -> tuple[set[str], set[str]]:
    is_package = module.endswith("__init__")
    name = module.removesuffix("__init__").removesuffix(".")
    return imports(FILES[module].read_text(), name or "", is_package)


def test_import_parser():
    source = "import torch.nn\nfrom . import a\nfrom ..ops.schema import X\nfrom fastlstm.modules import LSTM\n"
    source += "import fastlstm.ragged\n"
    inside, outside = imports(source, "backends.eager")
    assert inside == {"backends", "ops.schema", "modules", "ragged"}
    assert outside == {"torch"}
    assert imports("def f():\n    from .dispatch import layer\n", "functional")[0] == {"dispatch"}
    assert imports("from . import convert\nfrom .ops import schema\n", "", is_package=True)[0] == {
        "convert",
        "ops.schema",
    }
    assert imports("from . import eager\nfrom .. import reference\n", "backends", is_package=True)[0] == {
        "backends.eager",
        "reference",
    }
    assert imports('importlib.import_module("fastlstm._C")', "backends.native")[0] == {"_C"}


@pytest.mark.parametrize("module", list(FILES))
def test_imports_point_down(module):
    inside, _ = imports_of(module)
    for target in inside - {"_C"}:
        if target == "__init__":
            assert level(module) >= level("__init__"), f"fastlstm.{module} imports the package itself"
        else:
            assert level(target) <= level(module), f"fastlstm.{module} imports fastlstm.{target}, a layer above its own"


@pytest.mark.parametrize("module", [m for m in FILES if level(m) < level("__main__")])
def test_library_imports_only_torch_and_the_standard_library(module):
    _, outside = imports_of(module)
    assert outside - OUTSIDE - set(sys.stdlib_module_names) == set()


def test_reference_imports_only_torch():
    assert imports_of("reference") == (set(), {"__future__", "torch"})


def test_only_the_native_backend_loads_the_extension():
    assert [m for m in FILES if "_C" in imports_of(m)[0]] == ["backends.native"]


def test_backends_do_not_import_each_other():
    for module in FILES:
        own = module.split(".")
        if own[0] == "backends" and own[1] != "__init__":
            for target in imports_of(module)[0]:
                assert target.split(".")[:2] == own[:2] or not target.startswith("backends"), (
                    f"{module} imports {target}"
                )


def test_no_import_cycles():
    graph = {m: {t if t in FILES else f"{t}.__init__" for t in imports_of(m)[0] - {"_C"}} - {m} for m in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_library_does_not_import_tests_or_benchmarks():
    for module in FILES:
        assert not imports_of(module)[1] & {"tests", "benchmarks"}, module
