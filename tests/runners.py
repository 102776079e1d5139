"""Run a Case and return all outputs and gradients: on a backend (`run_backend`), or with torch's modules.

`check` asserts that a backend is correct by the rule of fastlstm/accuracy.py. `run_torch` is the oracle, and in float64
the reference. It composes ragged cases of nn.LSTM calls: packing for lengths, one call for each segment of each row for
resets, single steps for cell states.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import accuracy, dispatch
from fastlstm.accuracy import Precision

from .cases import OUTPUTS, Case, Tensors, tensors
from .device import TEST_DEVICE

Results = dict[str, Tensor]


def require(backend: str, case: Case) -> None:
    """Skip the test, with the backend's reason, if it cannot run `case`."""
    weights = list(case.module(fastlstm.LSTM, {}).to_empty(device=TEST_DEVICE.device).to(case.dtype).parameters())
    x = torch.empty(1, 1, case.I, dtype=case.dtype, device=TEST_DEVICE.device)
    group = weights[: len(weights) // case.layers]
    call = dispatch.describe(x, group, x if case.lengths else None, x if case.resets else None)
    reason = None if backend == "reference" else dispatch.BACKENDS[backend].supports(call)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run_backend(case: Case, backend: str) -> Results:
    """fastlstm.LSTM on `backend`."""
    with fastlstm.use_backend(backend):
        return run(case)


def run(case: Case) -> Results:
    """fastlstm.LSTM on the backend in use, which is one setting for all threads."""
    return _run(case, case.dtype, call_fastlstm)


def run_torch(case: Case, dtype: torch.dtype | None = None) -> Results:
    """torch's modules, in the case's dtype or in `dtype`."""
    return _run(case, dtype or case.dtype, call_torch)


def precision(dtype: torch.dtype, backend: str) -> Precision:
    """The rounding of `backend`: the reference consists of torch ops, the others keep sums and states in float32."""
    return Precision.per_op(dtype) if backend == "reference" else Precision.of(dtype)


@lru_cache(maxsize=1024)
def expected(case: Case, precision: Precision) -> tuple[Results, Mapping[str, float]]:
    """The float64 reference, and for each result the largest error that rounding explains."""
    case_tensors = tensors(case, torch.float64)
    terms = {f"d {name}": case.T * case.B for name in case_tensors.weights}
    return accuracy.error_bounds(lambda: results_of(case, case_tensors, call_torch), precision, terms)


def check(case: Case, backend: str, rounding: Precision | None = None) -> None:
    """Assert that rounding explains the error of every result; failures name the results."""
    compare(case, run_backend(case, backend), rounding or precision(case.dtype, backend), backend)


def compare(case: Case, ours: Results, rounding: Precision, what: str) -> None:
    """`check` for existing results."""
    reference, bounds = expected(case, rounding)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert value.dtype == case.dtype, f"{name}: {value.dtype}"
        assert value.shape == reference[name].shape, (
            f"{name}: {list(value.shape)}, expected {list(reference[name].shape)}"
        )
    assert_accurate(ours, reference, bounds, f"{what} on {case!r}")


def check_elsewhere(
    cases: Sequence[Case],
    backend: str,
    program: str,
    *arguments: str,
    rounding: Precision | None = None,
    **environment: str,
) -> str:
    """Run `program` in a new process, `check` its results for each case, and return its output.

    The program has `cases`, and must call `save(results)` with a list of results for every case.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(list(cases), f"{folder}/cases")
        begin = (
            f"import torch\ncases = torch.load({folder + '/cases'!r}, weights_only=False)\n"
            f"save = lambda results: torch.save(results, {folder + '/results'!r})\n"
        )
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", begin + program, *arguments],
            env={**os.environ, **environment},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        results = torch.load(f"{folder}/results", weights_only=False)
    for case, of_case in zip(cases, results, strict=True):
        for one in of_case:
            compare(case, one, rounding or precision(case.dtype, backend), backend)
    return ran.stdout


def assert_accurate(ours: Results, reference: Results, bounds: Mapping[str, float], what: str = "") -> None:
    wrong = [str(found) for found in accuracy.compare(ours, reference, bounds) if not found.ok]
    assert not wrong, f"{what}\n  " + "\n  ".join(wrong)


def _run(case: Case, dtype: torch.dtype, call: Callable[[Case, Tensors], Results]) -> Results:
    return results_of(case, tensors(case, dtype), call)


def results_of(case: Case, case_tensors: Tensors, call: Callable[[Case, Tensors], Results]) -> Results:
    results = call(case, case_tensors)
    leaves = case_tensors.grad_leaves()
    used = {name: results[name] for name in case.used if name in results and results[name].requires_grad}
    collected = [None] * len(leaves)
    if used and leaves:
        collected = torch.autograd.grad(
            list(used.values()), list(leaves.values()), gradients(case, used), allow_unused=True
        )
    for (name, leaf), grad in zip(leaves.items(), collected, strict=True):
        # nn.LSTM gives zeros in some cases where others give None; both are equivalent.
        results[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: value.detach() for name, value in results.items()}


def gradients(case: Case, outputs: Results) -> list[Tensor]:
    """The arriving gradient of each output; if strided, an expanded element as from `.sum().backward()`."""
    results = []
    for name, out in outputs.items():
        shape = (1,) * out.dim() if "grads" in case.strided else out.shape
        generator = torch.Generator().manual_seed(case.seed + 1 + OUTPUTS.index(name))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).to(out.dtype)
        results.append(drawn.expand(out.shape))
    return results


def _named(output: Tensor, states: tuple[Tensor, Tensor], *cells: Tensor) -> Results:
    return dict(zip(("output", "h_n", "c_n", "cells"), (output, *states, *cells), strict=False))


def call_fastlstm(case: Case, case_tensors: Tensors) -> Results:
    return call_module(case, case_tensors, case.module(fastlstm.LSTM, case_tensors.weights))


def call_module(case: Case, case_tensors: Tensors, module: nn.Module) -> Results:
    """Call `module`, which has fastlstm.LSTM's arguments, on the case's input."""
    options = {"return_cell_states": True} if case.cells else {}
    if not case.packed:
        return _named(
            *module(
                case_tensors.input,
                case_tensors.hx,
                lengths=case_tensors.lengths,
                reset_mask=case_tensors.reset_mask,
                **options,
            )
        )
    packed = pack_padded_sequence(
        case_tensors.input, torch.tensor(case.lengths), case.batch_first, enforce_sorted=False
    )
    output, states, *cells = module(packed, case_tensors.hx, **options)
    padded = [pad_packed_sequence(p, case.batch_first, total_length=case.T)[0] for p in (output, *cells)]
    return _named(padded[0], states, *padded[1:])


def call_torch(case: Case, case_tensors: Tensors) -> Results:
    if not (case.ragged or case.cells):
        return _named(*case.module(nn.LSTM, case_tensors.weights)(case_tensors.input, case_tensors.hx))
    x, hx = case_tensors.input, case_tensors.hx
    if case.unbatched:
        x, hx = x.unsqueeze(1), hx and [state.unsqueeze(1) for state in hx]
    elif case.batch_first:
        x = x.transpose(0, 1)
    if hx is None:
        S, P = case.layers * case.directions, case.proj or case.H
        hx = (x.new_zeros(S, case.B, P), x.new_zeros(S, case.B, case.H))
    if case.resets is None and not case.cells:
        results = _packed_rows(case, case_tensors.weights, x, *hx)
    elif case.ragged:
        rows = [_segmented_row(case, case_tensors.weights, x, *hx, b) for b in range(case.B)]
        results = {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}
    else:
        results = _segment(case, case_tensors.weights, x, *hx)
    for name in ("output", "cells"):
        if name in results and (case.batch_first or case.unbatched):
            results[name] = results[name][:, 0] if case.unbatched else results[name].transpose(0, 1)
    if case.unbatched:
        results |= {name: results[name][:, 0] for name in ("h_n", "c_n")}
    return results


def _packed_rows(case: Case, weights: dict, x: Tensor, h0: Tensor, c0: Tensor) -> Results:
    """pack_padded_sequence -> nn.LSTM -> pad_packed_sequence on rows that have steps; other rows keep their state."""
    lengths = torch.tensor(case.lengths)
    rows = lengths.nonzero()[:, 0]
    output = x.new_zeros(case.T, case.B, case.directions * (case.proj or case.H))
    if len(rows) == 0:
        return _named(output, (h0, c0))
    packed = pack_padded_sequence(x[:, rows], lengths[rows], enforce_sorted=False)
    module = case.module(nn.LSTM, weights, batch_first=False)
    packed, (h_n, c_n) = module(packed, (h0[:, rows], c0[:, rows]))
    padded, _ = pad_packed_sequence(packed, total_length=case.T)
    return _named(output.index_copy(1, rows, padded), (h0.index_copy(1, rows, h_n), c0.index_copy(1, rows, c_n)))


def _segmented_row(case: Case, weights: dict, x: Tensor, h0: Tensor, c0: Tensor, b: int) -> Results:
    """Row b, one nn.LSTM call per segment; hx is the state of the first segment forward, of the last in reverse."""
    steps = case.T if case.lengths is None else case.lengths[b]
    flagged = {t for t, row in case.resets or () if row == b and t < steps}
    h0, c0 = h0[:, b : b + 1], c0[:, b : b + 1]
    bounds = [*sorted({0, *flagged}), steps]
    is_forward = torch.tensor([True, False][: case.directions] * case.layers)[:, None, None]
    parts = []
    for start, end in pairwise(bounds):
        if steps:
            enters = torch.where(is_forward, torch.tensor(start == 0 and 0 not in flagged), torch.tensor(end == steps))
            parts.append(
                _segment(case, weights, x[start:end, b : b + 1], h0.masked_fill(~enters, 0), c0.masked_fill(~enters, 0))
            )
    features = {"output": case.directions * (case.proj or case.H), "cells": case.directions * case.H}
    results = {}
    for name in ("output", "cells") if case.cells else ("output",):
        padding = x.new_zeros(case.T - steps, 1, features[name])
        results[name] = torch.cat([*(part[name] for part in parts), padding])
    for name, initial in (("h_n", h0), ("c_n", c0)):
        results[name] = torch.where(is_forward, parts[-1][name], parts[0][name]) if parts else initial
    return results


def _segment(case: Case, weights: dict, x: Tensor, h0: Tensor, c0: Tensor) -> Results:
    """nn.LSTM over x [T, B, I]; for cell states, the last layer again, each direction step by step."""
    results = _named(*case.module(nn.LSTM, weights, batch_first=False)(x, (h0, c0)))
    if not case.cells:
        return results
    D, below = case.directions, case.layers - 1
    if below:
        lower = {name: w for name, w in weights.items() if f"_l{below}" not in name}
        changes = {"num_layers": below, "batch_first": False}
        x, _ = case.module(nn.LSTM, lower, **changes)(x, (h0[: D * below], c0[: D * below]))
    cells = []
    for d, suffix in enumerate(("", "_reverse")[:D]):
        own = {
            name.replace(f"_l{below}{suffix}", "_l0"): w
            for name, w in weights.items()
            if name.endswith(f"_l{below}{suffix}")
        }
        changes = {"input_size": x.shape[2], "num_layers": 1, "bidirectional": False, "batch_first": False}
        step = case.module(nn.LSTM, own, **changes)
        state = (h0[D * below + d :][:1], c0[D * below + d :][:1])
        collected = [None] * len(x)
        for t in reversed(range(len(x))) if d else range(len(x)):
            _, state = step(x[t : t + 1], state)
            collected[t] = state[1]
        cells.append(torch.cat(collected))
    return {**results, "cells": torch.cat(cells, -1)}
