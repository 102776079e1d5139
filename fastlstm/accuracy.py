"""Which differences rounding explains: `error_bounds` and `compare`, the one rule for "right".

The truth is an evaluation in float64. Its neighbours are the same evaluation with every operation's result perturbed
as one rounding of the tested precision would perturb it, at random (Monte Carlo arithmetic: Parker 1997, "Monte Carlo
Arithmetic: exploiting randomness in floating-point arithmetic"). How far the neighbours lie from the truth is how far
a right implementation may lie, whatever machine, order of summation or library it uses. docs/numerics.md derives it.

The tests, the fuzz, the benchmarks' gate and `python -m fastlstm` share this rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# The error allowed is this many standard deviations of the model's, at the tensor's worst element. Over a million
# elements the largest of as many Gaussian errors is at 4.9; the rest is for errors that are not independent.
DEVIATIONS = 6.0
# Relative error of a sigmoid or tanh, in ulp; tests/cpu/test_activations.py holds the kernels to it.
ACTIVATION_ULP = 2.5
# Unit roundoffs of factors of float32 by torch's names: TF32 has 10 bits of mantissa, bfloat16 7.
FACTOR_UNITS = {"ieee": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}
# Unit roundoff of the truth: float64.
TRUTH_UNIT = 2.0**-53
# Evaluations per bound: enough that together they hold this many values of the smallest result ...
VALUES = 128
# ... within these limits.
MIN_SAMPLES, MAX_SAMPLES = 2, 16
# Part of the bounds from fewer evaluations than those, doubled from MIN_SAMPLES on, below which an error is accepted
# already. One value's deviation comes out twice too large from 2 evaluations with a probability of exp(-4) = 2 %, from
# 4 with 0.3 %: only then can an error pass here that the full number would refuse, and only one close to the bound.
CLEAR = 0.5


@dataclass(frozen=True)
class Precision:
    """What an implementation rounds. A unit roundoff is the largest relative error of rounding to nearest."""

    sums: float  # unit roundoff of the additions of a product or a sum
    pointwise: float  # of pointwise arithmetic, and of a product's or sum's result
    storage: float  # of what is stored: activations, results
    factors: float  # of the factors of a product; 0 where they have the precision of the sums
    tiny: float  # absolute error near zero: the smallest normal number, since some units flush what is below
    max_running_sum: int = 2**62  # terms that are added one after the other; longer sums are made in blocks of as many

    @classmethod
    def of(cls, dtype: torch.dtype, products: str = "ieee") -> Precision:
        """That of a torch dtype. bfloat16 and float16 are stored; sums, states and pointwise arithmetic are float32.

        products: of float32, as torch's fp32_precision names them: "tf32" and "bf16" round their factors.
        """
        finfo = torch.finfo(dtype)
        unit = finfo.eps / 2
        single = torch.finfo(torch.float32)
        if dtype in (torch.float16, torch.bfloat16):
            # float16's subnormal numbers are 2^-24 apart; bfloat16 has the range of float32.
            return cls(single.eps / 2, single.eps / 2, unit, unit, max(finfo.tiny * unit, single.tiny))
        return cls(unit, unit, unit, FACTOR_UNITS[products], 4 * finfo.tiny if dtype == torch.float32 else 0.0)

    @classmethod
    def per_op(cls, dtype: torch.dtype) -> Precision:
        """That of a composition of torch's ops, each of which rounds its result to dtype; they add in float32."""
        return replace(cls.of(dtype), pointwise=torch.finfo(dtype).eps / 2)

    def additions(self, K: int) -> float:
        """How many additions, one after the other, a sum of K terms takes."""
        block = min(K, self.max_running_sum)
        return block + K / block if block < K else K


class RandomRounding(TorchDispatchMode):
    """Perturb the results of float64 operations as an evaluation at `precision` might; `seed` draws which way.

    Below autograd, so that forward and backward are both perturbed, whatever module or function runs inside.
    """

    def __init__(self, precision: Precision, seed: int) -> None:
        super().__init__()
        self.precision, self._seed = precision, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap `__torch_dispatch__` against compilation, at half of the time this mode takes per op."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            return func(*args, **kwargs)
        return rule(self, func, args, kwargs)

    def noise(self, like: Tensor) -> Tensor:
        """Independent and uniform in [-1, 1)."""
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.empty_like(like).uniform_(-1, 1, generator=self._generators[device])

    def perturb(self, out: Any, unit: float, tiny: float = 0.0) -> Any:
        """out, in place, with a relative error of up to `unit` and an absolute one of up to `tiny`; zeros stay."""
        if not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        noise = self.noise(out)
        if tiny:
            size = out.abs().mul_(unit).add_(tiny).masked_fill_((out == 0) | out.isnan(), 0)
            return out.addcmul_(size, noise)
        return out.addcmul_(out, noise, value=unit)


def _pointwise(mode: RandomRounding, func: Any, args: Any, kwargs: Any) -> Any:
    return mode.perturb(func(*args, **kwargs), mode.precision.pointwise)


def _activation(mode: RandomRounding, func: Any, args: Any, kwargs: Any) -> Any:
    p = mode.precision
    unit = 2 * ACTIVATION_ULP * p.sums + (p.storage if p.storage > p.sums else 0.0)
    return mode.perturb(func(*args, **kwargs), unit, p.tiny)


def _activation_backward(mode: RandomRounding, func: Any, args: Any, kwargs: Any) -> Any:
    return mode.perturb(func(*args, **kwargs), 3 * mode.precision.pointwise)  # g * y * (1 - y), g * (1 - y^2)


def _sum(mode: RandomRounding, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor) or out.dtype != torch.float64 or out.numel() == 0:
        return out
    terms = args[0]
    K = terms.numel() // out.numel()
    if K <= 1:
        return out
    n = mode.precision.additions(K)
    squares = func(terms * terms, *args[1:], **kwargs)
    size = (squares.mul_((n + 1) / 6) + out * out * ((n + 1) / 3)).sqrt_().mul_(mode.precision.sums)
    return _rounded_sum(mode, out.addcmul_(size.nan_to_num_(0, 0), mode.noise(out)))


def _rounded_sum(mode: RandomRounding, out: Any) -> Any:
    """The result of a sum, as it is stored where that has a lower precision than the additions."""
    p = mode.precision
    return mode.perturb(out, p.pointwise) if p.pointwise > p.sums else out


def _product(mode: RandomRounding, func: Any, args: Any, kwargs: Any) -> Any:
    """A sum of K terms t in any order errs with a variance of about u^2/3 [K/6 sum t^2 + K/3 (sum t)^2].

    The first part is that of factors with relative errors of u sqrt(K/6), which the smaller factor takes for both.
    """
    args, p = list(args), mode.precision
    first = len(args) - 2  # addmm and baddbmm begin with what is added
    a, b = args[first], args[first + 1]
    if a.dtype != torch.float64:
        return func(*args, **kwargs)
    n = p.additions(a.shape[-1])
    smaller = first if a.numel() <= b.numel() else first + 1
    unit = ((n + 7) / 6 * p.sums**2 + 2 * p.factors**2) ** 0.5
    args[smaller] = mode.perturb(args[smaller].clone(), unit)
    out = func(*args, **kwargs)
    return _rounded_sum(mode, mode.perturb(out, p.sums * ((n + 1) / 3) ** 0.5))


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot), _product),
    **dict.fromkeys((aten.sigmoid, aten.sigmoid_, aten.tanh, aten.tanh_), _activation),
    **dict.fromkeys((aten.sigmoid_backward, aten.tanh_backward), _activation_backward),
    **dict.fromkeys((aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_), _pointwise),
    aten.sum: _sum,
}


@dataclass(frozen=True)
class Accuracy:
    """How far one result is from the truth, and how far rounding may bring it, in the max norm."""

    name: str
    error: float
    allowed: float
    scale: float  # the truth's largest value

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed < float("inf")

    @property
    def error_ratio(self) -> float:
        """Error as a part of what is allowed: at most 1 where ok."""
        return 0.0 if self.error == 0 else self.error / self.allowed if self.allowed else float("inf")

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g} at scale {self.scale:.3g}"


class Bounds(Mapping[str, float]):
    """The largest error that rounding explains in each result of `error_bounds`' run.

    Every evaluation that a bound is taken from costs time; `compare` takes the few that its verdict needs.
    """

    def __init__(
        self,
        run: Callable[[], Mapping[str, Tensor]],
        truth: Mapping[str, Tensor],
        precision: Precision,
        terms: Mapping[str, int],
    ) -> None:
        self._run, self._truth, self._precision, self._terms = run, truth, precision, terms
        self._squares = {name: torch.zeros_like(value) for name, value in truth.items()}
        self._samples = 0  # evaluations that are in _squares
        smallest = min((value.numel() for value in truth.values() if value.numel()), default=VALUES)
        self._all = min(max(-(-VALUES // smallest), MIN_SAMPLES), MAX_SAMPLES)
        self._found: dict[int, dict[str, float]] = {}  # bounds by the number of evaluations

    def __getitem__(self, name: str) -> float:
        return self._from(self._all)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._truth

    def __iter__(self) -> Iterator[str]:
        return iter(self._truth)

    def __len__(self) -> int:
        return len(self._truth)

    def stages(self) -> Iterator[dict[str, float]]:
        """The bounds from MIN_SAMPLES evaluations, from twice as many, and so on; the last are the mapping's own."""
        return map(self._from, self._stages())

    def _from(self, samples: int) -> dict[str, float]:
        """The bounds from the first `samples` evaluations, a stage's number."""
        for stage in self._stages():
            if stage <= samples and stage not in self._found:
                while self._samples < stage:
                    self._draw()
                self._found[stage] = {name: self._bound(name) for name in self}
        return self._found[samples]

    def _stages(self) -> Iterator[int]:
        samples = MIN_SAMPLES
        while samples < self._all:
            yield samples
            samples *= 2
        yield self._all

    def _bound(self, name: str) -> float:
        square, precision = self._squares[name], self._precision
        variance = float(square.max() / self._samples) if square.numel() else 0.0
        n = precision.additions(self._terms.get(name, 0))
        # As in `_sum`, where the sum of the terms' squares is taken to be the square of the largest sum.
        variance += precision.sums**2 / 3 * n / 2 * _scale(self._truth[name]) ** 2
        if precision.sums <= TRUTH_UNIT:  # the truth errs as much as what it judges
            variance *= 2
        return DEVIATIONS * variance**0.5

    def _draw(self) -> None:
        mode = RandomRounding(self._precision, self._samples)
        with torch.enable_grad(), mode:
            results = self._run()
        for name, value in results.items():
            # One rounding of the result itself, as it is stored.
            off = mode.perturb(value.detach().clone(), self._precision.storage, self._precision.tiny)
            off -= self._truth[name]
            self._squares[name] += off.masked_fill_(off.isnan(), 0).square_()
        self._samples += 1


def error_bounds(
    run: Callable[[], Mapping[str, Tensor]], precision: Precision, terms: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], Bounds]:
    """Compute the truth, and the largest error that rounding explains in each result.

    Args:
        run: evaluates everything in float64 and gives its results by name; called several times, also later by the
            bounds, it must use the same inputs on each call.
        precision: that of the implementation to be judged.
        terms: for results that are sums, the number of terms, where `run` adds them up in parts and an implementation
            may take them one after the other: weights' gradients, over all steps and rows.

    Returns:
        run's results, and for each name a bound on the max norm of an error.

    Example:
        >>> import torch
        >>> from fastlstm.accuracy import Precision, compare, error_bounds
        >>> a, b = torch.randn(4, 8), torch.randn(8, 3)
        >>> truth, bounds = error_bounds(lambda: {"c": a.double() @ b.double()}, Precision.of(torch.float32))
        >>> compare({"c": a @ b}, truth, bounds)[0].ok
        True
    """
    with torch.enable_grad():
        truth = {name: value.detach() for name, value in run().items()}
    return truth, Bounds(run, truth, precision, terms or {})


def _scale(truth: Tensor) -> float:
    """The largest finite value."""
    sizes = truth.abs().nan_to_num(0, 0)
    return float(sizes.max()) if sizes.numel() else 0.0


def max_error(got: Tensor, truth: Tensor) -> float:
    """The largest difference in float64; infinite for another shape and where one side alone is NaN or infinite."""
    if got.shape != truth.shape:
        return float("inf")
    got, truth = got.detach().to(truth.device).double(), truth.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, got - truth).abs()
    return float(difference.nan_to_num(float("inf"), float("inf")).max()) if difference.numel() else 0.0


def compare(results: Mapping[str, Tensor], truth: Mapping[str, Tensor], bounds: Mapping[str, float]) -> list[Accuracy]:
    """Return the accuracy of each result, the worst first; see error_bounds. `truth` may hold more than `results`.

    Where every error is at most CLEAR of the bounds that few evaluations give, no more are made, and `allowed` is what
    these few give.
    """
    errors = {name: max_error(value, truth[name]) for name, value in results.items()}
    scales = {name: _scale(truth[name]) for name in results}
    for stage in bounds.stages() if isinstance(bounds, Bounds) else [bounds]:
        found = [Accuracy(name, error, stage[name], scales[name]) for name, error in errors.items()]
        if all(accuracy.error_ratio <= CLEAR for accuracy in found):
            break
    return sorted(found, key=lambda accuracy: -accuracy.error_ratio)
