"""Statistics of paired samples: the ratio old / new of a case, its interval, and whether it is outside noise.

A launch is one pair of worker processes, old and new. A round of a launch times a block of calls in both, so a round
gives one paired ratio, in which the drift of the machine cancels. What does not cancel is fixed at the start of a
process: addresses, huge pages, the cores its threads run on. Only new processes sample it, so a launch counts as one
observation: the median of the logarithms of its rounds' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 2000
# Min change outside noise. A revision against itself gave 0.978x to 1.016x under background load
# (docs/measuring.md, "How noise is judged"); an idle machine may allow less.
MIN_CHANGE = 0.02

FASTER, SLOWER, WITHIN_NOISE = "faster", "slower", "within noise"


@dataclass(frozen=True)
class Launch:
    """Seconds per call of both revisions, one entry per round."""

    old: list[float]
    new: list[float]

    def log_ratios(self) -> np.ndarray:
        return np.log(np.asarray(self.old) / np.asarray(self.new))


@dataclass(frozen=True)
class Ratio:
    """Old time / new time; above 1 the new revision is faster."""

    value: float  # geometric mean of the launches' medians
    low: float  # bounds of the CONFIDENCE interval
    high: float
    launch_spread: float  # standard deviation of the logarithms of the launches' medians
    round_error: float  # standard error of the logarithm of one launch's median, from its rounds
    launches: int


def ratio_of(launches: Sequence[Launch], seed: int = 0) -> Ratio:
    """Estimate the ratio of one case. The interval is a bootstrap over launches, and over the rounds of each.

    Raises ValueError with fewer than two launches, or if these differ in their number of rounds.
    """
    rounds = {len(launch.old) for launch in launches} | {len(launch.new) for launch in launches}
    if len(launches) < 2 or len(rounds) != 1 or 0 in rounds:
        raise ValueError(f"at least two launches of equally many rounds are required, got {len(launches)} of {rounds}")
    logs = np.stack([launch.log_ratios() for launch in launches])  # [launches, rounds]
    count, per_launch = logs.shape
    medians = np.median(logs, axis=1)
    draw = np.random.default_rng(seed)
    picked = draw.integers(count, size=(BOOTSTRAP_SAMPLES, count, 1))
    rows = draw.integers(per_launch, size=(BOOTSTRAP_SAMPLES, count, per_launch))
    means = np.median(logs[picked, rows], axis=2).mean(axis=1)
    own_rows = draw.integers(per_launch, size=(BOOTSTRAP_SAMPLES, count, per_launch))
    errors = np.median(logs[np.arange(count)[None, :, None], own_rows], axis=2).std(axis=0)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Ratio(
        value=math.exp(medians.mean()),
        low=math.exp(low),
        high=math.exp(high),
        launch_spread=float(medians.std(ddof=1)),
        round_error=float(np.sqrt((errors**2).mean())),
        launches=count,
    )


def typical_spread(ratios: Sequence[Ratio]) -> float:
    """Standard deviation of a launch that is typical of a run: from the median of the cases' variances.

    The median of n - 1 normal deviates' variance is below their variance by the factor of chi-squared's median
    (Wilson-Hilferty). A median, because background load during a few cases must not hide changes in the others.
    """
    if not ratios:
        return 0.0
    degrees = float(np.median([ratio.launches - 1 for ratio in ratios]))
    median = float(np.median([ratio.launch_spread**2 for ratio in ratios]))
    return math.sqrt(median / (1 - 2 / (9 * degrees)) ** 3)


def noise_of(ratio: Ratio, typical: float, decisions: int, min_change: float = MIN_CHANGE) -> float:
    """Change, as a fraction of the time, up to which a ratio is within noise.

    The spread of a launch is the largest of three estimates: the case's own, which few launches give badly; what its
    rounds explain, which sees disturbances but not what is fixed per process; and the run's typical one. The quantile
    is that of a family-wise error rate of 1 - CONFIDENCE over `decisions` rows (Bonferroni).
    """
    quantile = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(decisions, 1)))
    spread = max(ratio.launch_spread, ratio.round_error, typical) / math.sqrt(ratio.launches)
    return max(min_change, math.expm1(quantile * spread))


def verdict_of(ratio: Ratio, noise: float) -> str:
    """Outside noise if the interval excludes 1 and the ratio differs from 1 by more than `noise`."""
    if ratio.low > 1 and math.log(ratio.value) > math.log1p(noise):
        return FASTER
    if ratio.high < 1 and -math.log(ratio.value) > math.log1p(noise):
        return SLOWER
    return WITHIN_NOISE


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
