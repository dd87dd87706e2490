"""What a worker does, wherever it runs: it trains a job, and what comes of it are events.

Workers know neither Optuna nor MLflow. A training is repeated bit for bit, and goes on from a
checkpoint as if it had never been cut off.
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
    # glibc gives freed tensors of some MB back to the system at once, and half of the time at batch
    # size 256 went to page faults: keep them. 32 MiB is the most that it takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


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
