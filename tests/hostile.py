"""Calls that no well-meaning program makes: python -m tests.hostile BACKEND SEED COUNT [DEVICE]. It may die.

Configuration k is a random Case with one thing wrong or odd about it, drawn from seed + k and printed before it runs:
the last line names what crashed. Odd but valid calls must give the reference's results and gradients; wrong ones must
raise, or give what the reference gives. tests/test_hostile.py runs it.
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
from .place import HERE

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

    def places(self) -> list[str]:
        return ["x", *(["h0", "c0"] if self.hx else []), *(f"w{k}" for k in range(len(self.weights)))]

    def rows(self) -> list[str]:
        """The places of x and hx: weights as large as 1e20 would make of rounding errors whole numbers."""
        return [place for place in self.places() if place[0] != "w"]

    def get(self, place: str) -> Tensor:
        if place == "x":
            return self.x
        return self.hx[place == "c0"] if place in ("h0", "c0") else self.weights[int(place[1:])]

    def put(self, place: str, value: Any) -> None:
        if place == "x":
            self.x = value
        elif place in ("h0", "c0"):
            self.hx = (value, self.hx[1]) if place == "h0" else (self.hx[0], value)
        else:
            self.weights[int(place[1:])] = value

    def change(self, rng: random.Random, f: Callable[[Tensor], Any]) -> str:
        place = rng.choice(self.places())
        self.put(place, f(self.get(place)))
        return place


def misaligned(t: Tensor, shift: int) -> Tensor:
    """The values of t at an address `shift` bytes past an aligned one; elements on a GPU, which faults on less."""
    t = t.contiguous()
    if not t.numel():
        return t
    if t.device.type != "cpu":
        return torch.cat([t.new_empty(shift), t.view(-1)])[shift:].view(t.shape)
    buffer = bytearray(t.numel() * t.element_size() + 64)
    moved = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=shift).view(t.shape)
    return moved.copy_(t)


def overlapping(t: Tensor) -> Tensor:
    """Rows that share memory: each begins one element after the one before."""
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
# What is odd about a valid call.
ODD: dict[str, Callable[[Call, random.Random], Any]] = {
    "misaligned": lambda c, r: c.change(r, lambda t: misaligned(t, r.choice((1, 2, 4, 12)))),
    "offset": lambda c, r: c.change(r, lambda t: torch.cat([t.new_ones(3), t.reshape(-1)])[3:].view(t.shape)),
    "overlapping": lambda c, r: c.change(r, overlapping),
    "expanded": lambda c, r: c.change(r, lambda t: t[:1].expand(t.shape) if t.dim() else t),
    "negative view": lambda c, r: c.change(r, torch._neg_view),
    "transposed memory": lambda c, r: c.change(r, lambda t: t.t().contiguous().t() if t.dim() == 2 else t),
    "not a number": lambda c, r: c.change(r, lambda t: special(t, float("nan"), r)),
    "infinite": lambda c, r: c.change(r, lambda t: special(t, r.choice((1, -1)) * float("inf"), r)),
    "huge": lambda c, r: c.put(
        p := r.choice([p for p in c.places() if p[0] != "w"]), c.get(p) * r.choice((1e20, 1e30))
    ),
    "tiny": lambda c, r: c.change(r, lambda t: t * 1e-40),
    "one tensor twice": lambda c, r: c.put(f"w{len(c.weights) - 1}", _like(c, f"w{len(c.weights) - 1}")),
    "subclass": lambda c, r: c.change(r, lambda t: torch.nn.Parameter(t.detach(), requires_grad=False)),
    "int lengths": lambda c, r: setattr(
        c, "lengths", _lengths(c, r, r.choice((torch.uint8, torch.int16, torch.int32)))
    ),
    "plain": lambda c, r: None,
}


def _like(c: Call, place: str) -> Tensor:
    wanted = c.get(place)
    return next((c.get(p) for p in c.places() if c.get(p).shape == wanted.shape), wanted)


def _lengths(c: Call, rng: random.Random, dtype: torch.dtype) -> Tensor:
    T, B = (c.x.shape[1], c.x.shape[0]) if c.case.batch_first else c.x.shape[:2]
    return torch.tensor([rng.randint(0, T) for _ in range(B)], dtype=dtype)


def _vast(t: Tensor, rng: random.Random) -> Tensor:
    """A view of one element with more of them than any memory has, in one dimension."""
    shape = list(t.shape)
    k = rng.randrange(len(shape))
    shape[k] = rng.choice((2**40, 2**62 // max(1, t.numel() // max(1, shape[k]))))  # the most that a size can say
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
WRONG: dict[str, Callable[[Call, random.Random], Any]] = {
    "dtype": lambda c, r: c.change(r, lambda t: t.to(r.choice(OTHER_DTYPES))),
    "device": lambda c, r: c.change(r, lambda t: t.to(r.choice(("meta", "cpu")) if HERE.device != "cpu" else "meta")),
    "lengths": _bad_lengths,
    "reset_mask": _bad_mask,
    "vast": lambda c, r: c.change(r, lambda t: _vast(t, r)),
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
    """Configuration `seed`: what is odd about it, and the call; where HERE says."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtypes = (torch.float32,) if backend == "triton" else (torch.float64, torch.float32)
    case = replace(random_case(rng, dtypes), packed=False, unbatched=False, strided=())
    if backend == "triton":  # a compilation each
        case = replace(case, proj=0, H=rng.choice((3, 16, 33)), layers=1, frozen=())
    given = tensors(replace(case, lengths=None, resets=case.resets if rng.random() < 0.5 else None))
    hx = given.hx if given.hx is None else tuple(given.hx)
    call = Call(given.input.detach(), hx, [w.detach() for w in given.weights.values()], None, given.reset_mask, case)
    if hx is not None:
        call.hx = tuple(s.detach() for s in hx)
    if rng.random() < 0.3 and min(call.x.shape) > 0:
        call.lengths = _lengths(call, rng, torch.int64)
    kind = rng.choice([*ODD, *WRONG])
    with torch.device(HERE.device):
        where = (ODD.get(kind) or WRONG[kind])(call, rng)
    for place in call.places() if kind in ODD else []:
        if rng.random() < 0.6:
            call.put(place, call.get(place).detach().requires_grad_())
    return f"{kind}{f' of {where}' if isinstance(where, str) else ''}", call


def outcome(call: Call, backend: str) -> tuple[str, list[Tensor]]:
    """No error, results and gradients; or the error and none."""
    try:
        with fastlstm.use_backend(backend):
            results = list(call.run())
            leaves = [t for p in call.places() if isinstance(t := call.get(p), Tensor) and t.requires_grad]
            used = [r for r in results if r.requires_grad]
            if used and leaves:
                grads = torch.autograd.grad(sum(r.sum() for r in used), leaves, allow_unused=True)
                results += [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        return "", [r.detach() for r in results]
    except ERRORS as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", []


def differ(got: list[Tensor], truth: list[Tensor], strict: int = 0) -> str:
    """Nothing when equal up to rounding; in the first `strict` ones what is not finite must be so in both."""
    for k, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {k} is {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
        if a.device.type == "meta":
            continue
        finite = a.isfinite() & b.isfinite()
        if k < strict and not torch.equal(a.isfinite(), b.isfinite()):
            return f"result {k} is finite elsewhere"
        a, b = a[finite].double(), b[finite].double()
        tolerance = 1e-3 if truth[0].dtype == torch.float32 else 1e-8
        if b.numel() and float((a - b).abs().max()) > tolerance * (1e-2 + float(b.abs().max())):
            return f"result {k} is off by {float((a - b).abs().max()):.3g} at scale {float(b.abs().max()):.3g}"
    return ""


def judge(kind: str, call: Call, backend: str) -> str:
    """Nothing when all is well, else what is wrong."""
    error, got = outcome(call, backend)
    if kind.split(" of ")[0] in WRONG:
        if error:
            return ""
        for place in call.places():
            if isinstance(t := call.get(place), Tensor) and t.is_sparse:
                call.put(place, t.to_dense())
        expected, truth = outcome(call, "reference")
        return f"gave a result, the reference: {expected}" if expected else differ(got, truth)
    expected, truth = outcome(call, "reference")
    if error or expected:
        return "" if error and expected else f"raised {error!r}, the reference {expected!r}"
    # What is not finite reaches the same results and gradients, except where products with zeros are left out, since
    # 0 * inf is NaN: past a length, at a reset and for an h0 that is not given the reference leaves none out. There x
    # and hx must reach the same results.
    if call.lengths is None and call.reset_mask is None and call.hx is not None:
        return differ(got, truth, len(got))
    in_weight = any(kind.startswith(f"{what} of w") for what in ("not a number", "infinite"))
    return differ(got, truth, 0 if in_weight else 3 + call.case.cells)


def main(backend: str, seed: int, count: int, device: str = "cpu") -> int:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    HERE.device = device
    warnings.simplefilter("ignore")
    bad = 0
    for k in range(seed, seed + count):
        kind, call = draw(k, backend)
        print(f"{k} {kind}", flush=True)
        found = judge(kind, call, backend)
        if device == "cuda":
            torch.cuda.synchronize()  # a kernel that failed is named by the last line
        if found:
            bad += 1
            print(f"WRONG {k} {kind}: {found}\n  {call.case}", flush=True)
    print(f"done, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
