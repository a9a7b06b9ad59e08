"""Quality against cost: curves of several seeds, what a quality cost, and which differences count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from klray.statistics import CONFIDENCE

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """An arm's error against one cost, for each of its seeds.

    ``costs`` and ``errors`` [S, P] are positive: S seeds, P looks at the same numbers of images, in order of cost.
    """

    costs: Array
    errors: Array

    @property
    def end(self) -> float:
        """The largest cost that every seed has reached."""
        return float(self.costs[:, -1].min())

    def errors_at(self, cost: float) -> Array:
        """Each seed's error at a cost, [S]: log-log linear between looks, NaN before the first and after the last."""
        rows = zip(np.log(self.costs), np.log(self.errors), strict=True)
        return np.exp([np.interp(np.log(cost), c, e, left=math.nan, right=math.nan) for c, e in rows])

    def cost_to(self, error: float, seeds: Sequence[int] | None = None) -> float:
        """Where the geometric mean of the seeds' curves first comes down to ``error``; infinity where it does not.

        Args:
            seeds: which of the seeds, with repetitions; None: each once.
        """
        rows = slice(None) if seeds is None else list(seeds)
        costs, errors = np.log(self.costs[rows]).mean(0), np.log(self.errors[rows]).mean(0)
        target = math.log(error)
        below = np.flatnonzero(errors <= target)
        if len(below) == 0:
            return math.inf
        i = int(below[0])
        if i == 0:
            return math.exp(costs[0])  # an upper bound: nobody looked earlier
        part = (errors[i - 1] - target) / (errors[i - 1] - errors[i])
        return math.exp(costs[i - 1] + part * (costs[i] - costs[i - 1]))


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


Word = Literal["ahead", "behind", "not separable"]


@dataclass(frozen=True)
class Verdict:
    """An arm against the baseline at equal cost.

    Attributes:
        cost: where both are compared: the largest that every seed of both has reached.
        ratio: of the errors' geometric means, arm / baseline, with Welch's interval over the seeds; below 1 is better.
        word: ahead or behind where the interval leaves 1 out.
    """

    cost: float
    ratio: Interval
    word: Word


def compare(arm: Curves, baseline: Curves) -> Verdict:
    """Who has the smaller error at equal cost. Not separable, too, where a seed has not been looked at by then."""
    cost = min(arm.end, baseline.end)
    ratio = ratio_of_means(arm.errors_at(cost), baseline.errors_at(cost))
    return Verdict(cost, ratio, word_of(ratio))


def ratio_of_means(a: Array, b: Array) -> Interval:
    """Geometric mean of ``a`` [S] over that of ``b`` [R], with Welch's t interval on the logs; NaN for one seed."""
    logs = np.log(a), np.log(b)
    ratio = float(np.exp(logs[0].mean() - logs[1].mean()))
    if min(len(a), len(b)) < 2:
        return Interval(ratio, math.nan, math.nan)
    if max(np.ptp(logs[0]), np.ptp(logs[1])) == 0:
        return Interval(ratio, ratio, ratio)
    limits = stats.ttest_ind(*logs, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(ratio, float(np.exp(limits.low)), float(np.exp(limits.high)))


def word_of(ratio: Interval) -> Word:
    """The plain word for a ratio of errors."""
    return "ahead" if ratio.high < 1 else "behind" if ratio.low > 1 else "not separable"


def cost_ratio(arm: Curves, baseline: Curves, error: float, resamples: int = 2000) -> Interval:
    """What the arm pays for ``error``, over what the baseline pays, with a bootstrap interval over the seeds of both.

    Infinite where the arm does not reach it, NaN where the baseline does not. Where only a resampled baseline does not,
    its cost is as good as infinite, the ratio 0.
    """
    random = np.random.default_rng(0)

    def draw(curves: Curves) -> float:
        return curves.cost_to(error, random.integers(len(curves.costs), size=len(curves.costs)).tolist())

    ratios = [_ratio(draw(arm), draw(baseline)) for _ in range(resamples)]
    costs = arm.cost_to(error), baseline.cost_to(error)
    value = math.nan if math.isinf(costs[1]) else costs[0] / costs[1]
    known = np.sort([ratio for ratio in ratios if not math.isnan(ratio)])
    if math.isnan(value) or len(known) == 0:
        return Interval(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2  # no interpolation: an infinite ratio has no half way
    low, high = (float(known[round(q * (len(known) - 1))]) for q in (tail, 1 - tail))
    return Interval(value, low, high)


def _ratio(arm: float, baseline: float) -> float:
    return math.nan if math.isinf(baseline) and math.isinf(arm) else arm / baseline
