"""Planted studies: comparisons of losses whose searches are drawn from pools.

A model has an accuracy on all images there are. Each image has a difficulty, common to all models,
and another one for each loss. A model gets an image right if its skill, the image's ease and chance
add up to more than 0. So the images of a test split are luck as well, and they are drawn anew in
each study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from benchmarks.planted_worlds import BEST, CHANCE, COLLAPSES, REST, lucky
from experiments.comparison.results import (
    CURVE_COLUMNS,
    IRRELEVANT,
    REPEAT_COLUMNS,
    TRIAL_COLUMNS,
    Results,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

EASE = 0.85
"""The standard deviation of an image's ease, which all losses share …"""
OWN_EASE = 0.25
"""… and of what each loss adds to it. Chance has the rest of a variance of 1. So at 70 %, two
models of a loss are both right or both wrong on 81 % of the images."""
SPLIT = 0.003
"""The standard deviation that the validation split adds to all accuracies of a seed."""
LEVELS = np.linspace(-4, 4, 1025)
"""Values of ease."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """How hard images are."""

    own: float
    """`OWN_EASE`, or 0: then the test images favour no loss, and equal losses are equal on them."""
    count: int
    """Of a test split."""
    skills: Floats = field(init=False)
    """By accuracy, in steps of 1 / 4,000."""

    def __post_init__(self) -> None:
        deviation = math.hypot(EASE, self.own)
        weights = np.exp(-((LEVELS / deviation) ** 2) / 2)
        grid = np.linspace(-4, 4, 4001)
        accuracies = self.chances(grid) @ (weights / weights.sum())
        steps = np.linspace(0, 1, 4001)
        object.__setattr__(self, "skills", np.interp(steps, accuracies, grid))

    def chances(self, skill: npt.ArrayLike) -> Floats:
        """Return the probabilities of models to get an image right: (models, `LEVELS`)."""
        chance = math.sqrt(1 - EASE**2 - self.own**2)
        return np.asarray(special.ndtr((np.asarray(skill)[:, None] + LEVELS) / chance))

    def of_accuracy(self, accuracy: Floats) -> Floats:
        """Return the chances of models with these accuracies on all images there are."""
        return self.chances(np.interp(accuracy, np.linspace(0, 1, 4001), self.skills))

    def draw(self, losses: int, rng: np.random.Generator) -> npt.NDArray[np.int16]:
        """Return the levels of the images of a new test split, for each loss."""
        ease = EASE * rng.standard_normal(self.count, np.float32)
        own = self.own * rng.standard_normal((losses, self.count), np.float32)
        places = np.rint((ease + own - LEVELS[0]) / (LEVELS[1] - LEVELS[0]))
        levels: npt.NDArray[np.int16] = places.clip(0, len(LEVELS) - 1).astype(np.int16)
        return levels


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """A loss, tuned: what its searches chose, and the truth about it."""

    chosen: Floats
    """The expected accuracies of all choices in the pool."""
    noise: str
    images: Images
    best: float = BEST
    """Its best accuracy."""
    mean: float = field(init=False)
    """The expected accuracy of a model of a new search."""
    chances: Floats = field(init=False)
    """The same, by an image's ease."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        known = self.chosen[~np.isnan(self.chosen)]
        models = lucky(np.repeat(known, max(1, 20_000 // len(known))), self.noise, rng)
        counts, edges = np.histogram(models, np.linspace(0, 1, 2001))
        is_there = counts > 0
        middles, weights = ((edges[1:] + edges[:-1]) / 2)[is_there], counts[is_there]
        chances = np.average(self.images.of_accuracy(middles), axis=0, weights=weights)
        expected = known.mean()
        if self.noise == "collapses":
            expected = (1 - COLLAPSES) * expected + COLLAPSES * CHANCE
        object.__setattr__(self, "mean", float(expected))
        object.__setattr__(self, "chances", chances)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison as it was drawn: a row a search, a column a loss."""

    losses: Sequence[Tuned]
    validation: Floats
    hits: npt.NDArray[np.int8]
    """(losses, searches, images)."""
    on_these: Floats
    """The true accuracy of each loss on these images."""
    is_staged: bool

    @property
    def names(self) -> list[str]:
        """Names of the losses."""
        return [f"loss {number}" for number in range(len(self.losses))]

    @property
    def test(self) -> Floats:
        """Test accuracies."""
        shares: Floats = np.round(self.hits.sum(axis=2, dtype=np.int64).T / self.hits.shape[2], 9)
        return shares


def draw(
    losses: Sequence[Tuned], searches: int, rng: np.random.Generator, *, is_staged: bool = True
) -> Study:
    """Draw a comparison; if it isn't staged, one search chooses what all repeats train."""
    images = losses[0].images
    numbers = rng.integers(len(losses[0].chosen), size=searches if is_staged else 1)
    numbers = np.resize(numbers, searches)
    chosen = np.stack([loss.chosen[numbers] for loss in losses], axis=1)
    models = lucky(chosen, losses[0].noise, rng)
    validation = (
        models + SPLIT * rng.normal(size=(searches, 1)) + REST * rng.normal(size=models.shape)
    )
    levels = images.draw(len(losses), rng)
    hits = np.empty((len(losses), searches, images.count), np.int8)
    for column, level in enumerate(levels):
        limits = images.of_accuracy(models[:, column]) * 65_536
        limits = limits.clip(0, 65_535).astype(np.uint16)
        for row, limit in enumerate(limits):
            random = np.frombuffer(rng.bytes(2 * images.count), np.uint16)
            hits[column, row] = random < limit[level]
    on_these = np.array(
        [loss.chances[level].mean() for loss, level in zip(losses, levels, strict=True)]
    )
    return Study(
        losses=losses, validation=validation, hits=hits, on_these=on_these, is_staged=is_staged
    )


def results_of(study: Study) -> Results:
    """Return a study as the results of a comparison."""
    return results(
        study.validation, study.test, study.names, hits=study.hits, is_staged=study.is_staged
    )


def results(
    validation: Floats,
    test: Floats,
    losses: Sequence[str],
    *,
    hits: npt.NDArray[np.int8] | None = None,
    is_staged: bool = True,
) -> Results:
    """Return the results of a comparison with these accuracies, (searches, losses).

    A repeat without a test accuracy diverged.
    """
    searches = len(test)
    return Results(
        name="planted",
        plan={
            "search": "staged" if is_staged else "random",
            "searches": searches,
            "dataset": "planted",
            "losses": list(losses),
            "learning_rate_min": 0.001,
            "learning_rate_max": 1.0,
            "batch_sizes": [64],
            "trials": 3,
            "epochs": 8,
            "repeats": searches,
            "seed": 0,
            "min_effect": IRRELEVANT,
            "given_test": True,
        },
        classes=tuple("0123456789"),
        sizes={
            "train": 45_000,
            "validation": 5_000,
            "test": 10_000 if hits is None else hits.shape[2],
        },
        trials=_trials(losses, searches if is_staged else 1),
        repeats=_repeats(validation, test, losses, is_staged=is_staged),
        confirmed=pd.DataFrame(columns=list(REPEAT_COLUMNS)),
        hits={} if hits is None else dict(zip(losses, hits.astype(np.bool_), strict=True)),
        ranges={},
        test_rounds=1,
        curves=pd.DataFrame(columns=list(CURVE_COLUMNS)),
        confusions={},
        studies={},
        provenance={},
    )


_CONFIGURATION = {"outcome": "complete", "learning_rate": 0.03, "batch_size": 64}


def _repeats(
    validation: Floats, test: Floats, losses: Sequence[str], *, is_staged: bool
) -> pd.DataFrame:
    rows = [
        {
            **dict.fromkeys(REPEAT_COLUMNS, 0.5),
            **_CONFIGURATION,
            "loss": loss,
            "search": row + 1 if is_staged else 1,
            "trial": row * len(losses) + column,
            "seed": 1000 * (row + 1) + 999 if is_staged else row + 1,
            "outcome": "diverged" if math.isnan(test[row, column]) else "complete",
            "val_accuracy": validation[row, column],
            "test_accuracy": test[row, column],
            "test_evaluations": 1,
        }
        for row in range(len(test))
        for column, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows, columns=list(REPEAT_COLUMNS))


def _trials(losses: Sequence[str], searches: int) -> pd.DataFrame:
    rows = [
        {
            **dict.fromkeys(TRIAL_COLUMNS, 0.5),
            **_CONFIGURATION,
            "loss": loss,
            "search": search + 1,
            "stage": "explore",
            "trial": trial,
            "seed": 1000 * (search + 1),
            "learning_rate": rate,
        }
        for loss in losses
        for search in range(searches)
        for trial, rate in enumerate((0.003, 0.03, 0.3))
    ]
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))
