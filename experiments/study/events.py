"""The events of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from cnn.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepStarted:
    """The study is open."""

    study: str
    experiment: str
    experiment_id: str
    parent_run_id: str
    runs_page: str  # the address of the list of its runs in MLflow, after that of the server
    num_before: int  # trials of the study that had ended before
    best_before: tuple[float, int] | None  # accuracy and number of the best complete one of them
    unfinished: Mapping[int, int] = field(default_factory=dict)
    """Trials that resume, by their numbers: the epochs that an earlier process recorded."""
    notes: tuple[str, ...] = ()  # notes for the user, a line each


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A worker trains a trial, and its run is open."""

    trial: int
    run_id: str
    config: TrainConfig
    resumed_after: int | None = None  # the recorded epochs of a resumed trial; None: it is new


@dataclass(frozen=True, kw_only=True)
class TrialProgressed:
    """An epoch of a trial ended and was recorded."""

    trial: int
    number: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial ended and was recorded."""

    trial: int
    outcome: str  # `complete`, `pruned`, `diverged`, `failed` or `interrupted`
    accuracy: float | None  # the last validation accuracy, if there is one
    epochs: int
    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialReused:
    """A trial has the results of a finished training, and links its run."""

    trial: int
    run_id: str
    config: TrainConfig
    outcome: str  # `complete` or `diverged`
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrialNote:
    """A note for the user on a running trial: it changed its worker or lost its checkpoint."""

    trial: int
    text: str


@dataclass(frozen=True, kw_only=True)
class SweepEnded:
    """The sweep ended, and everything is recorded."""

    outcome: str  # `complete`; `interrupted`, which the same command continues; or `failed`
    reason: str
    trials: pd.DataFrame | None = field(default=None, compare=False)
    """The table of `trials_table`, if the storage could be read."""
    notes: tuple[str, ...] = ()  # notes for the user, a line each


@dataclass(frozen=True, kw_only=True)
class BestRegistered:
    """The registration of the best trial's model was tried."""

    report: str  # its result, in a line


SweepEvent = (
    SweepStarted
    | TrialStarted
    | TrialProgressed
    | TrialNote
    | TrialReused
    | TrialEnded
    | BestRegistered
    | SweepEnded
)
