"""The tests' tools: cases, and the comparison with nn.LSTM."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlstm.accuracy import Precision

from ..cases import Case, random_case, tensors
from ..runners import compare, expected, run_torch


def test_random_cases_repeat_and_reach_every_option():
    cases = [random_case(random.Random(k), (torch.float64, torch.float32)) for k in range(400)]
    assert cases == [random_case(random.Random(k), (torch.float64, torch.float32)) for k in range(400)]
    for case in cases:  # a failure prints code that can be run
        assert eval(repr(case), {"Case": Case, "torch": torch}) == case, case
    for option in (
        "bidirectional",
        "proj",
        "batch_first",
        "unbatched",
        "packed",
        "cells",
        "frozen",
        "resets",
        "lengths",
    ):
        assert any(getattr(c, option) for c in cases), option
        assert any(not getattr(c, option) for c in cases), option
    assert any(0 in (c.lengths or ()) for c in cases)
    assert any(c.resets and c.lengths and 0 in c.lengths for c in cases)
    assert any(c.B == 0 for c in cases)
    assert {c.hx for c in cases} == {"none", "tuple", "list", "expanded", "strided", "shared"}
    assert {s for c in cases for s in c.strided} == {"x", "weights", "grads"}


def test_tensors_are_equal_in_every_dtype_and_strided_where_asked():
    case = Case(dtype=torch.bfloat16, hx="strided", strided=("x", "weights"))
    low, high = tensors(case), tensors(case, torch.float64)
    assert low.leaves.keys() == high.leaves.keys()
    for name, leaf in low.leaves.items():
        assert leaf.dtype == torch.bfloat16, name
        assert not leaf.is_contiguous(), name
        assert torch.equal(leaf.double(), high.leaves[name]), name
    assert low.leaves["weight_ih_l0"].shape == (24, 4)


@pytest.mark.parametrize(
    "case", [Case(layers=2, bidirectional=True, hx="tuple"), Case(proj=2, batch_first=True)], ids=str
)
def test_oracle_ragged_paths_equal_nn_lstm_on_dense_input(case):
    plain = run_torch(case, torch.float64)
    for trivial in (
        replace(case, lengths=(case.T,) * case.B),
        replace(case, lengths=(case.T,) * case.B, packed=True),
        replace(case, resets=()),
        replace(case, cells=True),
    ):
        results = run_torch(trivial, torch.float64)
        for name, value in plain.items():
            if not (trivial.cells and name.startswith("d ")):  # the loss includes the cell states
                torch.testing.assert_close(results[name], value, rtol=1e-12, atol=1e-14, msg=f"{trivial}: {name}")


def test_oracle_segments_are_separate_sequences():
    case = Case(T=5, B=1, bidirectional=True, hx="tuple", resets=((2, 0),), used=())
    case_tensors, results = tensors(case, torch.float64), run_torch(case, torch.float64)
    module, (h0, c0) = case.module(nn.LSTM, case_tensors.weights), case_tensors.hx
    first_only, last_only = torch.tensor([1.0, 0.0])[:, None, None], torch.tensor([0.0, 1.0])[:, None, None]
    early, (h_early, _) = module(case_tensors.input[:2], (h0 * first_only, c0 * first_only))
    late, (h_late, _) = module(case_tensors.input[2:], (h0 * last_only, c0 * last_only))
    torch.testing.assert_close(results["output"], torch.cat([early, late]))
    torch.testing.assert_close(results["h_n"], torch.stack([h_late[0], h_early[1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_comparison_detects_a_wrong_result(dtype):
    case, rounding = Case(dtype=dtype, hx="tuple"), Precision.of(dtype)
    right = {name: value.to(dtype) for name, value in expected(case, rounding)[0].items()}
    compare(case, right, rounding, "rounded")
    for name, value in right.items():
        wrong = value.clone()
        wrong.view(-1)[0] += 0.1 * value.abs().max()
        with pytest.raises(AssertionError, match=name):
            compare(case, {**right, name: wrong}, rounding, "wrong")
