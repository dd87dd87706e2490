"""Planted worlds: how accurate each loss is at each learning rate and batch size, and what searches
find there.

A loss' accuracy is quadratic in the logarithm of the learning rate, with a cliff above the best one
where training diverges, and quadratic in that of the batch size. The best rate is in proportion to
a power of the batch size. CIFAR-10 (5 epochs, batches of 64) has curvatures of 9 to 14 points per
decade², a cliff 0.3 to 0.7 decades above the optimum, and a standard deviation of 0.35 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from experiments.comparison.search_rule import (
    RATE,
    SIZE,
    Search,
    Training,
    candidates,
    steps,
    without_worst,
)
from experiments.study.domains import Choices, Domain, Range

Floats = npt.NDArray[np.float64]

DOMAINS: dict[str, Domain] = {
    RATE: Range(1e-3, 1.0, log=True),
    SIZE: Choices((16, 32, 64, 128)),
}
"""Where all searches begin."""
POSITIONS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5)
"""Decades of best learning rates. At the first one, more than half of the range diverges. The last
but one is at the top of the range, and the last one beyond it."""
BEST, CHANCE = 0.7, 0.1
LUCK = 0.002
"""Standard deviation of a trained model's accuracy: of what it gets right of all images there are.
"""
REST = 0.0029
"""That of a validation accuracy, given the model; in all it is 0.35 points."""
STRONG_LUCK = 0.005
"""That of skewed luck: so it is not lost among the rest."""
COLLAPSES = 0.05
"""The share of trainings that collapse, where some do."""
MOVES = 0.12
"""How far the cliff moves between seeds, where it does: a standard deviation, in decades."""

NOISES = ("normal", "skewed", "collapses", "moving cliff")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The accuracy of a loss after training."""

    place: float
    """The decade of the best learning rate, at a batch size of 64."""
    curvature: float = 0.09
    """Per decade²."""
    cliff: float = 0.45
    """How far above the best rate training diverges, in decades."""
    power: float = 0.8
    """The best rate is in proportion to this power of the batch size."""
    batch_curvature: float = 0.002
    """Per doubling²."""
    batch_size: int = 64
    """The best one."""
    noise: str = "normal"
    """One of `NOISES`."""

    def distance(self, rate: float, size: int) -> float:
        """Return how many decades a learning rate is above the best one."""
        return math.log10(rate) - self.place - self.power * math.log10(size / 64)

    def accuracy(self, rate: float, size: int, *, moved: float = 0.0) -> float:
        """Return the expected accuracy; NaN where training diverges."""
        distance = self.distance(rate, size)
        if distance > self.cliff + moved:
            return math.nan
        lost = self.curvature * distance**2
        lost += self.batch_curvature * math.log2(size / self.batch_size) ** 2
        return max(CHANCE, BEST - lost)

    def expected(self, rate: float, size: int) -> tuple[float, float]:
        """Return the accuracy of models that don't diverge, and the share that does."""
        accuracy = self.accuracy(rate, size)
        if self.noise != "moving cliff":
            return accuracy, float(math.isnan(accuracy))
        beyond = self.distance(rate, size) - self.cliff
        accuracy = self.accuracy(rate, size, moved=math.inf)
        return accuracy, float(special.ndtr(beyond / MOVES))

    def train(self, rate: float, size: int, rng: np.random.Generator) -> tuple[float, float]:
        """Return a model's accuracy on all images there are, and that on the validation split."""
        moved = MOVES * rng.normal() if self.noise == "moving cliff" else 0.0
        accuracy = self.accuracy(rate, size, moved=moved)
        accuracy = float(lucky(accuracy, self.noise, rng))
        return accuracy, accuracy + REST * rng.normal()


def lucky(accuracy: npt.ArrayLike, noise: str, rng: np.random.Generator) -> Floats:
    """Return the accuracies of models of which these are expected, but for those that collapse."""
    accuracy = np.asarray(accuracy, np.float64)
    if noise == "skewed":  # a long left tail: skewness −2
        return accuracy + STRONG_LUCK * (1 - rng.exponential(size=accuracy.shape))
    found = accuracy + LUCK * rng.normal(size=accuracy.shape)
    if noise != "collapses":
        return found
    return np.where(rng.random(accuracy.shape) < COLLAPSES, CHANCE, found)


def truths(count: int, noise: str = "normal") -> list[list[Truth]]:
    """Return worlds: for each of `POSITIONS`, the same `count` shapes."""
    rng = np.random.default_rng(0)
    cliffs = (0.2, 0.3, 0.5) if noise == "moving cliff" else (0.3, 0.45, 0.7)
    columns = [
        rng.permutation(np.resize(values, count))
        for values in ((0.09, 0.14), cliffs, (0.6, 0.8, 1.0), (0.002, 0.005), (32, 64, 128))
    ]
    shapes = [
        Truth(
            place=0.0,
            curvature=float(curvature),
            cliff=float(cliff),
            power=float(power),
            batch_curvature=float(batch_curvature),
            batch_size=int(size),
            noise=noise,
        )
        for curvature, cliff, power, batch_curvature, size in zip(*columns, strict=True)
    ]
    return [[replace(shape, place=place) for shape in shapes] for place in POSITIONS]


Chosen = tuple[float, int]
"""A learning rate and a batch size."""
Method = Callable[[Truth, int, np.random.Generator], Chosen]
"""A way to search: from a truth, the seed of what is drawn, and luck, to what it chooses."""


def staged(trainings: int) -> Method:
    """Return the rule of `experiments.compare`, with so many trainings."""

    def search(truth: Truth, seed: int, rng: np.random.Generator) -> Chosen:
        rule = Search(domains=DOMAINS, seed=seed)
        trained: list[Training] = []
        alive: list[int] = []
        fresh: dict[int, list[float]] = {}
        for step in _steps(trainings):
            if step.stage == "choose":
                alive = alive or candidates(trained, step.trainings)
                for at in alive:
                    fresh.setdefault(at, []).append(_train(truth, trained[at].configuration, rng))
                alive = without_worst({at: fresh[at] for at in alive})
                continue
            if step.stage == "explore":
                found = rule.explore(step.trainings)
            else:
                found = [rule.refine(step.number, trained)]
            trained += [Training(configuration=it, accuracy=_train(truth, it, rng)) for it in found]
        best = trained[(alive or candidates(trained, 1))[0]].configuration
        return best[RATE], best[SIZE]

    return search


_steps = cache(steps)


def _train(truth: Truth, configuration: Mapping[str, Any], rng: np.random.Generator) -> float:
    return truth.train(configuration[RATE], int(configuration[SIZE]), rng)[1]


def random(trainings: int) -> Method:
    """Return random search."""

    def search(truth: Truth, seed: int, rng: np.random.Generator) -> Chosen:
        draws = np.random.default_rng(seed)  # the same for all losses
        low, high = DOMAINS[RATE].values
        tried = [
            (float(low * (high / low) ** place), int(size))
            for place, size in zip(
                draws.random(trainings),
                draws.choice(DOMAINS[SIZE].values, trainings),
                strict=True,
            )
        ]
        found = [truth.train(*each, rng)[1] for each in tried]
        return tried[int(np.nanargmax([-1.0, *found])) - 1]

    return search


def tpe(trainings: int) -> Method:
    """Return Optuna's TPE, with the options of a sweep."""
    import optuna

    from experiments.study.samplers import make_sampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def search(truth: Truth, seed: int, rng: np.random.Generator) -> Chosen:
        study = optuna.create_study(direction="maximize", sampler=make_sampler("tpe", seed))
        for _ in range(trainings):
            trial = study.ask()
            found = {name: domain.suggest(trial, name) for name, domain in DOMAINS.items()}
            accuracy = _train(truth, found, rng)
            study.tell(trial, CHANCE if math.isnan(accuracy) else accuracy)
        return study.best_params[RATE], study.best_params[SIZE]

    return search


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What many searches chose; those with the same number drew the same, as in a comparison."""

    method: str
    """A name in `METHODS` and a number of trainings, such as staged-11."""
    noise: str = "normal"
    shapes: int = 12
    searches: int = 300
    seed: int = 0

    def at(self, place: int) -> tuple[Floats, Floats]:
        """Return expected accuracies, and shares that diverge: (shapes, searches)."""
        name, trainings = self.method.split("-")
        search = METHODS[name](int(trainings))
        worlds = truths(self.shapes, self.noise)[place]
        accuracies, diverge = np.empty((2, self.shapes, self.searches))
        for shape, truth in enumerate(worlds):
            rng = np.random.default_rng([self.seed, place, shape])
            for number in range(self.searches):
                chosen = search(truth, 1000 * (number + 1), rng)
                accuracies[shape, number], diverge[shape, number] = truth.expected(*chosen)
        return accuracies, diverge


METHODS = {"staged": staged, "random": random, "tpe": tpe}
