"""What happens in a sweep, for those who show it."""

from __future__ import annotations

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
    num_before: int
    """Trials that the study had finished already."""
    best_before: tuple[float, int] | None
    """Accuracy and number of the best complete one of them."""
    notes: tuple[str, ...] = ()
    """What people should know of it, a line each."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial was handed to a worker."""

    trial: int
    run_id: str
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrialProgressed:
    """A trial has an epoch more, and it is recorded."""

    trial: int
    number: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial is over, and recorded."""

    trial: int
    outcome: str
    """`complete`, `pruned`, `diverged`, `failed` or `interrupted`."""
    accuracy: float | None
    """The last validation accuracy, if there is one."""
    epochs: int
    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialMoved:
    """A trial lost its worker with the machine that it was on, and goes on elsewhere."""

    trial: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialUnprotected:
    """A trial has no checkpoint that can be used: it is trained for all that."""

    trial: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SweepEnded:
    """Nothing runs any more, and all is recorded."""

    outcome: str
    """`complete`; `interrupted`, which the same command continues; or `failed`."""
    reason: str
    trials: pd.DataFrame | None = field(default=None, compare=False)
    """What `trials_table` returns, if the storage could still be read."""


@dataclass(frozen=True, kw_only=True)
class BestRegistered:
    """The model of the best trial was offered to the model registry."""

    report: str
    """What came of it, in a line."""


SweepEvent = (
    SweepStarted
    | TrialStarted
    | TrialProgressed
    | TrialMoved
    | TrialUnprotected
    | TrialEnded
    | BestRegistered
    | SweepEnded
)
