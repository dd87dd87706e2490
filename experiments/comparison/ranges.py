"""Where the range of a loss is still open: its best value has no worse one beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.comparison.intervals import Floats
from experiments.comparison.results import Results

EDGE = 0.05
"""The share of the log range of learning rates that counts as its edge, at each end."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """An open end of a loss' range."""

    loss: str
    parameter: str
    """learning_rate or batch_size."""
    end: str
    """lower or upper."""
    best: float
    """The best value; with several searches, that of the first one that is open here."""
    count: int = 1
    """In how many searches it is open …"""
    searches: int = 1
    """… of how many."""
    is_limit: bool = False
    """Whether it is open because the plan's range ends there."""

    @property
    def name(self) -> str:
        """The parameter's name in a sentence."""
        return {"learning_rate": "learning rates", "batch_size": "batch sizes"}[self.parameter]


def is_staged(plan: Mapping[str, Any]) -> bool:
    """Return whether each loss has several searches; an older plan has one, at random."""
    return bool(plan.get("search", "random") == "staged")


def open_ranges(results: Results, table: pd.DataFrame) -> list[Open]:
    """Return the open ends, in the order of the table.

    With several searches, those are counted that are open in at least half of them.
    """
    if is_staged(results.plan):
        tried = _tried(results.trials)
        return [found for loss in table["loss"] for found in _of_searches(results, loss, tried)]
    rows = table[table["learning_rate"].notna()].to_dict("records")
    return [
        found
        for row in rows
        for found in (
            *_of_rate(results, row["loss"], row["learning_rate"]),
            *_of_size(results, row["loss"], row["batch_size"]),
        )
    ]


def _tried(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the extremes of what each search tried; a failed trial says nothing of its values."""
    trials = trials[trials["outcome"] != "failed"]
    searches = trials.groupby(["loss", "search"])
    return searches[["learning_rate", "batch_size"]].agg(["min", "max"])


def _of_searches(results: Results, loss: str, tried: pd.DataFrame) -> Iterator[Open]:
    repeats = results.repeats[results.repeats["loss"] == loss].sort_values("search")
    chosen = repeats[[(loss, search) in tried.index for search in repeats["search"]]]
    if chosen.empty:
        return
    ranges = tried.loc[[(loss, search) for search in chosen["search"]]]
    for parameter in ("learning_rate", "batch_size"):
        best = chosen[parameter].to_numpy(float)
        low, high = ranges[parameter].to_numpy(float).T
        for end in ("lower", "upper"):
            is_open = _is_open(best, low, high, end) & [
                _can_go_on(results, parameter, end, value) for value in best
            ]
            if is_open.any() and 2 * is_open.sum() >= len(repeats):
                yield Open(
                    loss=loss,
                    parameter=parameter,
                    end=end,
                    best=float(best[is_open][0]),
                    count=int(is_open.sum()),
                    searches=len(repeats),
                )


def _is_open(best: Floats, low: Floats, high: Floats, end: str) -> npt.NDArray[np.bool_]:
    """Return whether nothing was tried beyond the best value; what diverged there was tried."""
    is_extreme = best <= low * (1 + 1e-9) if end == "lower" else best >= high * (1 - 1e-9)
    return is_extreme & (low < high)  # else it was not searched


def _can_go_on(results: Results, parameter: str, end: str, value: float) -> bool:
    """Return whether there are values beyond this one."""
    if parameter == "learning_rate":
        return True
    return value // 2 >= 1 if end == "lower" else 2 * value <= results.sizes["train"]


def _of_rate(results: Results, loss: str, rate: float) -> Iterator[Open]:
    """Yield the ends of the plan's range that the best learning rate is near, or the extreme."""
    low, high = results.plan["learning_rate_min"], results.plan["learning_rate_max"]
    place = math.log(rate / low) / math.log(high / low)
    tried = results.trials.loc[results.trials["loss"] == loss, "learning_rate"]
    best, lowest, highest = (np.array([value]) for value in (rate, tried.min(), tried.max()))
    for end, is_limit in (("lower", place <= EDGE), ("upper", place >= 1 - EDGE)):
        if is_limit or _is_open(best, lowest, highest, end).any():
            yield Open(loss=loss, parameter="learning_rate", end=end, best=rate, is_limit=is_limit)


def _of_size(results: Results, loss: str, size: int) -> Iterator[Open]:
    sizes = sorted(results.plan["batch_sizes"])
    if len(sizes) < 2:
        return
    for end, limit in (("lower", sizes[0]), ("upper", sizes[-1])):
        if size == limit and _can_go_on(results, "batch_size", end, size):
            yield Open(loss=loss, parameter="batch_size", end=end, best=size, is_limit=True)
