"""The rule of a search: which configurations of a loss are trained next, given the results so far.

A search has a fixed number of trainings, in steps that are the same for every loss:

- *explore*: points of a scrambled Sobol sequence over the ranges;
- *refine*: single trainings near the best one so far. The learning rate goes beyond the edge if the
  best one is the most extreme that was tried; else it halves the wider gap beside the best. From
  the third step on, every second one changes another parameter instead. Batch sizes are doubled or
  halved, beyond those that were asked for as well, and the learning rate moves with them;
- *choose*: the best few again, on fresh seeds. Each round drops the worst.

The rule is a function of results and seed, so it does not depend on timing: any number of workers,
and a comparison that was stopped, go the same way. `python -m benchmarks.planted` measures what led
to the numbers here. With 11 trainings, the chosen configuration is 0.3 points below the best one in
the mean, wherever the best learning rate lies within the range or up to half a decade beyond it. Of
12 random configurations the best is 0.7 to 0.9 points below, and 5 if the optimum lies beyond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.study.domains import Choices, Domain, Range
from experiments.study.parameter_types import Configuration

RATE, SIZE = "learning_rate", "batch_size"

RATE_PER_SIZE = {"sgd": 0.8, "adam": 0.5, "adamw": 0.5}
"""By optimizer: the power of the batch size that the learning rate is in proportion to.

Between the linear rule (Goyal et al. 2017) and that of the square root (Krizhevsky 2014; for Adam
Malladi et al. 2022)."""
STRIDE = 0.5
"""How far a learning rate goes beyond the edge, in decades."""
CLOSED = 0.2
"""A gap between learning rates that is not halved any more, in decades."""
SAME_RATE = 0.3
"""Two learning rates count as the same, for the effect of another parameter, in decades."""
DISTINCT = 0.15
"""Closer learning rates of other batch sizes don't show the effect of the rate, in decades."""
COMPARABLE = 2
"""The largest factor between batch sizes at which accuracies show the effect of the rate alone."""
BEYOND = 4
"""The largest factor by which batch sizes go beyond those that were asked for."""


@dataclass(frozen=True)
class Step:
    """A part of a search: its trainings don't wait for each other."""

    stage: str
    """explore, refine or choose."""
    number: int
    """Among the steps of its stage, from 1."""
    trainings: int

    @property
    def name(self) -> str:
        """Its name, such as `refine-2`."""
        return self.stage if self.stage == "explore" else f"{self.stage}-{self.number}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a search knows of a training."""

    configuration: Configuration
    """The values of the searched parameters, but the loss."""
    accuracy: float
    """Of the validation split, after the last epoch; NaN unless the training is complete."""


def steps(trainings: int, num_parameters: int = 2) -> list[Step]:
    """Return the steps of a search with so many trainings, over so many parameters."""
    candidates = 3 if trainings >= 20 else 2 if trainings >= 13 else 0
    choose = list(range(candidates, 1, -1))
    explore = min(max(4 + 2 * max(0, num_parameters - 2), round(0.3 * trainings)), trainings)
    refine = trainings - explore - sum(choose)
    return [
        Step("explore", 1, explore),
        *(Step("refine", number, 1) for number in range(1, refine + 1)),
        *(Step("choose", number, many) for number, many in enumerate(choose, 1)),
    ]


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the best configuration of a loss."""

    domains: Mapping[str, Domain]
    """Where the search begins, of each parameter but the loss."""
    seed: int
    optimizer: str = "sgd"
    """That of all configurations, unless it is searched."""
    max_batch_size: int = 2**31

    def explore(self, count: int) -> list[Configuration]:
        """Return the first configurations."""
        from scipy.stats import qmc  # slow to import

        sequence = qmc.Sobol(len(self.domains), rng=np.random.default_rng(self.seed))
        points = sequence.random_base2(max(0, math.ceil(math.log2(count))))[:count]
        return [
            {
                name: _value(domain, float(place))
                for (name, domain), place in zip(self.domains.items(), point, strict=True)
            }
            for point in points
        ]

    def refine(self, number: int, trainings: Sequence[Training]) -> Configuration:
        """Return the configuration of a refining step, from 1."""
        draw = float(np.random.default_rng([self.seed, number]).random())
        complete = [each for each in trainings if not math.isnan(each.accuracy)]
        if not complete:  # all rates may be too high
            lowest = min(trainings, key=self._place).configuration
            return {**lowest, RATE: lowest[RATE] * 10 ** -(2 * STRIDE * (0.8 + 0.4 * draw))}
        best = best_of(complete)
        others = [name for name in self.domains if name != RATE]
        # Rate, rate, another parameter, rate, another parameter, …
        if number > 2 and number % 2 and others:
            start = (number - 3) // 2
            names = [others[(start + offset) % len(others)] for offset in range(len(others))]
            for name in names:
                if (changed := self._change(name, best.configuration, trainings, draw)) is not None:
                    return changed
        return self._refine_rate(best, trainings, draw, others)

    def _refine_rate(
        self, best: Training, trainings: Sequence[Training], draw: float, others: Sequence[str]
    ) -> Configuration:
        """Go beyond the edge, or halve the wider gap between the best rate and its neighbours."""
        near = self._distances(best, trainings)
        above = min((each for each in near if each > 1e-9), default=math.inf)
        below = min((-each for each in near if each < -1e-9), default=math.inf)
        stride = STRIDE * (0.8 + 0.4 * draw)
        if max(above, below) < CLOSED:
            for name in others:
                if (changed := self._change(name, best.configuration, trainings, draw)) is not None:
                    return changed
            move = 0.3 * (draw - 0.5)
        elif above == below == math.inf:
            move = STRIDE if draw < 0.5 else -STRIDE
        elif above == math.inf:
            move = stride
        elif below == math.inf:
            move = -stride
        elif above > below:
            move = min(above * (0.4 + 0.2 * draw), STRIDE)
        else:
            move = -min(below * (0.4 + 0.2 * draw), STRIDE)
        return {**best.configuration, RATE: best.configuration[RATE] * 10**move}

    def _distances(self, best: Training, trainings: Sequence[Training]) -> list[float]:
        """Return how far the learning rates of comparable trainings lie from the best, in decades.

        A rate that diverges is too high at any batch size. That a training with another batch size
        and about the same rate is worse says something about the batch size, not the rate.
        """
        size, found = best.configuration.get(SIZE, 1), []
        for each in trainings:
            distance = self._place(each) - self._place(best)
            other = each.configuration.get(SIZE, 1)
            is_near = max(size, other) <= COMPARABLE * min(size, other)
            is_of_rate = other == size or abs(distance) >= DISTINCT
            if math.isnan(each.accuracy) or (is_near and is_of_rate):
                found.append(distance)
        return found

    def _change(
        self, name: str, best: Configuration, trainings: Sequence[Training], draw: float
    ) -> Configuration | None:
        """Return the best configuration with another value of a parameter; None if none is left."""
        domain = self.domains[name]
        if isinstance(domain, Range):
            return {**best, name: _halve(domain, name, best, trainings, draw)}
        if name == SIZE:
            return self._change_size(domain, best, trainings, draw)
        untried = [
            value
            for value in domain.values
            if value != best[name] and not self._is_tried({**best, name: value}, name, trainings)
        ]
        return {**best, name: untried[int(draw * len(untried))]} if untried else None

    def _change_size(
        self, domain: Choices, best: Configuration, trainings: Sequence[Training], draw: float
    ) -> Configuration | None:
        """Return the best configuration with twice or half the batch size, at the rate for it."""
        if len(domain.values) < 2:
            return None
        low, high = min(domain.values) / BEYOND, max(domain.values) * BEYOND
        size = best[SIZE]
        changed = [
            {**best, SIZE: other, RATE: best[RATE] * (other / size) ** self._power(best)}
            for other in (size * 2, size // 2)
            if low <= other <= high and 1 <= other <= self.max_batch_size
        ]
        untried = [each for each in changed if not self._is_tried(each, SIZE, trainings)]
        return untried[int(draw * len(untried))] if untried else None

    def _is_tried(self, wanted: Configuration, name: str, trainings: Sequence[Training]) -> bool:
        """Return whether a value was tried at about this learning rate."""
        return any(
            each.configuration[name] == wanted[name]
            and abs(self._place(each) - self._place_of(wanted)) < SAME_RATE
            for each in trainings
        )

    def _place(self, training: Training) -> float:
        return self._place_of(training.configuration)

    def _place_of(self, configuration: Configuration) -> float:
        """Return the decade of a learning rate, as if at a batch size of 1."""
        size = configuration.get(SIZE, 1)
        return math.log10(configuration[RATE]) - self._power(configuration) * math.log10(size)

    def _power(self, configuration: Configuration) -> float:
        return RATE_PER_SIZE[configuration.get("optimizer", self.optimizer)]


def best_of(trainings: Sequence[Training]) -> Training:
    """Return the first training with the highest accuracy."""
    return max(trainings, key=lambda each: each.accuracy)


def candidates(trainings: Sequence[Training], count: int) -> list[int]:
    """Return the positions of the trainings to choose from, the best first."""
    order = sorted(
        range(len(trainings)),
        key=lambda at: (
            math.isnan(trainings[at].accuracy),
            0.0 if math.isnan(trainings[at].accuracy) else -trainings[at].accuracy,
            at,
        ),
    )
    return order[:count]


def without_worst(accuracies: Mapping[int, Sequence[float]]) -> list[int]:
    """Return the candidates but the worst, given their accuracies on fresh seeds, the best first.

    A candidate that diverged or failed on a fresh seed is worse than all that did not.
    """

    def rank(at: int) -> tuple[int, float, int]:
        values = [each for each in accuracies[at] if not math.isnan(each)]
        lost = len(accuracies[at]) - len(values)
        return lost, -float(np.mean(values)) if values else 0.0, at

    ordered = sorted(accuracies, key=rank)
    return ordered[:-1]


def _value(domain: Domain, place: float) -> Any:
    """Return the value of a domain at a place in [0, 1)."""
    if isinstance(domain, Choices):
        return domain.values[int(place * len(domain.values))]
    low, high = domain.values
    value = low * (high / low) ** place if domain.log else low + (high - low) * place
    return round(value) if isinstance(low, int) and isinstance(high, int) else float(value)


def _place_in(domain: Range, value: float) -> float:
    low, high = domain.values
    if domain.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _halve(
    domain: Range,
    name: str,
    best: Configuration,
    trainings: Sequence[Training],
    draw: float,
) -> Any:
    """Return a value in the wider gap beside the best one, or beside the end of the range."""
    place = _place_in(domain, best[name])
    tried = [_place_in(domain, each.configuration[name]) for each in trainings]
    above = min((each for each in tried if each > place + 1e-9), default=1.0) - place
    below = place - max((each for each in tried if each < place - 1e-9), default=0.0)
    share = 0.4 + 0.2 * draw
    return _value(domain, place + above * share if above > below else place - below * share)
