"""The pruners: they end trials early."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

FIRST_EPOCH = 1  # accuracies are reported to Optuna under the numbers of their epochs


class OneEpochPruner(optuna.pruners.BasePruner):
    """Prunes a trial after its first epoch unless it is in the best third of all first epochs.

    "Keep the best K after one epoch" is the baseline that pruning has to beat: Egele, Guyon, Sun
    and Balaprakash (2023), "Is One Epoch All You Need For Multi-Fidelity Hyperparameter
    Optimization?", arXiv 2307.15422. There, all trials finish their first epoch before any
    continues. Here, a trial is compared with the first epochs so far, so that none has to wait.

    Optuna's `PercentilePruner` compares with complete trials only, and its
    `SuccessiveHalvingPruner` prunes at later epochs as well. This pruner has no state except the
    first epochs in the study, so a resumed trial gets the same decision.
    """

    def __init__(self, reduction_factor: int = 3) -> None:
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor must be ≥ 2, not {reduction_factor!r}")
        self._reduction_factor = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to end a trial that has finished only its first epoch."""
        assert study.direction == StudyDirection.MAXIMIZE  # accuracies
        if trial.last_step != FIRST_EPOCH:
            return False
        accuracy = trial.intermediate_values[FIRST_EPOCH]
        if math.isnan(accuracy):
            return True
        firsts = [
            other.intermediate_values[FIRST_EPOCH]
            for other in study.get_trials(deepcopy=False)
            if FIRST_EPOCH in other.intermediate_values
        ]
        better = sum(first > accuracy for first in firsts)
        return better * self._reduction_factor >= len(firsts)


class SuccessiveHalvingPruner(optuna.pruners.BasePruner):
    """Prunes a trial after 1, 3, 9, … epochs unless it is in the best third of all that got there.

    This is ASHA, of Li et al. (2020), "A System for Massively Parallel Hyperparameter Tuning",
    arXiv 1810.05934. Optuna's pruner of this name marks a trial before it decides, so a trial whose
    process died in between continues without a decision. This one has no state but the accuracies.
    """

    def __init__(self, first_epoch: int = 1, reduction_factor: int = 3) -> None:
        self._first_epoch, self._reduction_factor = first_epoch, reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to end a trial that has just finished one of these epochs."""
        assert study.direction == StudyDirection.MAXIMIZE  # accuracies
        epoch = trial.last_step
        if epoch is None or not self._is_rung(epoch):
            return False
        accuracy = trial.intermediate_values[epoch]
        if math.isnan(accuracy):
            return True
        accuracies = sorted(
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if not math.isnan(other.intermediate_values.get(epoch, math.nan))
        )
        num_promoted = max(1, len(accuracies) // self._reduction_factor)
        return accuracy < accuracies[-num_promoted]

    def _is_rung(self, epoch: int) -> bool:
        rung = self._first_epoch
        while rung < epoch:
            rung *= self._reduction_factor
        return rung == epoch


class HyperbandPruner(optuna.pruners.HyperbandPruner):
    """Optuna's pruner, with the `SuccessiveHalvingPruner` above in its brackets."""

    def _try_initialization(self, study: optuna.Study) -> None:
        super()._try_initialization(study)
        self._pruners: list[Any] = [
            SuccessiveHalvingPruner(
                self._min_resource * self._reduction_factor**bracket, self._reduction_factor
            )
            for bracket in range(len(self._pruners))
        ]


def make_pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    """Return the pruner with this name in `PRUNERS`."""
    return PRUNERS[name](epochs)


# `benchmarks.pruning` replays sweeps with each of them and with other arguments. For example, asha
# from epoch 2 on prunes the best trial less often on CIFAR-10, but more often on the digits.
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda _: optuna.pruners.NopPruner(),
    "median": lambda _: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    "hyperband": lambda epochs: HyperbandPruner(
        min_resource=1, max_resource=epochs, reduction_factor=3
    ),
    "asha": lambda _: SuccessiveHalvingPruner(first_epoch=1, reduction_factor=3),
    "one_epoch": lambda _: OneEpochPruner(reduction_factor=3),
}
