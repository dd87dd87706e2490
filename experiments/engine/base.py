"""What all workers have in common for those who use them: a pool, and the events of its jobs."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.engine.checkpoints import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from cnn.config import TrainConfig
    from cnn.data import Dataset


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch of a job is over."""

    job: int
    number: int
    """1 is the first."""
    metrics: dict[str, float]
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class JobEnded:
    """A job is over, because it reached its last epoch, diverged, or was stopped."""

    job: int
    weights: dict[str, np.ndarray[Any, Any]]
    """The network's `state_dict`, float32."""


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """A job raised an exception, or its worker died."""

    job: int
    error: str
    """In one line."""
    details: str
    """The traceback, if there is one."""

    @classmethod
    def by(cls, error: Exception, job: int) -> JobFailed:
        """Return that a job raised what is being handled: whatever it is, it goes to its run."""
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return cls(job=job, error=message, details=traceback.format_exc())


@dataclass(frozen=True, kw_only=True)
class JobMoved:
    """A job lost its worker, by no fault of its own: it goes on, on the next that is idle."""

    job: int
    reason: str
    """In one line."""


@dataclass(frozen=True, kw_only=True)
class CheckpointLost:
    """A job has no checkpoint, by no fault of its own: it is trained for all that."""

    job: int
    reason: str
    """In one line."""

    @classmethod
    def unusable(cls, error: CheckpointError, job: int) -> CheckpointLost:
        """Return that the one that there is can't be used."""
        reason = f"its checkpoint can't be used ({error}): it starts again from its first epoch"
        return cls(job=job, reason=reason)

    @classmethod
    def unkept(cls, error: OSError, job: int) -> CheckpointLost:
        """Return that none can be kept; a full disk is no reason to lose the job, too."""
        reason = f"its checkpoint can't be kept ({error}): cut off, it would start again"
        return cls(job=job, reason=reason)


Event = EpochEnded | JobEnded | JobFailed | JobMoved | CheckpointLost


class WorkerPool(Protocol):
    """Workers, each with one job at a time, wherever they are."""

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Have the workers open the data, an entry of `cnn.data`'s cache in a folder."""

    def hardware(self) -> str:
        """Return what the workers run on, as far as it matters for speed and results."""

    @property
    def num_idle(self) -> int:
        """How many workers have nothing to do."""

    def submit(self, job: int, config: TrainConfig) -> None:
        """Hand out a job: to an idle worker, or, of a job that failed, to the one that is next."""

    def stop(self, job: int) -> None:
        """Have a job stop after the epoch under way; what is still told of it is of no interest."""

    def forget(self, config: TrainConfig) -> None:
        """Remove the checkpoint of a training that is over."""

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, once something has, or nothing after `timeout` seconds."""
