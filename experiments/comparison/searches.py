"""The searches of a block: which configurations a step trains, and what came out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from experiments.comparison import search_rule
from experiments.comparison.plan import Block, Pair, Plan
from experiments.comparison.results import validation_mean
from experiments.comparison.search_rule import Search, Step, Training
from experiments.study.parameter_types import Configuration
from experiments.study.trials import finished_trials


class Searches:
    """All searches of a block, step by step. All that they do follows from the steps' studies."""

    def __init__(self, plan: Plan, block: Block, *, max_batch_size: int) -> None:
        self.plan, self.block = plan, block
        domains = {name: domain for name, domain in plan.settings.search.items() if name != "loss"}
        self._searches = {
            search: Search(
                domains=domains,
                seed=plan.seed_of(search),
                optimizer=plan.settings.training.get("optimizer", "sgd"),
                max_batch_size=max_batch_size,
            )
            for _, search in block.pairs
        }
        self._trained: dict[Pair, list[Training]] = {pair: [] for pair in block.pairs}
        self._alive: dict[Pair, list[int]] = {}
        """The trainings to choose from, the best first."""
        self._fresh: dict[Pair, dict[int, list[float]]] = {pair: {} for pair in block.pairs}
        """The accuracies on fresh seeds, by training."""

    def configurations(self, step: Step) -> list[Configuration]:
        """Return the configurations of a step: those of the first search, then the next."""
        found: list[Configuration] = []
        for loss, search in self.block.pairs:
            values = self._next(step, (loss, search))
            assert len(values) == step.trainings
            seed = self.plan.seed_of(search, step.stage, step.number)
            found += [{"loss": loss, **each, "seed": seed} for each in values]
        return found

    def _next(self, step: Step, pair: Pair) -> list[Configuration]:
        search, trained = self._searches[pair[1]], self._trained[pair]
        if step.stage == "explore":
            return search.explore(step.trainings)
        if step.stage == "refine":
            return [search.refine(step.number, trained)]
        alive = self._alive.setdefault(pair, search_rule.candidates(trained, step.trainings))
        return [trained[at].configuration for at in alive]

    def take(self, step: Step, study: Study) -> None:
        """Take the results of a step, whose study is complete."""
        trials = finished_trials(study)
        for number, pair in enumerate(self.block.pairs):
            first = number * step.trainings
            self._take(step, pair, trials[first : first + step.trainings])

    def _take(self, step: Step, pair: Pair, trials: Sequence[FrozenTrial]) -> None:
        accuracies = [_accuracy(trial) for trial in trials]
        if step.stage != "choose":
            self._trained[pair] += [
                Training(configuration=_without_loss(trial.params), accuracy=accuracy)
                for trial, accuracy in zip(trials, accuracies, strict=True)
            ]
            return
        fresh = self._fresh[pair]
        for at, accuracy in zip(self._alive[pair], accuracies, strict=True):
            fresh.setdefault(at, []).append(accuracy)
        self._alive[pair] = search_rule.without_worst({at: fresh[at] for at in self._alive[pair]})

    def chosen(self) -> Iterator[tuple[Pair, Configuration, list[float]]]:
        """Yield each search with the configuration that it chose, and its fresh accuracies.

        A search without a complete training has none.
        """
        for pair, trained in self._trained.items():
            at = (self._alive.get(pair) or search_rule.candidates(trained, 1))[0]
            if not math.isnan(trained[at].accuracy):
                yield pair, trained[at].configuration, self._fresh[pair].get(at, [])

    def finals(self) -> list[Configuration]:
        """Return the chosen configurations, each with a fresh seed."""
        return [
            {"loss": loss, **values, "seed": self.plan.seed_of(search, "final")}
            for (loss, search), values, _ in self.chosen()
        ]


def best_of_all(
    searches: Sequence[Searches], repeats: Mapping[Pair, FrozenTrial]
) -> Configuration | None:
    """Return the best configuration of the loss that is best in validation; None if there is none.

    The configurations of one loss are ordered by their accuracies on fresh seeds.
    """
    of_outcome: dict[str, dict[str, list[float]]] = {"complete": {}, "diverged": {}}
    for (loss, _), trial in repeats.items():
        outcome = trial.user_attrs.get("outcome")
        if outcome in of_outcome:
            of_outcome[outcome].setdefault(loss, []).append(trial.value or 0.0)
    complete, diverged = of_outcome.values()
    losses = [loss for loss in dict.fromkeys(loss for loss, _ in repeats) if loss in complete]
    if not losses:
        return None
    winner = max(losses, key=lambda loss: validation_mean(complete[loss], diverged.get(loss, ())))
    found: list[tuple[float, Configuration]] = []
    for each in searches:
        for pair, values, fresh in each.chosen():
            if pair[0] == winner and pair in repeats:
                accuracies = [*fresh, _accuracy(repeats[pair])]
                if not any(map(math.isnan, accuracies)):
                    found.append((sum(accuracies) / len(accuracies), values))
    return {"loss": winner, **max(found, key=lambda each: each[0])[1]}


def _accuracy(trial: FrozenTrial) -> float:
    """Return the accuracy of a complete trial, NaN for another."""
    return trial.value if trial.user_attrs.get("outcome") == "complete" else math.nan  # type: ignore[return-value]


def _without_loss(params: Mapping[str, Any]) -> Configuration:
    return {name: value for name, value in params.items() if name not in ("loss", "seed")}
