"""The plans of the CPU code (csrc/cpu/plan.h): the golden file, what every plan must satisfy, and what explain says."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm.backends import native

from ..cases import Case
from ..machine import cpuinfo
from .plans import COLUMNS, MACHINES, candidates_of, golden_rows, plan_of, read_golden

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.load_error)

AVX512, AVX2, AMD = MACHINES.values()
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FORMS = ("stored", "bfloat16", "int8")
# What weights a frozen layer has; stored ones of bfloat16 are multiplied where there are kernels.
ENGINES = {"bfloat16": ("bf16_panels", "bf16_products"), "int8": ("int8_products",)}


def test_plans_of_the_benchmark_suites():
    """python -m tests.cpu.plans writes the file. A change of it changes what users run, and needs a measurement."""
    expected, results = read_golden(), golden_rows()
    changes = [f"only in the file: {key}" for key in expected.keys() - results.keys()]
    changes += [f"not in the file: {key}" for key in results.keys() - expected.keys()]
    for key in expected.keys() & results.keys():
        for column in COLUMNS:
            before, now = expected[key][column], results[key][column]
            if before != now:
                changes.append(f"{', '.join(key)}, threads: {column}: {before!r} is now {now!r}")
    shown = "\n".join(sorted(changes)[:40])
    assert not changes, f"{len(changes)} plans changed (python -m tests.cpu.plans accepts them):\n{shown}"


def random_case(rng: random.Random) -> Case:
    T, B, I, H = (round(2 ** rng.uniform(0, most)) for most in (11, 9, 10, 11))  # noqa: E741
    proj = rng.randint(1, H - 1) if H > 1 and rng.random() < 0.2 else 0
    lengths = tuple(rng.randint(0, T) for _ in range(B)) if rng.random() < 0.2 else None
    return Case(
        T=T,
        B=B,
        I=I,
        H=H,
        proj=proj,
        dtype=rng.choice(DTYPES),
        bidirectional=rng.random() < 0.3,
        hx=rng.choice(("none", "tuple")),
        lengths=lengths,
    )


def random_form(rng: random.Random, case: Case) -> str:
    """Half of the layers are not frozen; bfloat16 and int8 are forms of float32."""
    return "no" if rng.random() < 0.5 else rng.choice(FORMS if case.dtype == torch.float32 else FORMS[:1])


def random_shape(rng: random.Random) -> Case:
    """A random case, without lengths if it is large, because counting its rows takes long."""
    case = random_case(rng)
    return case if case.lengths is None or case.T * case.B < 1000 else replace(case, lengths=None)


def test_every_plan_is_valid():
    rng = random.Random(20240229)
    for _ in range(1000):
        case, threads = random_case(rng), rng.randint(1, 64)
        machine, form = rng.choice((AVX512, AVX2)), random_form(rng, case)
        plan = plan_of(case, threads, form, **machine)
        assert set(plan) == ({"forward", "backward"} if form == "no" else {"forward"}), form
        for phase, p in plan.items():
            message = f"{phase} of {case}, frozen {form}, at {threads} threads: {p}"
            assert 1 <= p["threads"] <= threads, message
            assert p["threads"] == p["members"] * (case.directions if p["concurrent"] else 1), message
            assert p["concurrent"] <= (case.directions == 2), message
            assert (p["split"] == "none") == (p["members"] == 1), message
            assert p["copies"] in (1, p["members"]), message
            assert p["members"] % p["row_groups"] == 0, message
            assert p["reason"], message
            assert p["predicted_us"] > 0, message
            assert p["text"].startswith(f"{p['threads']} thread"), message
            if p["split"] == "rows":
                assert p["members"] <= case.B, message
            if p["split"] in ("units", "grid"):
                assert p["members"] // p["row_groups"] <= case.H // 2, message
                assert p["row_groups"] <= case.B, message
            if form in ENGINES:
                assert p["engine"] in ENGINES[form], message
            elif case.dtype != torch.bfloat16:
                assert p["engine"] == "float_panels", message
            elif form != "no":
                assert p["engine"] in ("bf16_panels", "bf16_products"), message
            if form != "no":
                assert (p["w_ih"], p["w_hh"], p.get("w_hr", "prepacked")) == ("prepacked",) * 3, message
                assert "weights packed when frozen" in p["text"], message
                assert ("products of int8" in p["text"]) == (form == "int8"), message
        assert 0 <= plan["forward"]["hoisted_steps"] <= case.T
        assert form != "no" or 1 <= plan["backward"]["chunk_steps"] <= case.T


def test_more_work_gets_more_threads():
    """Plans are queried for any number of threads, without running anything."""
    case = Case(T=100, B=64, I=128, H=128)
    plans = [plan_of(case, n, **AVX512)["forward"] for n in (1, 2, 4, 8)]
    assert [p["threads"] for p in plans] == [1, 2, 4, 8]
    assert [p["split"] for p in plans] == ["none", "rows", "rows", "rows"]
    large = plan_of(Case(T=100, B=16, I=1024, H=1024), 8, **AVX512)["forward"]
    assert (large["threads"], large["split"], large["alternate_block_order"]) == (8, "units", True)


def test_more_threads_are_never_predicted_slower():
    """Nor does the number of threads in use fall. For 10,000 shapes and 1 to 64 threads."""
    rng = random.Random(20261130)
    for _ in range(10_000):
        case, machine = random_shape(rng), rng.choice((AVX512, AVX2))
        fewer, more = sorted(rng.sample(range(1, 65), 2))
        form = random_form(rng, case)
        before, after = plan_of(case, fewer, form, **machine), plan_of(case, more, form, **machine)
        for phase in before:
            details = f"{phase} of {case}, frozen {form}, {fewer} and {more} threads: {before[phase]}, {after[phase]}"
            assert after[phase]["predicted_us"] <= before[phase]["predicted_us"], details
            assert after[phase]["threads"] >= before[phase]["threads"], details


def test_chosen_partition_has_the_lowest_predicted_time():
    """To within 2 %, the min gain of more threads; for 10,000 shapes and 1 to 64 threads."""
    rng = random.Random(20261201)
    for _ in range(10_000):
        case, machine, threads = random_shape(rng), rng.choice((AVX512, AVX2)), rng.randint(1, 64)
        form = random_form(rng, case)
        plan, candidates = plan_of(case, threads, form, **machine), candidates_of(case, threads, form, **machine)
        for phase, p in plan.items():
            details = f"{phase} of {case}, frozen {form}, at {threads} threads: {p}, {candidates[phase]}"
            times = {candidate[:4]: candidate[4] for candidate in candidates[phase]}
            assert len(times) == len(candidates[phase]), details
            assert times[p["members"], p["row_groups"], p["split"], p["concurrent"]] == p["predicted_us"], details
            assert min(times.values()) >= 0.98 * p["predicted_us"], details


def partitions(case: Case, threads: int, unit_block: int) -> set[tuple[int, int, str, bool]]:
    """Every way to divide a layer of more than one step: members per direction, row groups, split, concurrent."""
    blocks = -(-case.H // unit_block) if 2 * unit_block <= case.H else 1
    results = {(1, 1, "none", False)}
    if case.directions == 2 and threads > 1:
        results.add((1, 1, "none", True))
    for concurrent in {False, case.directions == 2}:
        for k in range(2, threads // (2 if concurrent else 1) + 1):
            if k <= case.B:
                results.add((k, 1, "rows", concurrent))
            if k <= blocks:
                results.add((k, 1, "units", concurrent))
            for groups in (2, 4, 8, 16, 32):
                units = k // groups
                if (
                    k % groups == 0
                    and 2 <= units <= blocks
                    and groups <= case.B
                    and concurrent == (case.directions == 2)
                ):
                    results.add((k, groups, "grid", concurrent))
    return results


def test_every_partition_is_a_candidate():
    rng = random.Random(20261202)
    for _ in range(300):
        case, threads = random_shape(rng), rng.randint(1, 64)
        if case.T > 1:
            for machine in (AVX512, AVX2):
                engine = plan_of(case, threads, **machine)["forward"]["engine"]
                panel = 2 * machine["vector_bytes"] // (8 if case.dtype == torch.float64 else 4)
                expected = partitions(case, threads, 32 if engine == "bf16_products" else panel)
                for phase, found in candidates_of(case, threads, **machine).items():
                    assert {tuple(c[:4]) for c in found} == expected, f"{phase} of {case} at {threads} threads"


def test_one_more_thread_changes_predicted_time_smoothly():
    """Regression: rows were split over all threads or none, so 9 available threads gave 9 and 10 gave 4."""
    case = Case(T=100, B=32, I=128, H=128)
    used = [plan_of(case, n, **AVX512)["forward"]["threads"] for n in range(1, 65)]
    assert used == sorted(used)
    assert used[:4] == [1, 2, 3, 4]
    assert used[9] >= 8
    assert used[-1] > 32


def test_three_threads_run_directions_sequentially():
    plan = plan_of(Case(T=20, B=48, I=64, H=128, bidirectional=True), 3, **AVX512)["forward"]
    assert (plan["threads"], plan["members"], plan["concurrent"]) == (3, 3, False)


def test_unaligned_results_of_a_slow_blas_are_aligned():
    """Of large float32 products, on a machine whose BLAS is slow at unaligned rows."""

    def kinds(slow=True, **case):
        case = {"T": 32, "B": 32, "I": 650, "H": 650, "hx": "tuple", **case}
        plan = plan_of(Case(**case), 2, **(AMD if slow else AVX2))["backward"]
        return [plan["dx"], plan["dw_ih"]["gemm"], plan["dw_hh"]["gemm"]], plan["text"]

    products, text = kinds()
    assert products == ["aligned_blas"] * 3
    assert "dx by BLAS into aligned rows, dW_ih by BLAS into aligned rows, dW_hh by BLAS into aligned rows" in text
    products, text = kinds(slow=False)
    assert products == ["blas"] * 3
    assert "aligned" not in text
    assert kinds(dtype=torch.float64)[0] == ["blas"] * 3
    # In float32 arithmetic; a single product is computed in blocks of rows of dW.
    assert kinds(dtype=torch.bfloat16, hx="none")[0] == ["aligned_blas", "blas", "blas"]
    assert kinds(dtype=torch.bfloat16, T=64)[0] == ["aligned_blas"] * 3
    assert kinds(I=648)[0] == ["blas", "blas", "aligned_blas"]
    assert kinds(I=250)[0] == ["blas", "blas", "aligned_blas"]
    assert kinds(T=1)[0] == ["blas", "aligned_blas", "aligned_blas"]  # dx of 32 rows
    assert kinds(T=1, H=450)[0] == ["blas", "aligned_blas", "blas"]


def test_blas_of_this_machine():
    flags = cpuinfo("flags")
    slow = "AuthenticAMD" in cpuinfo("vendor_id") and "avx2" in flags and "avx512f" not in flags
    found = native.extension.cpu_machine()["blas_is_slow_at_unaligned_rows"]
    assert found == (slow and torch.backends.mkl.is_available())


def test_wrong_dtype_is_refused():
    with pytest.raises(RuntimeError, match="dtype must be float32, float64 or bfloat16, got int8"):
        native.extension.cpu_plan("int8", 1, 1, 1, 1, 1, 1, threads=1, **AVX512)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_explain_prints_the_plan(four_threads):
    explained = fastlstm.explain(fastlstm.LSTM(128, 128), torch.zeros(100, 64, 128))
    assert explained.forward.startswith("4 threads by ")
    assert ", because predicted " in explained.forward
    assert " us; by " in explained.forward
    assert ", on one thread " in explained.forward
    assert "W_hh packed" in explained.forward
    assert "dW_hh" in explained.backward
    lines = str(explained).splitlines()
    assert lines[0] == f"native     runs: {explained.forward}"
    assert lines[1] == f"           training: forward the same; backward: {explained.backward}"


def test_explain_of_every_form_of_input(four_threads):
    lstm, x = fastlstm.LSTM(64, 64, batch_first=True), torch.zeros(16, 500, 64)
    lengths = torch.arange(16, 0, -1) * 30
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    padded = fastlstm.explain(lstm, x, lengths=lengths.tolist())
    decisions, reasons = padded.forward.split(", because ")
    assert decisions == fastlstm.explain(lstm, packed).forward.split(", because ")[0]
    assert "predicted" in reasons  # T is 20 steps longer than the packed rows
    assert fastlstm.explain(lstm, x).forward.startswith("4 threads by ")
    assert "by rows" not in fastlstm.explain(lstm, x[0]).forward  # one row
    assert fastlstm.explain(lstm, x[:0]).forward == ""
    cell = fastlstm.explain(fastlstm.LSTMCell(64, 64), torch.zeros(1, 64))
    assert cell.forward.startswith("1 thread, weights unpacked, because predicted ")
    assert "; by units " in cell.forward
    assert cell.backward
    half = fastlstm.explain(nn.Module.to(fastlstm.LSTMCell(64, 64), torch.bfloat16), torch.zeros(1, 64).bfloat16())
    assert "W_hh unpacked" in half.forward


@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8], ids=str)
def test_explain_of_frozen_layers(weights, four_threads):
    lstm = fastlstm.freeze(fastlstm.LSTM(128, 128, batch_first=True), weights)
    cell = fastlstm.freeze(fastlstm.LSTMCell(128, 128), weights)
    x = torch.zeros(64, 100, 128)
    products = {torch.bfloat16: "panels of bfloat16", torch.int8: "products of int8"}.get(weights)
    inputs = {
        "padded": fastlstm.explain(lstm, x),
        "lengths": fastlstm.explain(lstm, x, lengths=[100] * 64),
        "packed": fastlstm.explain(lstm, pack_padded_sequence(x, torch.arange(64, 0, -1), batch_first=True)),
        "unbatched": fastlstm.explain(lstm, x[0]),
        "cell": fastlstm.explain(cell, x[:, 0]),
    }
    for name, explained in inputs.items():
        assert (explained.backend, explained.backward) == ("native", ""), name
        assert "weights packed when frozen" in explained.forward, name
        assert ", because " in explained.forward, name
        assert [text for text in ("of bfloat16", "of int8") if text in explained.forward] == (
            [products.removeprefix("panels ").removeprefix("products ")] if products else []
        ), name
        lines = str(explained).splitlines()
        assert lines[0] == f"native     runs: {explained.forward}", name
        assert not any("training" in line for line in lines), name
        assert explained.reasons["eager"] == "cannot run a frozen layer", name
    assert inputs["padded"].forward.startswith("4 threads by ")
    with fastlstm.use_backend("eager"):
        explained = fastlstm.explain(lstm, x)
    assert (explained.backend, explained.forward) == ("", "")
    assert explained.reasons["native"] == "can run it, but backend 'eager' was asked for"


def test_plan_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="frozen must be no, stored, bfloat16 or int8, got int4"):
        plan_of(Case(), 1, "int4")


def test_explain_of_other_backends_has_no_plan():
    with fastlstm.use_backend("eager"):
        explained = fastlstm.explain(fastlstm.LSTM(3, 4), torch.zeros(5, 2, 3))
    assert (explained.forward, explained.backward) == ("", "")


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        (torch.tensor([5.0, 3.0, 1.0]), TypeError),
        ([[5, 3, 1]], ValueError),
        (5, ValueError),
        ([5, 3], ValueError),
        ([9, 3, 1], ValueError),
        ([5, 3, -1], ValueError),
    ],
    ids=str,
)
def test_explain_refuses_invalid_lengths(lengths, error):
    lstm, x = fastlstm.LSTM(8, 4), torch.zeros(5, 3, 8)
    results = []
    for call in (lstm, lambda *args, **options: fastlstm.explain(lstm, *args, **options)):
        with pytest.raises(error) as caught:
            call(x, lengths=lengths)
        results.append(str(caught.value))
    assert results[0] == results[1]


def test_explain_with_recompute_prints_no_plan_of_the_whole_layer():
    lstm = fastlstm.LSTM(8, 4)
    lstm.recompute = True
    assert fastlstm.explain(lstm, torch.zeros(5, 3, 8)).forward == ""
    assert fastlstm.explain(lstm, torch.zeros(5, 8), lengths=3).backend
