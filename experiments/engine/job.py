"""What every worker does: it trains a job and yields events.

Workers know neither Optuna nor MLflow. Training is repeatable bit for bit, also from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from experiments.engine.base import CheckpointLost, EpochEnded, JobEnded
from experiments.engine.checkpoints import CheckpointError, key_of, pack, unpack

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.data import Dataset

ALLOCATOR = {
    # glibc returns freed tensors to the system at once. Half of the time at batch size 256 went to
    # page faults. So keep them; 32 MiB is the largest value that it accepts.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def worker_variables(num_threads: int) -> dict[str, str]:
    """Return the environment variables that a worker needs before it starts."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads)) | ALLOCATOR


def set_arithmetic(num_threads: int) -> None:
    """Set up the arithmetic of the calling thread, the same for all workers."""
    import torch

    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def train_job(
    job: int,
    config: TrainConfig,
    data: Dataset,
    *,
    checkpoint: bytes | None,
    keep: Callable[[bytes], None] | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[EpochEnded | JobEnded | CheckpointLost]:
    """Train, from a checkpoint if there is one, and yield the events.

    The events of the checkpoint's epochs come again, with their metrics: the main process may not
    have seen all of them.

    Args:
        job: the number in its events.
        config: what to train.
        data: the data set.
        checkpoint: the last one passed to `keep`, if this training was interrupted. A damaged one
            is reported and ignored.
        keep: called with each checkpoint, before the event of its epoch. It may raise OSError.
            None: there are no checkpoints.
        should_stop: called after each epoch.
    """
    from cnn.training import train

    key = key_of(data.digest, config)
    past: list[dict[str, float]] = []
    start, is_kept = None, True
    if checkpoint is not None:
        try:
            past, start = unpack(
                checkpoint,
                key,
                config,
                num_classes=len(data.classes),
                image_size=data.image_size,
            )
        except CheckpointError as error:
            yield CheckpointLost.unusable(error, job)
    for number, metrics in enumerate(past, 1):
        yield EpochEnded(job=job, number=number, metrics=metrics, diverged=False)
    state = None if start is None else start.model
    for epoch in train(config, data, resume_from=start):
        state = epoch.model.state_dict()
        past.append(epoch.metrics())
        if keep is not None and not epoch.diverged:
            try:
                keep(pack(past, epoch.checkpoint(), key))
            except OSError as error:
                if is_kept:  # report it once
                    yield CheckpointLost.unwritten(error, job)
                is_kept = False
        yield EpochEnded(job=job, number=epoch.number, metrics=past[-1], diverged=epoch.diverged)
        if should_stop():
            break
    assert state is not None
    yield JobEnded(job=job, weights={name: value.cpu().numpy() for name, value in state.items()})
