"""How the configurations of trials are chosen: Optuna's samplers, seeded by trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from experiments.study.parameters import Configuration


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


class FixedSampler(BaseSampler):
    """A sampler whose trials have the configurations of a list, in order."""

    def __init__(self, configurations: Sequence[Configuration]) -> None:
        self._configurations = configurations

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
        """Return the value of the trial's configuration."""
        return self._configurations[trial.number][param_name]


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
