"""The search space: an Optuna trial in, the configuration of its training out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from cnn.config import TrainConfig
from cnn.losses import get_loss

MAX_SEED = 2**32 - 1

FIRST_EPOCH = 1
"""The number of it; accuracies are reported to Optuna under their epochs' numbers."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting to be tried, with the seed of its split, initial weights and order of images."""

    loss: str
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a study varies (the first four), and what is the same in all of its trials.

    The space is the same for every loss: a range of learning rates that suits one starves another,
    so it is to be wide.
    """

    losses: Sequence[str]
    learning_rate_min: float
    learning_rate_max: float
    batch_sizes: Sequence[int]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of `TrainConfig`."""
    varies_seed: bool = False
    """Whether a trial has a seed of its own, too, as the points of a `PointSampler` do."""

    def __post_init__(self) -> None:
        for name, value in (("min", self.learning_rate_min), ("max", self.learning_rate_max)):
            if not 0 < value < math.inf:
                raise ValueError(f"--learning-rate-{name} must be finite and > 0, not {value!r}")
        if self.learning_rate_min >= self.learning_rate_max:
            raise ValueError(
                f"--learning-rate-min {self.learning_rate_min!r} must be smaller than "
                f"--learning-rate-max {self.learning_rate_max!r}"
            )
        for flag, values in (("--losses", self.losses), ("--batch-sizes", self.batch_sizes)):
            if not values:
                raise ValueError(f"{flag} needs at least one value")
            if len(set(values)) < len(values):
                raise ValueError(f"{flag} has a value twice: {' '.join(map(str, values))}")
        for loss in self.losses:
            get_loss(loss)
        for batch_size in self.batch_sizes:
            self._config(self.losses[0], self.learning_rate_min, batch_size)

    def suggest(self, trial: Trial) -> TrainConfig:
        """Return the configuration of a trial; if it is taken up again, the same as before."""
        config = self._config(
            trial.suggest_categorical("loss", self.losses),
            trial.suggest_float(
                "learning_rate", self.learning_rate_min, self.learning_rate_max, log=True
            ),
            trial.suggest_categorical("batch_size", self.batch_sizes),
        )
        if self.varies_seed:
            return replace(config, seed=trial.suggest_int("seed", 0, MAX_SEED))
        return config

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the space in Optuna's terms."""
        return {
            "loss": CategoricalDistribution(self.losses),
            "learning_rate": FloatDistribution(
                self.learning_rate_min, self.learning_rate_max, log=True
            ),
            "batch_size": CategoricalDistribution(self.batch_sizes),
        }

    def _config(self, loss: str, learning_rate: float, batch_size: int) -> TrainConfig:
        return TrainConfig(
            loss=loss, learning_rate=learning_rate, batch_size=batch_size, **self.fixed
        )


class TrialSeededSampler(BaseSampler):
    """A sampler whose random state is a function of a seed and the trial's number.

    The random state of Optuna's samplers dies with its process. With this one, a study that is
    resumed goes the way that the undisturbed one would have gone.
    """

    def __init__(self, make_sampler: Callable[[int], BaseSampler], seed: int) -> None:
        self._make_sampler = make_sampler
        self._seed = seed
        self._inferring: BaseSampler | None = None

    def _sampler(self, trial: FrozenTrial) -> BaseSampler:
        mixed = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]
        sampler = self._make_sampler(int(mixed))
        if isinstance(sampler, _NumberedQMCSampler):
            sampler.number = trial.number
        return sampler

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what `sample_relative` is to sample."""
        # There is nothing random in it, and one that lasts looks at new trials only.
        if self._inferring is None:
            self._inferring = self._make_sampler(self._seed)
        return self._inferring.infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return values for parameters that are sampled together."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a value for a parameter by itself."""
        # One stream a parameter: else two categorical ones would draw the same number.
        mixed = np.random.SeedSequence(
            [self._seed, trial.number, *param_name.encode()]
        ).generate_state(1)[0]
        sampler = self._make_sampler(int(mixed))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Take note of a trial that ended."""
        self._sampler(trial).after_trial(study, trial, state, values)


class PointSampler(BaseSampler):
    """A sampler whose trials are the points of a list, in order."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = points

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """Return that nothing is sampled together."""
        return {}

    def sample_relative(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """Return what the trial's point has."""
        return getattr(self._points[trial.number], param_name)


class _NumberedQMCSampler(optuna.samplers.QMCSampler):
    """A sequence in which a trial's place is its number.

    Optuna counts in the storage: there, a trial that is taken up again would take two places.
    """

    number = 0

    def _find_sample_id(self, study: optuna.Study, search_space: object) -> int:  # noqa: ARG002
        return self.number


def _qmc(mixed: int, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "QMCSampler is experimental")
        return _NumberedQMCSampler(
            seed=seed,
            scramble=True,
            independent_sampler=optuna.samplers.RandomSampler(seed=mixed),
            warn_independent_sampling=False,
        )


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Return the sampler of that name, a key of `SAMPLERS`, seeded by trial."""
    return TrialSeededSampler(lambda mixed: SAMPLERS[name](mixed, seed), seed)


# TPE's two choices are Optuna 5's defaults, pinned because they change results: joint sampling of
# the parameters, and running trials counted as bad ones, so that workers do not all go to one spot.
SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "tpe": lambda mixed, _: optuna.samplers.TPESampler(
        seed=mixed, multivariate=True, constant_liar=True
    ),
    "random": lambda mixed, _: optuna.samplers.RandomSampler(seed=mixed),
    "qmc": _qmc,
    "gp": lambda mixed, _: optuna.samplers.GPSampler(
        seed=mixed,
        independent_sampler=optuna.samplers.RandomSampler(seed=mixed),
        warn_independent_sampling=False,
    ),
}


class OneEpochPruner(optuna.pruners.BasePruner):
    """Let a trial go on after its first epoch only if it is in the best third of all first epochs.

    That is, if fewer than a third of them are better, its own counted among them. "Keep the best K
    after one epoch" is the baseline that pruning has to beat: Egele, Guyon, Sun and Balaprakash
    (2023), "Is One Epoch All You Need For Multi-Fidelity Hyperparameter Optimization?", arXiv
    2307.15422. There, all trials have their first epoch before any goes on; here, a trial is
    compared with the first epochs that there are when it has its own, so that none has to wait.

    Optuna's pruners can't express it: `PercentilePruner` compares with complete trials only, which
    are those that it kept, and `SuccessiveHalvingPruner` prunes again at later epochs. This one has
    no state but the first epochs in the study, so that a trial whose process died before it was
    told to end is judged as before when it is taken up again.
    """

    def __init__(self, reduction_factor: int = 3) -> None:
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor must be ≥ 2, not {reduction_factor!r}")
        self._reduction_factor = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial that has had its first epoch, and no other, is to end."""
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
    """Let a trial go on after 1, 3, 9, … epochs only if it is in the best third of all that were.

    That is ASHA, of Li et al. (2020), "A System for Massively Parallel Hyperparameter Tuning",
    arXiv 1810.05934, as Optuna has it under the same name, with one difference: there, a trial that
    has come to such an epoch is marked before it is judged, so that one whose process died in
    between goes on unjudged when it is taken up again. This one has no state but the accuracies.
    """

    def __init__(self, first_epoch: int = 1, reduction_factor: int = 3) -> None:
        self._first_epoch, self._reduction_factor = first_epoch, reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial that has just had one of these epochs is to end."""
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
    """Optuna's, with the `SuccessiveHalvingPruner` above in its brackets."""

    def _try_initialization(self, study: optuna.Study) -> None:
        super()._try_initialization(study)
        self._pruners: list[Any] = [
            SuccessiveHalvingPruner(
                self._min_resource * self._reduction_factor**bracket, self._reduction_factor
            )
            for bracket in range(len(self._pruners))
        ]


def make_pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    """Return the pruner of that name, a key of `PRUNERS`, for trials of so many epochs."""
    return PRUNERS[name](epochs)


# `benchmarks.pruning` replays sweeps with each of them, and with other arguments: asha from epoch 2
# on, for example, prunes the best less often on CIFAR-10, but more often on the digits.
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda _: optuna.pruners.NopPruner(),
    "median": lambda _: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    "hyperband": lambda epochs: HyperbandPruner(
        min_resource=1, max_resource=epochs, reduction_factor=3
    ),
    "asha": lambda _: SuccessiveHalvingPruner(first_epoch=1, reduction_factor=3),
    "one_epoch": lambda _: OneEpochPruner(reduction_factor=3),
}
