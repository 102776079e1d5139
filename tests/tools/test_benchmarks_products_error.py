"""python -m benchmarks --suite products_error: emulated TF32, rows, refusal, tables, plot; figures of the docs."""

# ruff: noqa: E402 - the imports below need packages that not every installation has

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

for package in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(package)

from benchmarks import plot, products_error, report, results, suites
from benchmarks.cases import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.products_error import PRODUCTS, SEEDS, SWEEPS, TENSORS, Inputs, round_to_tf32
from benchmarks.results import ErrorRow
from benchmarks.run import failures
from fastlstm.backends import native

from ..machine import cpuinfo
from .fresh import ROOT

COMMITTED = results.RESULTS / "intel-r-xeon-r-processor-avx512-1-threads" / "products_error.csv"
TINY = Case(T=3, B=4, I=5, H=8)
needs_native = pytest.mark.skipif(native.extension is None, reason="needs the extension")


def nearest_of_10_bits(value: torch.Tensor) -> torch.Tensor:
    """To nearest, ties away from zero, by float64 arithmetic, in which every step here is exact."""
    mantissa, exponent = torch.frexp(value.double().abs())  # mantissa in [1/2, 1)
    return value.double().sign() * torch.ldexp((mantissa * 2**11 + 0.5).floor(), exponent - 11)


def test_tf32_rounding_is_exact():
    kept = torch.arange(1024, 2048) / 1024.0
    half = 2.0**-11
    ties = kept + half
    below, above = torch.nextafter(ties, kept), torch.nextafter(ties, kept + 1)
    scales = torch.tensor([2.0**-120, 1.0, 2.0**100])[:, None]
    for values, expected in ((kept, kept), (ties, kept + 2 * half), (below, kept), (above, kept + 2 * half)):
        for sign in (-1, 1):
            assert torch.equal(round_to_tf32(sign * scales * values), sign * scales * expected)
    torch.manual_seed(0)
    random = torch.randn(10_000) * 2.0 ** torch.randint(-100, 100, (10_000,))
    assert torch.equal(round_to_tf32(random).double(), nearest_of_10_bits(random))


def test_tf32_rounding_keeps_zeros_and_non_finite_values():
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    rounded = round_to_tf32(special)
    assert torch.equal(rounded[:4], special[:4])
    assert rounded[1].signbit()
    assert rounded[4].isnan()


def test_factors_of_every_product_are_rounded_and_nothing_else(monkeypatch):
    inputs, factors = Inputs.of(TINY, 0), []
    monkeypatch.setattr(products_error, "round_to_tf32", lambda value: factors.append(value) or round_to_tf32(value))
    products_error.results_of(inputs, "tf32")
    # Forward x W_ih^T and h W_hh^T; backward dgates^T h and, but for the first step, dgates W_hh.
    assert len(factors) == 2 * (4 * TINY.T - 1)
    fine = torch.full((2, 3), 1 + 2.0**-20)
    square = fine * fine
    with products_error.Tf32Products():
        assert torch.equal(torch.addmm(fine, torch.zeros(2, 4), torch.ones(4, 3)), fine)
        assert torch.equal(fine * fine, square)
        assert torch.equal(fine @ fine.T, torch.full((2, 2), 3.0))


@needs_native
def test_rows_have_the_errors_against_float64():
    inputs, x64 = Inputs.of(TINY, 1), Inputs.of(TINY, 1).x.double()
    rows = products_error.measured("over H", TINY, 1)
    assert [(row.products, row.tensor) for row in rows] == [(p, t) for p in PRODUCTS for t in TENSORS]
    truth = torch.nn.LSTM(5, 8, dtype=torch.float64)
    truth.load_state_dict(inputs.layer.state_dict())
    output = truth(x64)[0]
    output.backward(inputs.grad_output.double())
    output = output.detach()
    for products, off in (("ieee", 1e-5), ("tf32", 1e-2)):
        for row, expected in zip(
            (row for row in rows if row.products == products), (output, truth.weight_hh_l0.grad), strict=True
        ):
            error = products_error.results_of(inputs, products)[row.tensor].double() - expected
            assert row.status == "ok"
            assert row.rms_error == pytest.approx(float(error.norm() / expected.norm()))
            assert row.max_error == pytest.approx(float(error.abs().max() / expected.abs().max()))
            assert 0 < row.rms_error < off
            assert row.error <= row.error_allowed
            assert 0.1 < row.rms_error / row.rms_predicted < 2
            assert (row.T, row.B, row.I, row.H, row.kind, row.seed) == (3, 4, 5, 8, "over H", 1)
    assert {row.impl for row in rows if row.products == "tf32"} == {"emulated"}


@needs_native
def test_absent_bfloat16_products_are_reported():
    """A layer of 8 units has none on any CPU."""
    rows = [row for row in products_error.measured("over H", TINY, 0) if row.products == "bf16"]
    assert len(rows) == len(TENSORS)
    for row in rows:
        assert row.status.startswith("skipped: bfloat16 products are not available: ")
        assert "ATEN_CPU_CAPABILITY=avx512" in row.status
        assert row.rms_error is None
    assert not failures(rows, IMPLEMENTATIONS)


@needs_native
def test_bfloat16_products_are_measured(tmp_path):
    """In a process of its own, where the command selects the kernels by an environment variable."""
    if "avx512_bf16" not in cpuinfo("flags"):
        pytest.skip("this CPU has no AVX512_BF16")
    arguments = ["--suite", "products_error", "--threads", "1", "--filter", "T=10 B=4 I=128 H=128 seed 0"]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--out", str(tmp_path)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx512"}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = results.read(tmp_path / "products_error.csv")
    assert {row.status for row in rows} == {"ok"}
    errors = {(row.products, row.tensor): row.rms_error for row in rows}
    assert {row.backend for row in rows if row.products == "bf16"} == {"avx512_bf16"}
    for tensor in TENSORS:  # 8 = 2^-8 / 2^-11
        assert 6 < errors["bf16", tensor] / errors["tf32", tensor] < 10


@needs_native
@pytest.mark.parametrize(
    ("products", "fault"),
    [
        ("ieee", lambda results: {**results, "output": round_to_tf32(results["output"])}),
        ("ieee", lambda results: {**results, "d_weight_hh": results["d_weight_hh"] * (1 + 2.0**-15)}),
        ("tf32", lambda results: {**results, "output": results["output"] * 1.01}),
    ],
)
def test_planted_error_is_refused(products, fault, monkeypatch):
    results_of = products_error.results_of
    monkeypatch.setattr(products_error, "results_of", lambda inputs, p: fault(results_of(inputs, p)))
    rows = [row for row in products_error.measured("over H", TINY, 0) if row.products == products]
    wrong = failures(rows, IMPLEMENTATIONS)
    assert len(wrong) == 1
    assert wrong[0].status.startswith("WRONG: ")
    assert wrong[0].error > wrong[0].error_allowed


def test_bfloat16_factors_do_not_pass_as_tf32(monkeypatch):
    monkeypatch.setattr(products_error, "round_to_tf32", lambda value: value.bfloat16().float())
    rows = products_error.measured("over H", Case(T=20, B=16, I=32, H=32), 0)
    assert {row.status.split(":")[0] for row in rows if row.products == "tf32"} == {"WRONG"}


def test_cases_that_are_done_are_left_out():
    total = len(SEEDS) * sum(len(cases) for cases in SWEEPS.values())
    assert suites.size_of("products_error") == total
    assert suites.size_of("products_error", "H=32 ", {"T=50 B=16 I=32 H=32 seed 0"}) == len(SEEDS) - 1


def row_of(sweep: str, products: str, tensor: str, seed: int, **columns: float) -> ErrorRow:
    return ErrorRow(
        suite="products_error", case=f"{sweep} seed {seed}", mode="train", impl="fastlstm", kind=sweep, T=50, B=4,
        H=32, device="CPU", threads=1, torch="2", commit="abc", date="2026-11-30", products=products, tensor=tensor,
        seed=seed, error_allowed=1.0, **columns,
    )  # fmt: skip


def test_tables_show_medians_and_ranges(tmp_path):
    of_products = {"ieee": 1e-7, "tf32": 2e-4, "bf16": 1.6e-3}
    rows = [
        row_of(
            sweep, products, tensor, seed, rms_error=size * (1 + seed), rms_predicted=4 * size, error=0.1 * (1 + seed)
        )
        for sweep in SWEEPS
        for products, size in of_products.items()
        for tensor in TENSORS
        for seed in SEEDS
    ]
    file = tmp_path / "products_error.csv"
    results.write(rows, file)
    text = report.markdown(results.read(file))
    assert text.startswith("CPU, 1 threads, torch 2, commit abc, 2026-11-30.\n\n| H (T = 50, B = 4) |")
    assert "| 32 | 2.0e-7 | 4.0e-4 | 3.2e-3 | 2.0e-7 | 4.0e-4 | 3.2e-3 |" in text
    assert "| 50 | 2.0e-7 |" in text
    assert "medians of 3 seeds" in text
    assert "| float32, output |  |  | 0.25 to 0.75 | 30% |" in text
    assert "| bfloat16, gradient of weight_hh | 16,000 to 16,000 | 8 to 8 | 0.25 to 0.75 | 30% |" in text
    assert report.main([str(file)]) == 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_plot_leaves_out_what_was_not_measured(tmp_path):
    rows = [row_of("over T", "ieee", tensor, 0, rms_error=1e-7, rms_predicted=2e-7) for tensor in TENSORS]
    assert plot.draw(rows, tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert plot.draw([row_of("over T", "bf16", "output", 0)], tmp_path / "none.png") is None


def test_figures_of_the_docs_are_those_of_the_csv():
    """docs/numerics.md, the text below the tables; tests/tools/test_docs.py compares the tables."""
    rows = results.read(COMMITTED)
    assert {row.case for row in rows} == {products_error.case_name(*case) for _, *case in products_error.chosen()}
    assert {row.status for row in rows} == {"ok"}
    assert not any("dirty" in row.commit for row in rows)

    def medians(sweep: str, products: str, tensor: str) -> list[float]:
        of_sweep = [row for row in rows if row.kind == sweep]
        keys = [{sweep[-1]: size, "products": products, "tensor": tensor} for size in products_error.sizes(rows, sweep)]
        return [products_error.median_error(of_sweep, "rms_error", **key) for key in keys]

    over_all = {
        (products, tensor): [error for sweep in SWEEPS for error in medians(sweep, products, tensor)]
        for products in ("tf32", "bf16")
        for tensor in TENSORS
    }
    differ = max(max(errors) / min(errors) for errors in over_all.values()) - 1
    over_h, over_t = medians("over H", "ieee", "output"), medians("over T", "ieee", "d_weight_hh")
    shares = [row.rms_error / row.rms_predicted for row in rows if row.products != "ieee"]
    largest = max(row.error / row.error_allowed for row in rows)
    page = " ".join((ROOT / "docs" / "numerics.md").read_text().split())
    for text in (
        f"differ by at most {100 * differ:.0f} % over all sizes",
        f"the output's {over_h[-1] / over_h[0]:.1f}x from H = 32 to 1024",
        f"the gradient's {over_t[-1] / over_t[0]:.1f}x from T = 10 to 3000",
        f"sqrt(3 / (8 ln 2)) = {math.sqrt(3 / (8 * math.log(2))):.2f} of that",
        f"TF32 and bfloat16 have {min(shares):.2f} to {max(shares):.2f} of the predicted error",
        f"The largest error of any result is {largest:.0%} of its bound".replace("%", " %"),
    ):
        assert text in page, text
    for tensor in TENSORS:
        pairs = zip(over_all["bf16", tensor], over_all["tf32", tensor], strict=True)
        assert all(7.5 < bf16 / tf32 < 8.5 for bf16, tf32 in pairs)
