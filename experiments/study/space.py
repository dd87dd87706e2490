"""The search space: from an Optuna trial to the configuration of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import Trial

from cnn.config import TrainConfig
from experiments.study.domains import Domain
from experiments.study.parameter_types import Configuration
from experiments.study.parameters import BY_NAME, PARAMETERS

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched and the fixed fields of a study's configurations.

    The space is the same for every loss. A range of learning rates that suits one loss does not
    suit another, so it should be wide.
    """

    search: Mapping[str, Domain]  # by names of `parameters.PARAMETERS`
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the other fields of `TrainConfig`
    varies_seed: bool = False
    """Whether each trial has its own seed, as the configurations of a `FixedSampler` do."""

    def __post_init__(self) -> None:
        for name, domain in self.search.items():
            BY_NAME[name].check(domain)
            if name in self.fixed:
                raise ValueError(f"{name} is searched, and set to {self.fixed[name]!r} as well")
        first = {name: domain.values[0] for name, domain in self.search.items()}
        for name, domain in self.search.items():
            for value in domain.values:
                self._config(first | {name: value})

    def suggest(self, trial: Trial) -> TrainConfig:
        """Return the configuration of a trial. A resumed trial has the same as before."""
        values: dict[str, Any] = {}
        for name in self._names:
            if self._applies(name, values):
                values[name] = self.search[name].suggest(trial, name)
        if self.varies_seed:
            values["seed"] = trial.suggest_int("seed", 0, MAX_SEED)
        return self._config(values)

    def varied(self, config: TrainConfig) -> Configuration:
        """Return the values of a configuration that differ between trials, where they apply."""
        values: dict[str, Any] = {}
        for name in self._names:
            if self._applies(name, values):
                values[name] = getattr(config, name)
        return values | ({"seed": config.seed} if self.varies_seed else {})

    def values(self, name: str) -> tuple[Any, ...]:
        """Return the values that a parameter may have: those searched, or the one of all trials."""
        if name in self.search:
            return self.search[name].values
        return (getattr(self.example(), name),)

    def example(self, **values: Any) -> TrainConfig:
        """Return a configuration with these values, and the first of what else is searched."""
        first = {each: domain.values[0] for each, domain in self.search.items()}
        return self._config(first | values)

    @property
    def _names(self) -> list[str]:
        return [each.name for each in PARAMETERS if each.name in self.search]

    def _applies(self, name: str, values: Configuration) -> bool:
        return BY_NAME[name].applies({**self.fixed, **values})

    def _config(self, values: Configuration) -> TrainConfig:
        return TrainConfig(**{**self.fixed, **values})
