"""Where the range of a loss is still open: its best value has no worse one beyond it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.comparison.intervals import Floats
from experiments.comparison.results import Results
from experiments.comparison.search_rule import BEYOND, COMPARABLE, RATE_PER_SIZE

EDGE = 0.05
"""The share of the log range of learning rates that counts as its edge, at each end."""
_SAME = 1e-9
"""Learning rates that differ by fewer decades are the same."""


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
    """Whether it is open because no search of this plan goes further."""

    @property
    def name(self) -> str:
        """The parameter's name in a sentence."""
        return {"learning_rate": "learning rates", "batch_size": "batch sizes"}[self.parameter]


def open_ranges(results: Results, table: pd.DataFrame) -> list[Open]:
    """Return the open ends, in the order of the table.

    With several searches, those are counted that are open in at least half of them.
    """
    if results.is_staged:
        return [found for loss in table["loss"] for found in _of_searches(results, loss)]
    rows = table[table["learning_rate"].notna()].to_dict("records")
    return [
        found
        for row in rows
        for found in (
            *_of_rate(results, row["loss"], row["learning_rate"]),
            *_of_size(results, row["loss"], row["batch_size"]),
        )
    ]


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What a search tried; a failed trial says nothing of its values."""

    rates: Floats
    """In decades, as if at a batch size of 1: learning rates are compared so by `search_rule`."""
    sizes: Floats
    is_complete: npt.NDArray[np.bool_]

    def is_open(self, parameter: str, end: str, rate: float, size: float) -> bool:
        """Return whether no trial lies beyond the chosen value; one that diverged there counts."""
        sign = -1 if end == "lower" else 1
        if parameter == "batch_size":
            return len(set(self.sizes)) > 1 and not (sign * self.sizes > sign * size).any()
        factor = np.maximum(self.sizes, size) / np.minimum(self.sizes, size)
        # A rate that diverges is too high at any batch size.
        is_comparable = (factor <= COMPARABLE) | ~self.is_complete
        is_beyond = sign * (self.rates - rate) > _SAME
        return len(set(self.rates)) > 1 and not (is_beyond & is_comparable).any()


def open_ends(results: Results, repeat: Mapping[Hashable, Any]) -> list[tuple[str, str]]:
    """Return the parameters and ends that are open in the search of a repeat, its row."""
    power = RATE_PER_SIZE.get(results.plan.get("optimizer", "sgd"), 0.0)
    trials = results.trials
    is_own = (trials["loss"] == repeat["loss"]) & (trials["search"] == repeat["search"])
    own = trials[is_own & (trials["outcome"] != "failed")]
    sizes = own["batch_size"].to_numpy(float)
    search = _Search(
        rates=np.log10(own["learning_rate"].to_numpy(float)) - power * np.log10(sizes),
        sizes=sizes,
        is_complete=(own["outcome"] == "complete").to_numpy(),
    )
    size = repeat["batch_size"]
    rate = math.log10(repeat["learning_rate"]) - power * math.log10(size)
    return [
        (parameter, end)
        for parameter, end in product(("learning_rate", "batch_size"), ("lower", "upper"))
        if search.is_open(parameter, end, rate, size)
        and _can_go_on(results, parameter, end, float(repeat[parameter]))
    ]


def _of_searches(results: Results, loss: str) -> Iterator[Open]:
    repeats = results.repeats[results.repeats["loss"] == loss].sort_values("search")
    found: dict[tuple[str, str], list[float]] = {}
    for chosen in repeats.to_dict("records"):
        for parameter, end in open_ends(results, chosen):
            found.setdefault((parameter, end), []).append(float(chosen[parameter]))
    for (parameter, end), bests in found.items():
        if 2 * len(bests) >= len(repeats):
            yield Open(
                loss=loss,
                parameter=parameter,
                end=end,
                best=bests[0],
                count=len(bests),
                searches=len(repeats),
                is_limit=parameter == "batch_size" and _is_limit(results, end, bests[0]),
            )


def _is_limit(results: Results, end: str, size: float) -> bool:
    """Return whether the rule of a search goes no further than this batch size."""
    sizes = results.plan["batch_sizes"]
    if end == "lower":
        return bool(size // 2 < min(sizes) / BEYOND)
    return bool(2 * size > max(sizes) * BEYOND)


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
    for end, is_limit, is_extreme in (
        ("lower", place <= EDGE, rate <= tried.min() < tried.max()),
        ("upper", place >= 1 - EDGE, rate >= tried.max() > tried.min()),
    ):
        if is_limit or is_extreme:
            yield Open(loss=loss, parameter="learning_rate", end=end, best=rate, is_limit=is_limit)


def _of_size(results: Results, loss: str, size: int) -> Iterator[Open]:
    sizes = sorted(results.plan["batch_sizes"])
    if len(sizes) < 2:
        return
    for end, limit in (("lower", sizes[0]), ("upper", sizes[-1])):
        if size == limit and _can_go_on(results, "batch_size", end, size):
            yield Open(loss=loss, parameter="batch_size", end=end, best=size, is_limit=True)
