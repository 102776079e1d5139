"""The forms of frozen modules, one frozen module per Case, and `check_frozen`: is a frozen module's result right?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

import fastlstm
from fastlstm import accuracy
from fastlstm.accuracy import Precision
from fastlstm.backends import native

from ..cases import Case, Tensors, tensors
from ..cpu.plans import plan_of
from ..runners import Results, assert_accurate, call_module, call_torch, results_of
from .int8_reference import check_int8

# Form: the module's dtype, and `weights` of fastlstm.freeze.
FORMS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 weights": (torch.float32, torch.bfloat16),
    "int8": (torch.float32, torch.int8),
}
# What tests of one module in every form pass to fastlstm.freeze; "int8" is the key of the last.
WEIGHTS = {"stored": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
NO_EXTENSION = {"condition": native.extension is None, "reason": f"native: {native.load_error}"}


def in_form(case: Case, form: str) -> Case:
    """The case in the form's dtype, without gradients."""
    names = tuple(case.module(nn.LSTM, {}).state_dict())
    return replace(case, dtype=FORMS[form][0], frozen=names, x_grad=False, hx_grad=False, used=())


def frozen(case: Case, form: str, case_tensors: Tensors | None = None) -> nn.Module:
    module = case.module(fastlstm.LSTM, (case_tensors or tensors(case)).weights)
    return fastlstm.freeze(module, FORMS[form][1])


def run_frozen(case: Case, form: str) -> Results:
    case_tensors = tensors(case)
    return call_module(case, case_tensors, frozen(case, form, case_tensors))


def multiplies_bf16(case: Case, **machine: bool) -> bool:
    """Return True if products of bfloat16 weights are bfloat16 too: on this machine, or with these properties."""
    T, B = max(1, case.T), max(1, case.B)
    plan = plan_of(replace(case, T=T, B=B, lengths=None, packed=False), frozen="bfloat16", **machine)
    return bool(plan["forward"]["engine"] == "bf16_products")


@lru_cache(maxsize=1024)
def expected(case: Case, form: str, bf16_products: bool) -> tuple[Results, Mapping[str, float]]:
    """nn.LSTM in float64 on the weights of this form, and the error that rounding explains (fastlstm/accuracy.py)."""
    case_tensors = tensors(case, torch.float64)
    if form == "bfloat16 weights":
        for weight in case_tensors.weights.values():
            if weight.dim() == 2:
                weight.data = weight.bfloat16().double()
    precision = Precision.of(case.dtype, "bf16" if bf16_products else "ieee")
    return accuracy.error_bounds(lambda: results_of(case, case_tensors, call_torch), precision)


def check_frozen(case: Case, form: str, results: Results | None = None, **machine: bool) -> None:
    """Assert that rounding explains the difference to the unfrozen module with the form's weights.

    Args:
        case: from `in_form`.
        form: a key of FORMS.
        results: of the frozen module; by default it is run here. None in any case but one for several layers of int8.
        machine: `bf16_kernels` of the machine that the results are from, if not this one.
    """
    what = f"frozen {form} on {case}"
    if form == "int8":
        case_tensors = tensors(case)
        found = call_module(case, case_tensors, frozen(case, form, case_tensors)) if results is None else results
        return check_int8(case, case_tensors, found, what, here=results is None)
    found = run_frozen(case, form) if results is None else results
    reference, bounds = expected(case, form, form == "bfloat16 weights" and multiplies_bf16(case, **machine))
    assert found.keys() == reference.keys(), what
    for name, value in found.items():
        assert (value.dtype, value.shape) == (case.dtype, reference[name].shape), f"{what}: {name}"
    assert_accurate(found, reference, bounds, what)
