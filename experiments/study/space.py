"""The search space: an Optuna trial in, the configuration of its training out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from cnn.config import TrainConfig
from cnn.losses import get_loss

MAX_SEED = 2**32 - 1


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
