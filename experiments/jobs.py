"""What a worker does, wherever it runs: it trains a job, and what comes of it are events.

Workers know neither Optuna nor MLflow. A training is repeated bit for bit, and goes on from a
checkpoint as if it had never been cut off.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.checkpoints import CheckpointError, key_of, pack, unpack

if TYPE_CHECKING:
    import numpy as np

    from cnn.config import TrainConfig
    from cnn.data import Dataset

ALLOCATOR = {
    # glibc gives freed tensors of some MB back to the system at once, and half of the time at batch
    # size 256 went to page faults: keep them. 32 MiB is the most that it takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


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


class Pool(Protocol):
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


def environment(num_threads: int) -> dict[str, str]:
    """Return what the environment of a worker needs before it starts, beside what is there."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads)) | ALLOCATOR


def set_arithmetic(num_threads: int) -> None:
    """Set how the thread that calls this trains, which is what all workers have in common."""
    import torch

    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def train_job(
    job: int,
    config: TrainConfig,
    data: Dataset,
    *,
    checkpoint: bytes | None,
    keep: Callable[[bytes], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[EpochEnded | JobEnded | CheckpointLost]:
    """Train, from a checkpoint on if there is one, and yield what comes of it.

    Epochs that are in the checkpoint are told again, with the metrics that they had: how many of
    them the main process came to hear of, it knows.

    Args:
        job: its number, which is that of its events.
        config: what to train.
        data: on what.
        checkpoint: what `keep` was handed last, if this training was cut off. One that is not as
            it was then is none.
        keep: is handed a checkpoint before an epoch is told. It may raise OSError.
        should_stop: is asked after each epoch.
    """
    from cnn.training import train

    key = key_of(data.digest, config)
    past: list[dict[str, float]] = []
    start, is_kept = None, True
    if checkpoint is not None:
        try:
            past, start = unpack(checkpoint, key, config, len(data.classes))
        except CheckpointError as error:
            yield CheckpointLost.unusable(error, job)
    for number, metrics in enumerate(past, 1):
        yield EpochEnded(job=job, number=number, metrics=metrics, diverged=False)
    state = None if start is None else start.model
    for epoch in train(config, data, after=start):
        state = epoch.model.state_dict()
        past.append(epoch.metrics())
        if not epoch.diverged:
            try:
                keep(pack(past, epoch.checkpoint(), key))
            except OSError as error:
                if is_kept:  # once is enough
                    yield CheckpointLost.unkept(error, job)
                is_kept = False
        yield EpochEnded(job=job, number=epoch.number, metrics=past[-1], diverged=epoch.diverged)
        if should_stop():
            break
    assert state is not None
    yield JobEnded(job=job, weights={name: value.cpu().numpy() for name, value in state.items()})
