"""What a parameter is searched over: a set of values, or a range."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Choices:
    """A set of values, all equally likely."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value of a trial."""
        return trial.suggest_categorical(name, self.values)

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, uniform or log-uniform: integers if both ends are."""

    low: float
    high: float
    log: bool = False

    @property
    def values(self) -> tuple[float, ...]:
        """Both ends."""
        return self.low, self.high

    def suggest(self, trial: Trial, name: str) -> float:
        """Return the value of a trial."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{':log' * self.log}"


Domain = Choices | Range


def split_words(values: Sequence[str]) -> list[str]:
    """Return the values in words that are separated by spaces or commas."""
    return [part for value in values for part in re.split(r"[\s,]+", value) if part]
