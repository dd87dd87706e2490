"""What a worker does, wherever it runs: it trains a job, and what comes of it are events.

Workers know neither Optuna nor MLflow. A training is repeated bit for bit, and goes on from a
checkpoint as if it had never been cut off.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from cnn.data import Dataset
    from cnn.training import Checkpoint, TrainConfig

ALLOCATOR = {
    # glibc gives freed tensors of some MB back to the system at once, and half of the time at batch
    # size 256 went to page faults: keep them. 32 MiB is the most that it takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
DRAFT = ".draft"
"""The suffix of a checkpoint that is being written."""


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


Event = EpochEnded | JobEnded | JobFailed | JobMoved


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


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where the checkpoints of trainings on a data set are kept.

    Each under a digest of all that the training depends on: whoever trains the same goes on from
    it, and ends with the same.
    """

    digest: str
    """Of the data set."""
    data_dir: Path

    def file(self, config: TrainConfig) -> Path:
        """Return where that of a training is."""
        depends_on = [self.digest, version("torch"), config.as_params()]
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
        return self.data_dir / "checkpoints" / f"{key}.pt"

    def read(self, config: TrainConfig) -> bytes | None:
        """Return that of a training, if there is one."""
        try:
            return self.file(config).read_bytes()
        except OSError:  # none is no loss but of time
            return None

    def write(self, config: TrainConfig, content: bytes) -> None:
        """Keep that of a training, whole or not at all."""
        file = self.file(config)
        draft = file.with_suffix(DRAFT)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            draft.replace(file)
        except OSError as error:  # a full disk is no reason to lose the trial, too
            print(f"note: no checkpoint can be kept: {error}", file=sys.stderr)

    def remove(self, config: TrainConfig) -> None:
        """Remove that of a training that is over."""
        file = self.file(config)
        for each in (file, file.with_suffix(DRAFT)):
            each.unlink(missing_ok=True)


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
) -> Iterator[EpochEnded | JobEnded]:
    """Train, from a checkpoint on if there is one, and yield what comes of it.

    Epochs that are in the checkpoint are told again, with the metrics that they had: how many of
    them the main process came to hear of, it knows.

    Args:
        job: its number, which is that of its events.
        config: what to train.
        data: on what.
        checkpoint: what `keep` was handed last, if this training was cut off.
        keep: is handed a checkpoint before an epoch is told.
        should_stop: is asked after each epoch.
    """
    from cnn.training import train

    past, start = _unpack(checkpoint)
    for number, metrics in enumerate(past, 1):
        yield EpochEnded(job=job, number=number, metrics=metrics, diverged=False)
    state = None if start is None else start.model
    for epoch in train(config, data, after=start):
        state = epoch.model.state_dict()
        past.append(epoch.metrics())
        if not epoch.diverged:
            keep(_pack(past, epoch.checkpoint()))
        yield EpochEnded(job=job, number=epoch.number, metrics=past[-1], diverged=epoch.diverged)
        if should_stop():
            break
    assert state is not None
    yield JobEnded(job=job, weights={name: value.cpu().numpy() for name, value in state.items()})


def _pack(past: list[dict[str, float]], checkpoint: Checkpoint) -> bytes:
    import torch

    content = io.BytesIO()
    torch.save({"past": past, **vars(checkpoint)}, content)
    return content.getvalue()


def _unpack(content: bytes | None) -> tuple[list[dict[str, float]], Checkpoint | None]:
    """Return the metrics of the epochs in a checkpoint, and it, if it is a whole one."""
    import torch

    from cnn.training import Checkpoint

    if content is None:
        return [], None
    try:
        parts = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # cut short by a power cut
        return [], None
    past = parts.pop("past")
    return past, Checkpoint(**parts)
