"""A pool of workers that does what a script says, in this process: a real fake of `WorkerPool`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import pytest

import experiments.engine.processes
from cnn.config import TrainConfig
from cnn.networks import build_network
from experiments.engine.base import EpochEnded, Event, JobEnded, JobFailed

Script = Callable[[int, TrainConfig], Iterable[Event]]


class FakePool:
    """Hands out a job's events one at a time, one of each job in turn."""

    def __init__(self, script: Script, num_workers: int = 1) -> None:
        self.script, self.num_workers = script, num_workers
        self.jobs: dict[int, deque[Event]] = {}
        self.configs: dict[int, TrainConfig] = {}
        self.stopped: list[int] = []
        self.forgotten: list[TrainConfig] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, data: object, data_dir: object) -> None:
        pass

    def hardware(self) -> str:
        return "none at all"

    def arithmetic(self, device: str) -> dict[str, str]:
        return {"processor": "none at all", "threads": "1"}

    @property
    def num_idle(self) -> int:
        return self.num_workers - len(self.jobs)

    def submit(self, job: int, config: TrainConfig) -> None:
        assert self.num_idle > 0
        self.configs[job] = config
        self.jobs[job] = deque(self.script(job, config))

    def stop(self, job: int) -> None:
        self.stopped.append(job)

    def forget(self, config: TrainConfig) -> None:
        self.forgotten.append(config)

    def wait(self, timeout: float) -> list[Event]:
        events = [self.jobs[job].popleft() for job in list(self.jobs)]
        for event in events:
            if isinstance(event, (JobEnded, JobFailed)):
                del self.jobs[event.job]
        return events


def epoch(job: int, number: int, accuracy: float, *, diverged: bool = False) -> EpochEnded:
    metrics = {
        "train/loss": float("nan") if diverged else 1 / number,
        "train/accuracy": accuracy,
        "val/loss": float("nan") if diverged else 1 / (number + accuracy),
        "val/accuracy": accuracy,
        "train/learning_rate": 0.1,
        "worker/epoch_seconds": 0.5,
        "worker/images_per_second": 1000.0,
    }
    return EpochEnded(job=job, number=number, metrics=metrics, diverged=diverged)


def weights(job: int, num_classes: int = 3) -> JobEnded:
    state = build_network(num_classes, seed=job).state_dict()
    return JobEnded(job=job, weights={name: value.numpy() for name, value in state.items()})


def trains(accuracy: Callable[[int, TrainConfig], float]) -> Script:
    """Return a script by which every job reaches that accuracy, in equal steps an epoch."""

    def script(job: int, config: TrainConfig) -> Iterable[Event]:
        reached = accuracy(job, config)
        for number in range(1, config.epochs + 1):
            yield epoch(job, number, reached * number / config.epochs)
        yield weights(job)

    return script


def diverges(job: int, config: TrainConfig) -> Iterable[Event]:
    yield epoch(job, 1, 0.25)
    yield epoch(job, 2, 1 / 3, diverged=True)
    yield weights(job)


def fails(job: int, config: TrainConfig) -> Iterable[Event]:
    yield epoch(job, 1, 0.25)
    yield JobFailed(job=job, error="RuntimeError: no luck", details="Traceback …\nno luck\n")


def use_pool(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    """Have the command line open a pool that does as a script says."""
    monkeypatch.setattr(
        experiments.engine.processes,
        "ProcessPool",
        lambda num_workers, **_: FakePool(script, num_workers),
    )


def script_of_ten(job: int, config: TrainConfig) -> Iterator[Event]:
    """Train on ten classes, as the digits have."""
    *epochs, _ = trains(lambda job, _: 0.9 - job / 100)(job, config)
    yield from epochs
    yield weights(job, num_classes=10)
