"""Documentation: examples run, tables match the CSVs, links and named files exist, formulas hold."""

from __future__ import annotations

import doctest
import importlib.util
import re
import types

import pytest
import torch

import fastlstm
from benchmarks import report, results
from fastlstm import accuracy, convert, dispatch, explain, functional, modules, reference
from fastlstm.backends import native
from fastlstm.ops import schema

from .fresh import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def run(examples: list[doctest.Example], name: str) -> doctest.TestResults:
    test = doctest.DocTest(examples, {"torch": torch, "fastlstm": fastlstm}, name, name, 0, None)
    return doctest.DocTestRunner(optionflags=FLAGS).run(test)


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text()], ids=lambda page: page.name)
def test_examples_of_a_page_run(page):
    """The code blocks of a page share a namespace."""
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    parser = doctest.DocTestParser()
    examples = [example for block in blocks for example in parser.get_examples(block)]
    found = run(examples, page.name)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    "module",
    [modules, functional, convert, dispatch, explain, reference, native, accuracy, schema],
    ids=lambda module: module.__name__,
)
def test_examples_of_docstrings_run(module):
    if not isinstance(module, types.ModuleType):  # a function of the package has the module's name
        module = importlib.import_module(module.__module__)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for test in tests:
        assert run(test.examples, test.name).failed == 0, test.name


def test_every_public_name_has_an_example():
    public = [getattr(fastlstm, name) for name in fastlstm.__all__]
    public += [fastlstm.LSTM.forward, fastlstm.LSTMCell.forward, functional.lstm, functional.lstm_cell]
    for thing in public:
        if not isinstance(thing, types.ModuleType) and thing is not fastlstm.Explanation:
            assert ">>> " in thing.__doc__, thing


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_tables_match_the_csvs(name):
    """`python -m benchmarks.report --readme FILE` writes them."""
    page = ROOT / name
    text = page.read_text()
    expected = report.sections(sorted(results.RESULTS.glob("*/*.csv")), page)
    expected["headline"] = report.headline_section(page)
    markers = re.findall(r"<!-- benchmarks:(\S+) -->", text)
    assert markers
    for marker in markers:
        assert f"<!-- benchmarks:{marker} -->\n{expected[marker]}\n<!-- /benchmarks:{marker} -->" in text, marker


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_code(file.read_text()), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page):
    """Paths in backticks that begin with a folder of the repository."""
    folders = r"(?:csrc|fastlstm|tests|benchmarks|scripts|docs)"
    for path in set(re.findall(rf"`({folders}/[\w./-]+)`", without_code(page.read_text()))):
        assert (ROOT / path).exists(), path


def test_table_of_tuning_constants_is_complete():
    header, page = (ROOT / "csrc/cpu/tuning.h").read_text(), (ROOT / "docs/cpu-kernels.md").read_text()
    defined = set(re.findall(r"(?:^inline constexpr .*?|, )(k[A-Z]\w+)(?: =|\[|;)", header, flags=re.MULTILINE))
    assert defined == set(re.findall(r"`(k[A-Z]\w+)`", page))


def test_formulas_of_the_backward_pass_hold():
    spec = importlib.util.spec_from_file_location("docs_backward", ROOT / "docs" / "backward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 0
