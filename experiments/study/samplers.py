"""How the configurations of trials are chosen: Optuna's samplers, seeded by trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from experiments.study.parameter_types import Configuration


class TrialSeededSampler(BaseSampler):
    """A sampler whose random state depends only on a seed and the trial's number.

    The random state of Optuna's samplers ends with its process. With this sampler, a resumed study
    gets the same configurations as one without interruption.
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
        """Return the search space of `sample_relative`."""
        # It is not random, and a sampler that is kept reads only new trials.
        if self._inferring is None:
            self._inferring = self._make_sampler(self._seed)
        return self._inferring.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the values of parameters that are sampled together."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the value of a parameter that is sampled alone."""
        # One stream per parameter: two categorical ones would draw the same number otherwise.
        mixed = np.random.SeedSequence(
            [self._seed, trial.number, *param_name.encode()]
        ).generate_state(1)[0]
        sampler = self._make_sampler(int(mixed))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class FixedSampler(optuna.samplers.RandomSampler):
    """A sampler whose trials have the configurations of a list, in order."""

    def __init__(self, configurations: Sequence[Configuration]) -> None:
        super().__init__()
        self._configurations = configurations

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
    """A sequence whose index is the trial's number.

    Optuna counts in the storage, where a resumed trial would count twice.
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
    """Return the sampler with this name in `SAMPLERS`, seeded by trial."""
    return TrialSeededSampler(lambda mixed: SAMPLERS[name](mixed, seed), seed)


# TPE's two options are Optuna 5's defaults, pinned because they change results: the parameters are
# sampled jointly, and running trials count as bad, so that workers do not all go to one spot.
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
