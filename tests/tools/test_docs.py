"""Documentation: examples run, tables match the CSVs, links and named files exist, formulas hold."""

from __future__ import annotations

import doctest
import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch

import fastlstm
from benchmarks import report, results
from fastlstm import accuracy, convert, dispatch, explain, frozen, functional, modules, reference
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


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def examples_of(page: Path) -> list[doctest.Example]:
    parser = doctest.DocTestParser()
    return [example for block in code_blocks(page) for example in parser.get_examples(block)]


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text()], ids=lambda page: page.name)
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """The code blocks of a page share a namespace, and a folder for the files they write."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    found = run(examples_of(page), page.name)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.slow
def test_examples_without_a_prompt_run(tmp_path, monkeypatch):
    """docs/deploying.md: what compiles for seconds, or needs packages, stands in blocks without ">>> "."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "deploying.md"
    namespace = {"torch": torch, "fastlstm": fastlstm}
    expected_error = "backward()"
    for example in examples_of(page):
        if expected_error not in example.source and "thaw" not in example.source:  # `model` stays frozen
            exec(example.source, namespace)
    blocks = [block for block in code_blocks(page) if ">>> " not in block]
    assert len(blocks) == 3
    for block in blocks:
        exec(block, namespace)
    with torch.inference_mode():
        expected, _ = namespace["model"](namespace["x"])
    torch.testing.assert_close(namespace["scores"], expected)
    assert (tmp_path / "tagger.onnx").exists()


@pytest.mark.parametrize(
    "module",
    [modules, functional, convert, dispatch, explain, frozen, reference, native, accuracy, schema],
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


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/deploying.md", "docs/numerics.md"])
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


@pytest.mark.skipif(native.extension is None, reason="needs the extension")
@pytest.mark.parametrize("outlier", [1, 10])
def test_formula_of_the_int8_error_holds(outlier):
    """docs/numerics.md, "int8": the standard deviation of a pre-activation's error, over 200 rows and 2,048 units."""
    torch.manual_seed(0)
    K, H = 256, 512
    lstm = torch.nn.LSTM(K, H, bias=False)
    w = lstm.weight_ih_l0.detach().double()
    layer = fastlstm.freeze(lstm, weights=torch.int8)
    w_scale = layer.state_dict()["weight_ih_l0_scale"].double()
    measured, derived = [], []
    for _ in range(200):
        x = torch.randn(K)
        x[0] *= outlier
        sums, x_scale = native.extension.int8_sums(x, layer.packed_l0)
        x, x_scale = x.double(), x_scale.double()
        measured.append(sums * w_scale * x_scale - w @ x)
        derived.append((w_scale.square() * x.square().sum() + x_scale.square() * w.square().sum(1)) / 12)
    ratio = torch.stack(measured).square().mean().sqrt() / torch.stack(derived).mean().sqrt()
    assert 0.97 < ratio < 1.03


def test_formulas_of_the_backward_pass_hold():
    spec = importlib.util.spec_from_file_location("docs_backward", ROOT / "docs" / "backward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 0
