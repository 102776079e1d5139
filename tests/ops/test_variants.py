"""Recurrent dropout, zoneout and layer normalization on every backend: values and all gradients, masks given.

Random configurations: forty an option in every run of the tests; with `-m fuzz` 500, or a quarter of
FASTLSTM_FUZZ_COUNT, since there are three options.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from fastlstm import reference
from fastlstm.ops.schema import LayerInputs, LayerShape, arguments

from ..variants import OPTIONS, Variant, check, expected, random_variant, refusal, run_op

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
RAGGED = {"T": 7, "B": 4, "lengths": (3, 7, 0, 1), "resets": ((2, 0), (3, 1), (6, 1))}
CASES = {
    "recurrent mask": Variant(mask="sequence"),
    "recurrent mask of each step": Variant(mask="steps", D=2, P=3),
    "recurrent mask, ragged": Variant(mask="steps", D=2, **RAGGED),
    "zoneout": Variant(zoneout="hc"),
    "zoneout of h": Variant(zoneout="h", states=False),
    "zoneout of c": Variant(zoneout="c", P=2),
    "zoneout in evaluation": Variant(zoneout="hc", share="constant", D=2),
    "zoneout by numbers": Variant(zoneout="hc", share="numbers", P=3, D=2),
    "zoneout, ragged": Variant(zoneout="hc", D=2, P=3, **RAGGED),
    "norm": Variant(norm=True),
    "norm, ragged, no bias": Variant(norm=True, bias=False, D=2, **RAGGED),
    "norm with projection": Variant(norm=True, P=3, D=2, states=False),
    "all": Variant(norm=True, mask="steps", zoneout="hc", D=2, P=3, **RAGGED),
}
# Wide enough for several vectors and for threads.
WIDE = {
    "recurrent mask": Variant(T=20, B=19, I=24, H=72, mask="sequence"),
    "zoneout": Variant(T=20, B=19, I=24, H=72, zoneout="hc"),
    "both with projection": Variant(T=20, B=19, I=24, H=72, P=40, D=2, mask="sequence", zoneout="hc"),
    "norm": Variant(T=20, B=19, I=24, H=72, norm=True, zoneout="h"),
}


def require(variant, backend):
    reason = refusal(variant, backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, backend, poisoned_empty):
    variant = replace(CASES[name], dtype=dtype)
    require(variant, backend)
    check(variant, backend)


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_threads(name, dtype, threads, backend):
    variant = replace(WIDE[name], dtype=dtype)
    if backend != "native":
        pytest.skip("its threads are torch's own")
    require(variant, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(variant, backend)
    finally:
        torch.set_num_threads(before)


def run_random(option, backend, count, seed):
    ran, failures = 0, []
    for k in range(seed, seed + count):
        variant = random_variant(random.Random(k), option, DTYPES)
        if refusal(variant, backend) is not None:
            continue
        try:
            check(variant, backend)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n  again: random_variant(random.Random({k}), {option!r})")
        ran += 1
    assert not failures, f"{len(failures)} of {ran}\n" + "\n".join(failures[:5])
    return ran


@pytest.mark.parametrize("option", OPTIONS)
def test_forty_random_configurations(option, backend):
    if backend == "reference":
        pytest.skip("it is the truth")
    if run_random(option, backend, 40, 4100) == 0:
        pytest.skip(f"{backend} runs none of them")


@pytest.mark.fuzz
@pytest.mark.parametrize("option", OPTIONS)
def test_random_configurations(option, backend, capsys):
    if backend == "reference":
        pytest.skip("it is the truth")
    count = int(os.environ.get("FASTLSTM_FUZZ_COUNT", "2000")) // 4
    seed = int(os.environ.get("FASTLSTM_FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    ran = run_random(option, backend, count, seed)
    with capsys.disabled():
        print(f"\n{option} on {backend}: {ran} of {count} configurations ran, FASTLSTM_FUZZ_SEED={seed}")


@pytest.mark.parametrize("name", CASES)
def test_output_changed_after_forward(name, backend):
    """Backward computes h again."""
    variant = replace(CASES[name], dtype=torch.float64)
    require(variant, backend)
    if backend == "reference":
        pytest.skip("autograd through its steps keeps them")
    inputs = variant.inputs()
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    y, *others = op(*arguments(inputs, True, False))[:4]
    doubled = y * 2
    with torch.no_grad():
        y.zero_()
    found = variant.results(inputs, (doubled, *others))
    again = variant.inputs()
    y, *others = reference.layer(*again)
    truth = variant.results(again, (y * 2, *others))
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name, backend):
    variant = replace(CASES[name], dtype=torch.float64, T=3, B=2, resets=None, lengths=None)
    require(variant, backend)

    def second(layer):
        inputs = variant.inputs()
        results = layer(inputs)
        leaves = [t for t in inputs.differentiable if t is not None]
        arriving = list(variant.gradients(dict(enumerate_outputs(results))).values())
        first = torch.autograd.grad(results, leaves, arriving, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    ours = second(lambda inputs: op(*arguments(inputs, True, False))[:4])
    for mine, truth in zip(ours, second(lambda inputs: reference.layer(*inputs)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-7, atol=1e-9)


def enumerate_outputs(results):
    return zip(("y", "h_n", "c_n", "cells"), results, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, backend):
    variant = replace(CASES[name], dtype=torch.float64, T=3, B=2, H=3, P=2 if CASES[name].P else 0, lengths=None)
    variant = replace(variant, resets=((1, 0),) if variant.resets else None)
    require(variant, backend)
    inputs = variant.inputs()
    leaves = [t for t in inputs.differentiable if t is not None]

    def layer(*tensors):
        found = iter(tensors)
        own = inputs.with_differentiable([None if t is None else next(found) for t in inputs.differentiable])
        if backend == "reference":
            return reference.layer(*own)
        return getattr(torch.ops.fastlstm, f"{backend}_layer").default(*arguments(own, True, False))[:4]

    # Autograd itself differentiates the reference's operations, so a random direction is enough there.
    assert torch.autograd.gradcheck(layer, leaves, fast_mode=backend == "reference")


@pytest.mark.parametrize("name", ["recurrent mask, ragged", "zoneout, ragged", "norm, ragged, no bias", "all"])
def test_opcheck(name, backend):
    variant = replace(CASES[name], dtype=torch.float64)
    require(variant, backend)
    if backend == "reference":
        pytest.skip("no op")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    opcheck(op, arguments(variant.inputs(), True, True), test_utils=checks)
    inputs = variant.inputs(requires_grad=False)
    y, h_n, c_n, cells, reserve = op(*arguments(inputs, True, True))
    grads = [torch.randn_like(t) for t in (y, h_n, c_n, cells)]
    needs = [True] * len(inputs.differentiable)
    backward = getattr(torch.ops.fastlstm, f"{backend}_layer_backward").default
    opcheck(backward, (*grads, *arguments(inputs, y, cells, reserve, needs)))


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_alone(name, backend, poisoned_empty):
    """A backward that is asked for one gradient gives what a full one gives."""
    variant = replace(CASES[name], dtype=torch.float64)
    require(variant, backend)
    if backend == "reference":
        pytest.skip("no op")
    inputs = variant.inputs(requires_grad=False)
    forward = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    backward = getattr(torch.ops.fastlstm, f"{backend}_layer_backward").default
    y, h_n, c_n, cells, reserve = forward(*arguments(inputs, True, True))
    grads = [torch.randn_like(t) for t in (y, h_n, c_n, cells)]

    def run(needs):
        dx, dh0, dc0, dw = backward(*grads, *arguments(inputs, y, cells, reserve, needs))
        return [dx, dh0, dc0, *dw]

    present = [t is not None for t in inputs.differentiable]
    full = run(present)
    for k, here in enumerate(present):
        for i, result in enumerate(run([i == k and here for i in range(len(present))])):
            if i == k and here:
                torch.testing.assert_close(result, full[k])
            else:
                assert result.shape == (0,)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interval", [1, 3])
def test_recompute(name, interval, backend):
    variant = replace(CASES[name], dtype=torch.float64)
    require(variant, backend)
    if backend == "reference":
        pytest.skip("no op")
    inputs = variant.inputs()
    op = torch.ops.fastlstm.recomputed_layer.default
    found = variant.results(inputs, op(backend, interval, *arguments(inputs, True, False))[:4])
    for key, value in run_op(variant, backend).items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"recurrent_mask": torch.ones(1, 5, 3, 5)},
            r"recurrent_mask must be \[D, T, B, P\] = \[1, 5, 3, 6\]|recurrent",
        ),
        ({"recurrent_mask": torch.ones(1, 5, 3, 6, dtype=torch.bool)}, "recurrent_mask must be"),
        ({"zoneout_h": torch.ones(5, 3, 6, dtype=torch.bool)}, "zoneout_h must be"),
        ({"zoneout_c": torch.ones(1, 5, 3, 6, dtype=torch.float64)}, "zoneout_c must be"),
    ],
    ids=["size", "dtype of a mask", "dimensions", "dtype of a share"],
)
def test_masks_that_do_not_fit(change, text, backend):
    inputs = Variant().inputs()._replace(**change)
    if backend == "reference":
        pytest.skip("it checks nothing")
    require(Variant(mask="sequence"), backend)
    op = getattr(torch.ops.fastlstm, f"{backend}_layer").default
    with pytest.raises(RuntimeError, match=text):
        op(*arguments(inputs, True, False))


def test_options_that_change_nothing(backend):
    """Masks of ones and shares of zeros give the plain layer's values."""
    plain = Variant(T=9, B=5, H=17, dtype=torch.float64)
    require(replace(plain, mask="sequence"), backend)
    inputs = plain.inputs()
    D, T, B, H = 1, plain.T, plain.B, plain.H
    ones, zeros = torch.ones(D, T, B, H, dtype=torch.float64), torch.zeros(D, T, B, H, dtype=torch.bool)
    masked = inputs._replace(recurrent_mask=ones, zoneout_h=zeros, zoneout_c=zeros)

    def run(inputs: LayerInputs):
        if backend == "reference":
            return reference.layer(*inputs)
        return getattr(torch.ops.fastlstm, f"{backend}_layer").default(*arguments(inputs, True, False))[:4]

    for mine, truth in zip(run(masked), run(inputs), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("option", ["mask", "zoneout h", "zoneout c", "norm"])
def test_ignored_options_are_found(option, backend):
    """The rule that `check` applies refuses the results of a layer without one of the options."""
    names = {"mask": "recurrent_mask", "zoneout h": "zoneout_h", "zoneout c": "zoneout_c"}
    variant = Variant(T=4, B=3, mask="sequence", zoneout="hc", norm=option == "norm")
    require(variant, backend)
    truth, bounds = expected(variant, _precision(backend))
    inputs = variant.inputs()
    if option == "norm":
        n, shape = 2 + 2 * variant.bias, LayerShape.of(inputs.weights)
        assert shape.norm
        weights = [w.detach().clone() for w in inputs.weights]
        weights[n + 5] += 2.0**-10  # LN(c)'s bias
        inputs = inputs._replace(weights=weights)
    else:
        inputs = inputs._replace(**{names[option]: None})
    y = reference.layer(*inputs)[0]
    assert (y.double() - truth["y"]).abs().max() > bounds["y"]


def _precision(backend):
    from ..runners import precision

    return precision(torch.float32, backend)
