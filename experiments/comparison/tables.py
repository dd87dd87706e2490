"""The table of a comparison: the result of each loss.

Simulations led to these choices:

- Intervals are Student's t. At n = 5 a percentile or BCa bootstrap covers 84 % instead of 95 %. The
  studentized bootstrap covers as t does, and is a third wider. For strongly skewed values (−1) t
  covers at least 93.5 %.
- An interval is for one loss alone. The winner's is too high among equal losses: see
  `winner_covers`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.comparison.intervals import Floats, NewImages, exact, over_trainings
from experiments.comparison.results import Results, validation_mean, with_searched
from experiments.study.parameters import BY_NAME
from experiments.study.ranking import best_first

MEASURES = {
    "accuracy": (0.0, 1.0),
    "nll": (0.0, math.inf),
    "brier": (0.0, 2.0),
    "ece": (0.0, 1.0),
}
"""The metrics of the test split, with their lowest and highest values."""

OUTLYING_SPREADS = 5
"""An outlying repeat is further than this many spreads from the median of its loss' repeats …"""
OUTLYING_DISTANCE = 0.02
"""… and further than this."""
_MAD_TO_SD = 1.4826
"""The standard deviation of a normal distribution by its median absolute deviation."""

_LOSSES = (4, 6, 10, 14)
_WINNER_COVERS = (0.92, 0.90, 0.85, 0.82)
"""How often the winner's interval covers, if so many losses are equally good (n = 10 repeats).

The luck of a training is good on both splits, and has 4/3 times the spread of the luck of a split.
With 2 and 3 losses it covers in 95 and 94 %.
"""

OUTCOMES = ("complete", "diverged", "failed")
TABLE_COLUMNS = [
    *("loss", "learning_rate", "learning_rate_low", "learning_rate_high", "batch_size"),
    *("repeats", "diverged", "failed", "n", "outliers", "val_accuracy"),
    *("accuracy_mean", "accuracy_median", "accuracy_sd", "accuracy_low", "accuracy_high"),
    *("images_low", "images_high"),
    *(f"{measure}_{name}" for measure in MEASURES for name in ("mean", "sd", "low", "high")
      if measure != "accuracy"),
]  # fmt: skip


def summarise(results: Results, repeats: pd.DataFrame, images: NewImages) -> pd.DataFrame:
    """Return `Assessment.table`; repeats are sorted by seed."""
    table = pd.DataFrame(
        [_loss(results, loss, repeats[repeats["loss"] == loss], images) for loss in results.losses],
        columns=with_searched(TABLE_COLUMNS, results.plan),
    ).astype({"batch_size": "Int64"})
    return table.sort_values("val_accuracy", ascending=False, kind="stable", ignore_index=True)


def outlying(repeats: pd.DataFrame) -> pd.DataFrame:
    """Return those repeats of one loss whose test accuracy is far from their median."""
    accuracy = repeats.loc[repeats["outcome"] == "complete", "test_accuracy"].dropna().round(9)
    distance = (accuracy - accuracy.median()).abs()
    limit = max(OUTLYING_DISTANCE, OUTLYING_SPREADS * _MAD_TO_SD * distance.median())
    return repeats.loc[distance.index[distance > limit]]


def winner_covers(losses: int) -> float | None:
    """Return how often the winner's interval covers if all losses are equally good.

    None if this is about as often as it should.
    """
    if losses < _LOSSES[0]:
        return None
    return float(np.interp(losses, _LOSSES, _WINNER_COVERS))


def summary(values: Floats, bounds: tuple[float, float]) -> dict[str, float]:
    """Return mean, sd, low and high; NaN if n is too small."""
    estimate = over_trainings(values)
    low, high = np.clip(estimate.ends(), *bounds)
    sd = math.nan if len(values) < 2 else float(values.std(ddof=1)) if np.ptp(values) else 0.0
    return {"mean": estimate.mean, "sd": sd, "low": float(low), "high": float(high)}


def _loss(results: Results, loss: str, repeats: pd.DataFrame, images: NewImages) -> dict[str, Any]:
    """Return a row of the table; repeats are in the order of their seeds."""
    trials = results.trials[results.trials["loss"] == loss]
    by_outcome = {name: repeats[repeats["outcome"] == name] for name in OUTCOMES}
    lost = _lost_searches(trials, repeats, results.plan["trials"]) if results.is_staged else 0
    complete = by_outcome["complete"]
    accuracy = exact(complete["test_accuracy"])
    row: dict[str, Any] = {
        "loss": loss,
        **_configuration(trials, repeats),
        "repeats": len(repeats) + lost,
        "diverged": len(by_outcome["diverged"]),
        "failed": len(by_outcome["failed"]) + lost,
        "n": len(accuracy),
        "outliers": len(outlying(repeats)),
    }
    if len(complete):
        row["val_accuracy"] = validation_mean(
            complete["val_accuracy"].tolist(), by_outcome["diverged"]["val_accuracy"].tolist()
        )
    if len(accuracy):
        row["accuracy_median"] = float(np.median(accuracy))
        row["images_low"], row["images_high"] = np.clip(
            images.of_loss(loss, accuracy).ends(), *MEASURES["accuracy"]
        )
    for measure, bounds in MEASURES.items():
        of_measure = summary(exact(complete[f"test_{measure}"]), bounds)
        row |= {f"{measure}_{name}": value for name, value in of_measure.items()}
    return row


def _lost_searches(trials: pd.DataFrame, repeats: pd.DataFrame, planned: int) -> int:
    """Return how many searches chose nothing, because none of the planned trials was complete."""
    complete = (trials["outcome"] == "complete").groupby(trials["search"]).agg(["size", "any"])
    is_lost = (complete["size"] >= planned) & ~complete["any"].astype(bool)
    return int((is_lost & ~complete.index.isin(repeats["search"])).sum())


def _configuration(trials: pd.DataFrame, repeats: pd.DataFrame) -> dict[str, Any]:
    """Return the middle of the repeats' configurations, else that of the best trial, or nothing."""
    rows = repeats
    if repeats.empty:
        rows = best_first(trials[trials["outcome"] == "complete"]).head(1)
    if rows.empty:
        return {}
    names = [name for name in BY_NAME if name in rows and name != "loss"]
    middle = {name: _middle(list(rows[name].dropna())) for name in names}
    rates = rows["learning_rate"]
    return {
        **middle,
        "learning_rate": float(rates.median()),
        "learning_rate_low": float(rates.min()),
        "learning_rate_high": float(rates.max()),
    }


def _middle(values: Sequence[Any]) -> Any:
    """Return the lower median of numbers, or the most frequent text; None of nothing."""
    if not values:
        return None
    if any(isinstance(value, str) for value in values):
        return statistics.mode(values)
    return statistics.median_low(values)
