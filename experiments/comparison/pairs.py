"""The difference of each pair of losses: tests, intervals, verdicts.

Simulations led to these choices. `python -m benchmarks.planted` shows how often they are right:

- The winner is the loss with the highest mean validation accuracy over its repeats. Its lead on the
  test split is still biased, because a lucky training is good on both splits. So p-values are
  corrected over all pairs of losses. Then equal losses differ significantly in at most 5 % of
  studies; with six equal losses and a correction over the winner's pairs alone, it was up to 10 %.
- At n = 5, tests of signs or ranks can't reach p = 0.05: two of 2⁵ permutations are extreme. So
  p-values are Student's t of paired differences.
- t is not sound where a loss collapses at times. With an outlying repeat, a pair is decided only if
  all repeats agree on which loss is ahead. Then equal means were told apart in at most 0.5 % of the
  studies that had one (collapses of 5 to 30 points in 10 to 30 % of repeats, n = 3 to 20), instead
  of up to 7.2 %. Where no repeat of the study collapsed, nothing can show it: see `may_fail`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from experiments.comparison.intervals import (
    ALPHA,
    Estimate,
    NewImages,
    exact,
    holm,
    over_trainings,
)
from experiments.comparison.results import IRRELEVANT

MIN_EFFECT = 0.005
"""The difference that `repeats_needed` is about: half a point."""
POWER = 0.8
"""The probability to find it."""
SPREAD_LIMIT = 0.8
"""How sure it is that the true spread is not larger than the one that `repeats_needed` assumes.

Browne (1995, "On the use of a pilot sample for sample size determination") takes the same. Planned
so from n = 2 to 20 repeats, half a point was shown in 85 to 91 %; planned from the spread itself,
in 44 to 81 %.
"""
UNFAIRNESS = 0.001
"""By so much, in accuracy, a search may favour a loss over an equal one.

So a smaller difference of losses shows nothing about them: p is that of a difference beyond it.
`benchmarks.planted` measures 0.04 to 0.07 points.
"""
MAX_REPEATS = 10_000
"""The upper bound of `repeats_needed`."""

DECIDED = ("worse", "better", "slightly worse", "slightly better", "equal")
PAIR_COLUMNS = [
    *("first", "loss", "n", "difference", "sd", "low", "high", "images_low", "images_high"),
    *("bound_low", "bound_high", "p", "p_holm", "p_images", "p_images_holm"),
    *("verdict", "images_verdict", "ahead", "ties"),
    *("probability", "probability_low", "probability_high", "repeats_needed"),
]


@dataclass(frozen=True, kw_only=True)
class Doubts:
    """What forbids to decide a pair by its p alone."""

    incomplete: Collection[str] = ()
    """The losses with a diverged or failed repeat: they are never better."""
    outlying: Collection[str] = ()
    """The losses with an outlying repeat: all repeats must agree."""


def pairwise_tests(
    accuracy: pd.DataFrame,
    images: NewImages | None = None,
    *,
    min_effect: float = IRRELEVANT,
    margin: float = 0.0,
    doubts: Doubts | None = None,
) -> pd.DataFrame:
    """Return `Assessment.pairs` of accuracies: a row a seed, a column a loss, the best first.

    p is that of a difference beyond ± margin.
    """
    found = [
        _Pair(first=first, loss=loss, differences=accuracy[first] - accuracy[loss], images=images)
        for first, loss in combinations(accuracy.columns, 2)
    ]
    rows = [each.row() for each in found]
    judge = Judge(min_effect=min_effect, doubts=doubts or Doubts())
    for prefix, name in (("", "trainings"), ("images_", "on_new")):
        estimates: list[Estimate] = [getattr(each, name) for each in found]
        p_values = np.array([each.p(margin) for each in estimates])
        corrected, alpha = holm(p_values), ALPHA / max(1, np.isfinite(p_values).sum())
        for row, each, p, p_holm in zip(rows, estimates, p_values, corrected, strict=True):
            bounds = each.ends(alpha)
            row[f"{prefix}verdict"] = judge(row, p_holm, bounds)
            if prefix:
                row |= {"p_images": p, "p_images_holm": p_holm}
            else:
                row |= {"p": p, "p_holm": p_holm}
                row["bound_low"], row["bound_high"] = np.clip(bounds, -1.0, 1.0)
    level = ALPHA / max(1, sum(row["p_holm"] > ALPHA for row in rows))
    for row in rows:
        spread = upper_spread(row["sd"], row["n"])
        row["repeats_needed"] = repeats_needed(spread, level, margin)
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def repeats_needed(sd: float, level: float, margin: float = 0.0) -> float:
    """Return how many repeats find `MIN_EFFECT` with `POWER`; sd is that of differences.

    NaN if sd is 0 or NaN. p is that of a difference beyond ± margin.
    """
    if not sd > 0:
        return math.nan
    power = TTestPower().power  # one-sided, because the test must find which is better

    def at(n: int) -> float:
        return float(power((MIN_EFFECT - margin) / sd, n, level / 2, alternative="larger"))

    return 2 + bisect_left(range(2, MAX_REPEATS), POWER, key=at)


def upper_spread(sd: float, n: int) -> float:
    """Return the upper `SPREAD_LIMIT` confidence limit of a standard deviation from n values."""
    if n < 2:
        return math.nan
    return float(sd * math.sqrt((n - 1) / stats.chi2.ppf(1 - SPREAD_LIMIT, n - 1)))


def may_fail(n: int) -> float:
    """Return the share of repeats that may fail, if none of n did: the upper 95 % limit."""
    return float(1 - ALPHA ** (1 / n))


class _Pair:
    """The differences of a pair of losses, seed by seed."""

    def __init__(
        self, *, first: str, loss: str, differences: pd.Series[float], images: NewImages | None
    ) -> None:
        self.first, self.loss = first, loss
        self.values = exact(differences)
        self.trainings = over_trainings(self.values)
        seeds = list(differences.dropna().index)
        if images is None:
            self.on_new = Estimate(mean=self.trainings.mean)
        else:
            self.on_new = images.of_pair(first, loss, seeds, self.values)

    def row(self) -> dict[str, Any]:
        """Return the columns that do not depend on other pairs."""
        values, n = self.values, len(self.values)
        ahead, ties = int((values > 0).sum()), int((values == 0).sum())
        row: dict[str, Any] = {
            "first": self.first,
            "loss": self.loss,
            "n": n,
            "difference": self.trainings.mean,
            "sd": math.nan if n < 2 else float(values.std(ddof=1)) if np.ptp(values) else 0.0,
            "ahead": ahead,
            "ties": ties,
        }
        if n:
            row["probability"] = (ahead + ties / 2) / n
            row["probability_low"], _ = proportion_confint(ahead, n, ALPHA, method="beta")
            _, row["probability_high"] = proportion_confint(ahead + ties, n, ALPHA, method="beta")
        for prefix, each in (("", self.trainings), ("images_", self.on_new)):
            row[f"{prefix}low"], row[f"{prefix}high"] = np.clip(each.ends(), -1.0, 1.0)
        return row


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Says which of two losses is better."""

    min_effect: float
    doubts: Doubts

    def __call__(self, row: dict[str, Any], p: float, bounds: tuple[float, float]) -> str:
        """Return the verdict on `loss`, from a corrected p and simultaneous bounds."""
        if row["n"] < 2:
            return "not compared"
        if row["sd"] == 0:
            return "constant"
        if math.isnan(p):
            return "unknown"
        pair = {row["first"], row["loss"]}
        if pair & set(self.doubts.outlying) and row["ahead"] not in (0, row["n"] - row["ties"]):
            return "undecided"
        is_first = row["difference"] > 0
        if p <= ALPHA:
            leader = row["first"] if is_first else row["loss"]
            if leader in self.doubts.incomplete:
                return "behind" if is_first else "ahead"
            size = "" if round(abs(row["difference"]), 9) >= self.min_effect else "slightly "
            return f"{size}{'worse' if is_first else 'better'}"
        is_inside = -self.min_effect <= bounds[0] and bounds[1] <= self.min_effect
        if is_inside and not pair & set(self.doubts.incomplete):
            return "equal"
        return "undecided"
