"""What tests of pools of real workers share: a training, the data for it, and its events."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cnn.config import TrainConfig
from cnn.data import Dataset, load
from experiments.engine.base import Event, JobEnded, JobFailed, WorkerPool


def config(**changes: object) -> TrainConfig:
    """Return a training of two epochs, but for the changes."""
    fields = {"loss": "mse", "learning_rate": 0.1, "batch_size": 64, "epochs": 2} | changes
    return TrainConfig(**fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a module a folder for data."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(data_dir: Path) -> Dataset:
    """Give a module the digits, in that folder."""
    return load("digits", data_dir=data_dir, seed=0)


def wait_for_end(pool: WorkerPool, seconds: float = 120) -> list[Event]:
    """Return the events up to that which ends a job."""
    events: list[Event] = []
    deadline = time.monotonic() + seconds
    while not (events and isinstance(events[-1], (JobEnded, JobFailed))):
        assert time.monotonic() < deadline, f"no end after {seconds} s: {events}"
        events.extend(pool.wait(0.1))
    return events
