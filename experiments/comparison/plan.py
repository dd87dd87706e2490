"""The plan of a comparison, and the events of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cnn.data import Dataset
from experiments.study.domains import Choices
from experiments.study.events import SweepEvent
from experiments.study.settings import Settings

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a comparison.

    Raises:
        ValueError: something is out of its range.
    """

    settings: Settings
    """The settings of the search, with all losses."""
    repeats: int
    """How often the best configuration of each loss is trained again."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be ≥ 1, not {self.repeats}")
        if self.settings.seed + self.repeats > 2**32 - 1:
            raise ValueError(f"--seed + --repeats must be < 2**32: {self.settings.seed}")

    @property
    def seeds(self) -> range:
        """The seeds of the repeats, which follow that of the search."""
        return range(self.settings.seed + 1, self.settings.seed + 1 + self.repeats)

    def fingerprint(self, data: Dataset) -> dict[str, Any]:
        """Return what makes two comparisons the same: all settings but the repeats."""
        return self.settings.fingerprint(data) | {"trials": self.settings.trials}

    def search(self, name: str, loss: str) -> Settings:
        """Return the settings of the search for a loss' best configuration."""
        return replace(
            self.settings,
            search={**self.settings.search, "loss": Choices((loss,))},
            study=f"{name}/search/{loss}",
            options="",
            tags={"comparison": name, "stage": "search"},
        )

    def confirmation(self, name: str, winners: Sequence[Mapping[str, Any]]) -> Settings:
        """Return the settings of the repeats: all winners with the first seed, then the next."""
        losses = tuple(winner["loss"] for winner in winners)
        configurations = [{**each, "seed": seed} for seed in self.seeds for each in winners]
        return replace(
            self.settings,
            search={**self.settings.search, "loss": Choices(losses)},
            configurations=configurations,
            trials=len(configurations),
            study=f"{name}/confirm",
            options="",
            tags={"comparison": name, "stage": "confirm"},
        )


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    title: str
    settings: Settings | None
    """Of its sweep; None if the stage is no sweep."""


@dataclass(frozen=True, kw_only=True)
class ModelTested:
    """A confirmed model has predicted the test split."""

    loss: str
    seed: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ComparisonEnded:
    """The comparison is over, and everything is recorded."""

    name: str
    outcome: str
    """complete, interrupted or failed."""
    reason: str
    experiment_id: str
    parent_run_id: str
    assessment: Assessment | None
    """None unless the outcome is complete."""


Event = StageStarted | ModelTested | SweepEvent | ComparisonEnded
