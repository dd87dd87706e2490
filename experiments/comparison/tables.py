"""The tables of a comparison: the result of each loss, and the difference of each pair.

`python -m benchmarks.planted` measures what led to these choices:

- The winner is the loss with the highest mean validation accuracy over its repeats. Its lead on the
  test split is still biased, because a lucky training is good on both splits. So p-values are
  corrected over all pairs of losses. Then equal losses differ significantly in at most 5 % of
  studies; with six equal losses and a correction over the winner's pairs alone, it was up to 10 %.
- Intervals and p-values are Student's t, of means and of paired differences. At n = 5 a percentile
  or BCa bootstrap covers 84 % instead of 95 %. The studentized bootstrap covers as t does, and is a
  third wider. For strongly skewed values (−1) t covers at least 93.5 %, for their differences 95 %.
- At n = 5, tests of signs or ranks can't reach p = 0.05: two of 2⁵ permutations are extreme.
- An interval is for one loss, or one difference, alone. The winner's is too high among equal
  losses: with six, it covered in 89 to 95 % of studies.
- The statements are about new repeats: new trainings and, unless the test split is given, new
  splits of the same images. They are not about other images (Nadeau and Bengio 2003, "Inference for
  the Generalization Error").
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from experiments.comparison.results import Results, with_searched
from experiments.study.parameters import BY_NAME
from experiments.study.ranking import best_first

Floats = npt.NDArray[np.float64]

ALPHA = 0.05
"""The share of intervals that miss the true value, and of studies in which a test errs."""
MIN_EFFECT = 0.005
"""The difference of accuracies that `repeats_needed` is about: half a point."""
POWER = 0.8
"""The probability to find it."""
MAX_REPEATS = 10_000
"""The upper bound of `repeats_needed`."""
MEASURES = {
    "accuracy": (0.0, 1.0),
    "nll": (0.0, math.inf),
    "brier": (0.0, 2.0),
    "ece": (0.0, 1.0),
}
"""The metrics of the test split, with their lowest and highest values."""

OUTCOMES = ("complete", "diverged", "failed")
TABLE_COLUMNS = [
    *("loss", "learning_rate", "batch_size", "repeats", "diverged", "failed", "n", "val_accuracy"),
    *(f"{measure}_{name}" for measure in MEASURES for name in ("mean", "sd", "low", "high")),
]
PAIR_COLUMNS = [
    *("first", "loss", "n", "difference", "sd", "low", "high", "p", "p_holm", "verdict"),
    *("ahead", "ties", "probability", "probability_low", "probability_high"),
    *("repeats_needed", "repeats_needed_low", "repeats_needed_high"),
]


def pairwise_tests(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Return `Assessment.pairs` of accuracies: a row a seed, a column a loss, the best first."""
    pairs = pd.DataFrame(
        [
            {"first": first, "loss": loss, **_difference(accuracy[first] - accuracy[loss])}
            for first, loss in combinations(accuracy.columns, 2)
        ],
        columns=PAIR_COLUMNS,
    )
    tested = pairs["p"].notna()
    if tested.any():
        pairs.loc[tested, "p_holm"] = multipletests(pairs.loc[tested, "p"], method="holm")[1]
    pairs["verdict"] = [
        _verdict(difference, p)
        for difference, p in zip(pairs["difference"], pairs["p_holm"], strict=True)
    ]
    level = ALPHA / max(1, (pairs["verdict"] == "undecided").sum())
    for name, quantile in (("", None), ("_low", 1 - ALPHA / 2), ("_high", ALPHA / 2)):
        pairs[f"repeats_needed{name}"] = [
            repeats_needed(_spread(sd, n, quantile), level)
            for sd, n in zip(pairs["sd"], pairs["n"], strict=True)
        ]
    return pairs


def interval(values: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return the 95 % interval of the mean of values (…, n), n ≥ 2 and not all of them equal."""
    values = np.asarray(values, np.float64)
    low, high = stats.t.interval(
        1 - ALPHA, values.shape[-1] - 1, loc=values.mean(-1), scale=stats.sem(values, axis=-1)
    )
    return low, high


def repeats_needed(sd: float, level: float) -> float:
    """Return how many repeats find `MIN_EFFECT` with `POWER`; sd is that of differences.

    NaN if sd is 0 or NaN.
    """
    if not sd > 0:
        return math.nan
    power = TTestPower().power  # one-sided, because the test must find which is better

    def at(n: int) -> float:
        return float(power(MIN_EFFECT / sd, n, level / 2, alternative="larger"))

    return 2 + bisect_left(range(2, MAX_REPEATS), POWER, key=at)


def summarise(results: Results, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return `Assessment.table`; repeats are sorted by seed."""
    table = pd.DataFrame(
        [
            _loss(loss, results.trials[results.trials["loss"] == loss], of_loss)
            for loss in results.plan["losses"]
            for of_loss in [repeats[repeats["loss"] == loss]]
        ],
        columns=with_searched(TABLE_COLUMNS, results.plan),
    ).astype({"batch_size": "Int64"})
    return table.sort_values("val_accuracy", ascending=False, kind="stable", ignore_index=True)


def _loss(loss: str, trials: pd.DataFrame, repeats: pd.DataFrame) -> dict[str, Any]:
    """Return a row of the table; repeats are in the order of their seeds."""
    by_outcome = {name: repeats[repeats["outcome"] == name] for name in OUTCOMES}
    complete = by_outcome["complete"]
    row: dict[str, Any] = {
        "loss": loss,
        **_best_configuration(trials, repeats),
        "repeats": len(repeats),
        "diverged": len(by_outcome["diverged"]),
        "failed": len(by_outcome["failed"]),
        "n": int(complete["test_accuracy"].notna().sum()),
    }
    if len(complete):
        diverged = by_outcome["diverged"]["val_accuracy"].fillna(0.0)
        row["val_accuracy"] = _exact(pd.concat([complete["val_accuracy"], diverged])).mean()
    for measure, bounds in MEASURES.items():
        summary = _summary(_exact(complete[f"test_{measure}"]), bounds)
        row |= {f"{measure}_{name}": value for name, value in summary.items()}
    return row


def _best_configuration(trials: pd.DataFrame, repeats: pd.DataFrame) -> dict[str, Any]:
    """Return the configuration of the repeats, else of the best trial, else nothing."""
    best = best_first(trials[trials["outcome"] == "complete"])
    for row in (repeats if len(repeats) else best).head(1).to_dict("records"):
        return {name: row[name] for name in BY_NAME if name in row and name != "loss"}
    return {}


def _summary(values: Floats, bounds: tuple[float, float] = (-1.0, 1.0)) -> dict[str, float]:
    """Return mean, sd, low and high; NaN if n is too small."""
    if not len(values):
        return dict.fromkeys(("mean", "sd", "low", "high"), math.nan)
    summary = {"mean": float(values.mean()), "sd": math.nan, "low": math.nan, "high": math.nan}
    if np.ptp(values):
        summary["sd"] = float(values.std(ddof=1))
        summary["low"], summary["high"] = map(float, np.clip(interval(values), *bounds))
    elif len(values) > 1:
        summary["sd"] = 0.0
    return summary


def _difference(differences: pd.Series[float]) -> dict[str, Any]:
    """Return a pair's row; columns that n is too small for are missing."""
    values = _exact(differences)
    n = len(values)
    summary = _summary(values)
    row: dict[str, Any] = {"n": n, "difference": summary.pop("mean"), **summary}
    ahead, ties = int((values > 0).sum()), int((values == 0).sum())
    row |= {"ahead": ahead, "ties": ties}
    if n:
        row["probability"] = (ahead + ties / 2) / n
        row["probability_low"], _ = proportion_confint(ahead, n, ALPHA, method="beta")
        _, row["probability_high"] = proportion_confint(ahead + ties, n, ALPHA, method="beta")
    if n > 1:
        row["p"] = float(stats.ttest_1samp(values, 0).pvalue) if np.ptp(values) else 1.0
    return row


def _exact(values: pd.Series[float]) -> Floats:
    """Drop NaN, and round to far less than an image, so that equal accuracies compare equal."""
    return np.round(values.dropna().to_numpy(np.float64), 9)


def _spread(sd: float, n: int, quantile: float | None) -> float:
    """Return an end of the interval of a standard deviation, or sd itself without a quantile."""
    if quantile is None or n < 2:
        return sd
    return float(sd * math.sqrt((n - 1) / stats.chi2.ppf(quantile, n - 1)))


def _verdict(difference: float, p_holm: float) -> str:
    if math.isnan(p_holm):
        return "not compared"
    if p_holm > ALPHA:
        return "undecided"
    return "worse" if difference > 0 else "better"
