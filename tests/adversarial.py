"""Adversarial inputs, valid and invalid: python -m tests.adversarial BACKEND SEED COUNT [DEVICE]. May crash.

Configuration k is a random Case with one unusual or invalid argument, drawn from seed + k and printed before it runs,
so that the last line names the one that crashed. Unusual but valid calls must give the reference's results and
gradients; invalid ones must raise or give the reference's results. tests/tools/test_adversarial.py runs it.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastlstm

from .cases import Case, random_case, tensors
from .device import TEST_DEVICE

ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, OverflowError, MemoryError)


@dataclass
class Call:
    """Arguments of functional.lstm."""

    x: Any
    hx: Any
    weights: list[Any]
    lengths: Any
    reset_mask: Any
    case: Case

    def run(self) -> tuple[Tensor, ...]:
        case = self.case
        return fastlstm.functional.lstm(
            self.x, self.hx, self.weights, case.bias, case.layers, 0.0, True, case.bidirectional, case.batch_first,
            lengths=self.lengths, reset_mask=self.reset_mask, return_cell_states=case.cells,
        )  # fmt: skip

    def names(self) -> list[str]:
        return ["x", *(["h0", "c0"] if self.hx else []), *(f"w{k}" for k in range(len(self.weights)))]

    def get(self, argument: str) -> Tensor:
        if argument == "x":
            return self.x
        return self.hx[argument == "c0"] if argument in ("h0", "c0") else self.weights[int(argument[1:])]

    def put(self, argument: str, value: Any) -> None:
        if argument == "x":
            self.x = value
        elif argument in ("h0", "c0"):
            self.hx = (value, self.hx[1]) if argument == "h0" else (self.hx[0], value)
        else:
            self.weights[int(argument[1:])] = value

    def change(self, rng: random.Random, f: Callable[[Tensor], Any]) -> str:
        argument = rng.choice(self.names())
        self.put(argument, f(self.get(argument)))
        return argument


def misaligned(t: Tensor, shift: int) -> Tensor:
    """Copy t to an address `shift` bytes past an aligned one; on a GPU, which requires alignment, `shift` elements."""
    t = t.contiguous()
    if not t.numel():
        return t
    if t.device.type != "cpu":
        return torch.cat([t.new_empty(shift), t.view(-1)])[shift:].view(t.shape)
    buffer = bytearray(t.numel() * t.element_size() + 64)
    misaligned_copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=shift).view(t.shape)
    return misaligned_copy.copy_(t)


def overlapping(t: Tensor) -> Tensor:
    """Aliasing rows: each begins one element after the previous row."""
    if t.dim() < 2 or not t.numel():
        return t
    size = t.shape[-1] + sum(n - 1 for n in t.shape[:-1])
    return torch.randn(size).to(t).as_strided(t.shape, [1] * t.dim())


def special(t: Tensor, value: float, rng: random.Random) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel():
        t.view(-1)[rng.randrange(t.numel())] = value
    return t


SMALL_INTEGERS = (torch.uint8, torch.int16, torch.int32)
# Unusual but valid calls, by what is unusual.
UNUSUAL: dict[str, Callable[[Call, random.Random], Any]] = {
    "misaligned": lambda c, r: c.change(r, lambda t: misaligned(t, r.choice((1, 2, 4, 12)))),
    "offset": lambda c, r: c.change(r, lambda t: torch.cat([t.new_ones(3), t.reshape(-1)])[3:].view(t.shape)),
    "overlapping": lambda c, r: c.change(r, overlapping),
    "expanded": lambda c, r: c.change(r, lambda t: t[:1].expand(t.shape) if t.dim() else t),
    "negative view": lambda c, r: c.change(r, torch._neg_view),
    "transposed memory": lambda c, r: c.change(r, lambda t: t.t().contiguous().t() if t.dim() == 2 else t),
    "not a number": lambda c, r: c.change(r, lambda t: special(t, float("nan"), r)),
    "infinite": lambda c, r: c.change(r, lambda t: special(t, r.choice((1, -1)) * float("inf"), r)),
    "huge": lambda c, r: c.put(p := r.choice([p for p in c.names() if p[0] != "w"]), c.get(p) * r.choice((1e20, 1e30))),
    "tiny": lambda c, r: c.change(r, lambda t: t * 1e-40),
    "one tensor twice": lambda c, r: c.put(f"w{len(c.weights) - 1}", _like(c, f"w{len(c.weights) - 1}")),
    "subclass": lambda c, r: c.change(r, lambda t: torch.nn.Parameter(t.detach(), requires_grad=False)),
    "int lengths": lambda c, r: setattr(
        c, "lengths", _lengths(c, r, r.choice((torch.uint8, torch.int16, torch.int32)))
    ),
    "plain": lambda c, r: None,
}


def _like(c: Call, argument: str) -> Tensor:
    wanted = c.get(argument)
    return next((c.get(p) for p in c.names() if c.get(p).shape == wanted.shape), wanted)


def _lengths(c: Call, rng: random.Random, dtype: torch.dtype) -> Tensor:
    T, B = (c.x.shape[1], c.x.shape[0]) if c.case.batch_first else c.x.shape[:2]
    return torch.tensor([rng.randint(0, T) for _ in range(B)], dtype=dtype)


def _oversized(t: Tensor, rng: random.Random) -> Tensor:
    """Expand one element to more elements than fit in any memory, in one dimension."""
    shape = list(t.shape)
    k = rng.randrange(len(shape))
    shape[k] = rng.choice((2**40, 2**62 // max(1, t.numel() // max(1, shape[k]))))  # near the max int64
    return t.new_ones([1] * t.dim()).expand(shape)


def _bad_lengths(c: Call, rng: random.Random) -> None:
    good = _lengths(c, rng, torch.int64).cpu()  # beyond T on a GPU they are a device-side assertion
    T = c.x.shape[1] if c.case.batch_first else c.x.shape[0]
    bad = [good + T + 1, good - T - 1, good + 2**62, good - 2**63, good.float(), good.bool(), good[None], good[:-1],
           torch.cat([good, good, good]), good.to("meta"), [T + 1] * len(good), ["a"] * len(good), T + 1, "all",
           [float("nan")] * len(good), torch.nested.nested_tensor([good.float()]) if len(good) else good.float(),
    ]  # fmt: skip
    c.lengths = rng.choice(bad)


def _bad_mask(c: Call, rng: random.Random) -> None:
    shape = tuple(c.x.shape[:2])
    mask = torch.zeros(shape, dtype=torch.bool)
    c.reset_mask = rng.choice(
        [mask.float(), mask.long(), mask[..., None], mask[:, :0], torch.zeros(shape[0] + 1, shape[1] + 2).bool(), True,
         mask.tolist(), mask.to("meta"), mask.any(1), "none"]
    )  # fmt: skip


OTHER_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.bfloat16, torch.uint8)
INVALID: dict[str, Callable[[Call, random.Random], Any]] = {
    "dtype": lambda c, r: c.change(r, lambda t: t.to(r.choice(OTHER_DTYPES))),
    "device": lambda c, r: c.change(
        r, lambda t: t.to(r.choice(("meta", "cpu")) if TEST_DEVICE.device != "cpu" else "meta")
    ),
    "lengths": _bad_lengths,
    "reset_mask": _bad_mask,
    "oversized": lambda c, r: c.change(r, lambda t: _oversized(t, r)),
    "more dimensions": lambda c, r: c.change(r, lambda t: t[None]),
    "fewer dimensions": lambda c, r: c.change(r, lambda t: t.sum(0)),
    "one more": lambda c, r: c.change(r, lambda t: torch.cat([t, t[-1:]])),
    "one less": lambda c, r: c.change(r, lambda t: t[:-1]),
    "one less inside": lambda c, r: c.change(r, lambda t: t[..., :-1]),
    "empty": lambda c, r: c.change(r, lambda t: t.new_empty(0)),
    "sparse": lambda c, r: c.change(r, lambda t: t.to_sparse()),
    "no tensor": lambda c, r: c.change(r, lambda t: r.choice((None, 1.0, "x", t.tolist(), [t]))),
    "fewer weights": lambda c, r: c.weights.pop(r.randrange(len(c.weights))),
    "more weights": lambda c, r: c.weights.append(r.choice(c.weights)),
    "shuffled weights": lambda c, r: r.shuffle(c.weights),
    "one state": lambda c, r: setattr(c, "hx", r.choice(((c.x,), (c.x, c.x, c.x), c.x[:0], "hx"))),
}


def draw(seed: int, backend: str = "native") -> tuple[str, Call]:
    """Return the kind and the call of configuration `seed`, on TEST_DEVICE."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtypes = (torch.float32,) if backend == "triton" else (torch.float64, torch.float32)
    case = replace(random_case(rng, dtypes), packed=False, unbatched=False, strided=())
    if backend == "triton":  # a compilation each
        case = replace(case, proj=0, H=rng.choice((3, 16, 33)), layers=1, frozen=())
    case_tensors = tensors(replace(case, lengths=None, resets=case.resets if rng.random() < 0.5 else None))
    hx = case_tensors.hx if case_tensors.hx is None else tuple(case_tensors.hx)
    weights = [w.detach() for w in case_tensors.weights.values()]
    call = Call(case_tensors.input.detach(), hx, weights, None, case_tensors.reset_mask, case)
    if hx is not None:
        call.hx = tuple(s.detach() for s in hx)
    if rng.random() < 0.3 and min(call.x.shape) > 0:
        call.lengths = _lengths(call, rng, torch.int64)
    kind = rng.choice([*UNUSUAL, *INVALID])
    with torch.device(TEST_DEVICE.device):
        name = (UNUSUAL.get(kind) or INVALID[kind])(call, rng)
    for argument in call.names() if kind in UNUSUAL else []:
        if rng.random() < 0.6:
            call.put(argument, call.get(argument).detach().requires_grad_())
    return f"{kind}{f' of {name}' if isinstance(name, str) else ''}", call


def outcome(call: Call, backend: str) -> tuple[str, list[Tensor]]:
    """("", results and gradients), or (the error, [])."""
    try:
        with fastlstm.use_backend(backend):
            results = list(call.run())
            leaves = [t for p in call.names() if isinstance(t := call.get(p), Tensor) and t.requires_grad]
            used = [r for r in results if r.requires_grad]
            if used and leaves:
                grads = torch.autograd.grad(sum(r.sum() for r in used), leaves, allow_unused=True)
                results += [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        return "", [r.detach() for r in results]
    except ERRORS as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", []


def difference(results: list[Tensor], reference: list[Tensor], strict: int = 0) -> str:
    """Return "" if equal up to rounding, otherwise the difference. The first `strict` must be finite alike."""
    for k, (a, b) in enumerate(zip(results, reference, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {k} is {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
        if a.device.type == "meta":
            continue
        finite = a.isfinite() & b.isfinite()
        if k < strict and not torch.equal(a.isfinite(), b.isfinite()):
            return f"result {k} differs in where it is finite"
        a, b = a[finite].double(), b[finite].double()
        tolerance = 1e-3 if reference[0].dtype == torch.float32 else 1e-8
        if b.numel() and float((a - b).abs().max()) > tolerance * (1e-2 + float(b.abs().max())):
            return f"result {k} is off by {float((a - b).abs().max()):.3g} at scale {float(b.abs().max()):.3g}"
    return ""


def check_call(kind: str, call: Call, backend: str) -> str:
    """Return "" if the call is correct, otherwise the reason it is not."""
    error, results = outcome(call, backend)
    if kind.split(" of ")[0] in INVALID:
        if error:
            return ""
        for argument in call.names():
            if isinstance(t := call.get(argument), Tensor) and t.is_sparse:
                call.put(argument, t.to_dense())
        expected, reference = outcome(call, "reference")
        return f"gave a result, the reference: {expected}" if expected else difference(results, reference)
    expected, reference = outcome(call, "reference")
    if error or expected:
        return "" if error and expected else f"raised {error!r}, the reference {expected!r}"
    # Infinities and NaN must reach the same results and gradients as in the reference. With lengths, with resets or
    # without h0, kernels skip products with zeros that the reference computes, and 0 * inf is NaN. There gradients are
    # exempt, and results too if a weight is not finite.
    if call.lengths is None and call.reset_mask is None and call.hx is not None:
        return difference(results, reference, len(results))
    in_weight = any(kind.startswith(f"{value} of w") for value in ("not a number", "infinite"))
    return difference(results, reference, 0 if in_weight else 3 + call.case.cells)


def main(backend: str, seed: int, count: int, device: str = "cpu") -> int:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    TEST_DEVICE.device = device
    warnings.simplefilter("ignore")
    failed = 0
    for k in range(seed, seed + count):
        kind, call = draw(k, backend)
        print(f"{k} {kind}", flush=True)
        reason = check_call(kind, call, backend)
        if device == "cuda":
            torch.cuda.synchronize()  # so that the last line names the call whose kernel failed
        if reason:
            failed += 1
            print(f"WRONG {k} {kind}: {reason}\n  {call.case}", flush=True)
    print(f"done, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
