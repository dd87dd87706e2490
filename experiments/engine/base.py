"""The interface of all workers: a pool, and the events of its jobs."""

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
    """An epoch of a job ended."""

    job: int
    number: int  # 1 is the first
    metrics: dict[str, float]
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class JobEnded:
    """A job ended: it reached its last epoch, diverged, or was stopped."""

    job: int
    weights: dict[str, np.ndarray[Any, Any]]  # the network's `state_dict`, float32


@dataclass(frozen=True, kw_only=True)
class JobFailed:
    """A job raised an exception, or its worker died."""

    job: int
    error: str  # in one line
    details: str  # the traceback, if there is one

    @classmethod
    def from_error(cls, error: Exception, job: int) -> JobFailed:
        """Return the event for the exception that is being handled."""
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return cls(job=job, error=message, details=traceback.format_exc())


@dataclass(frozen=True, kw_only=True)
class JobMoved:
    """A job lost its worker. It resumes on the next idle worker."""

    job: int
    reason: str  # in one line


@dataclass(frozen=True, kw_only=True)
class CheckpointLost:
    """A job has no usable checkpoint. It is trained without."""

    job: int
    reason: str  # in one line

    @classmethod
    def unusable(cls, error: CheckpointError, job: int) -> CheckpointLost:
        """Return the event for a checkpoint that can't be used."""
        reason = f"its checkpoint can't be used ({error}): it starts again from its first epoch"
        return cls(job=job, reason=reason)

    @classmethod
    def unwritten(cls, error: OSError, job: int) -> CheckpointLost:
        """Return the event for a checkpoint that can't be written; the job goes on without."""
        reason = f"its checkpoint can't be written ({error}): if interrupted, it would start again"
        return cls(job=job, reason=reason)


Event = EpochEnded | JobEnded | JobFailed | JobMoved | CheckpointLost


class WorkerPool(Protocol):
    """Workers, each with one job at a time."""

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Make the workers open the data: an entry of the cache in `data_dir`."""

    def hardware(self) -> str:
        """Return the hardware of the workers, as text."""

    def arithmetic(self, device: str) -> dict[str, str]:
        """Return what the last digits of results depend on: `processor` and `threads`, if known."""

    @property
    def num_idle(self) -> int:
        """The number of idle workers."""

    def submit(self, job: int, config: TrainConfig) -> None:
        """Give a job to an idle worker. A job that failed may be submitted again."""

    def stop(self, job: int) -> None:
        """Stop a job after its current epoch. Its later events can be ignored."""

    def forget(self, config: TrainConfig) -> None:
        """Remove the checkpoint of a training that ended."""

    def wait(self, timeout: float) -> list[Event]:
        """Return the next events, or nothing after `timeout` seconds."""
