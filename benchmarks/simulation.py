"""Workers that only sleep, for `benchmarks.scaling`: any number of them costs nothing."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.networks import build_network
from experiments.engine.base import EpochEnded, Event, JobEnded

BEST_LEARNING_RATES = {"l1": 0.3, "mse": 0.2, "cross_entropy": 0.02}


@dataclass
class _Job:
    config: TrainConfig
    began: float
    stopped: float = math.inf


class SimulatedPool:
    """Workers that take the time of a training, and report plausible accuracies.

    Like real workers, they begin the next epoch before the driver has read the last one. So a trial
    that is pruned has trained one epoch too many. A worker without a job is idle.

    Args:
        num_workers: how many.
        epoch_seconds: of an epoch, ± 10 %; 0: the next epoch has ended whenever the driver asks.
    """

    def __init__(self, num_workers: int, *, epoch_seconds: float) -> None:
        self.num_workers, self.epoch_seconds = num_workers, epoch_seconds
        self.jobs: dict[int, _Job] = {}
        self.due: list[tuple[float, int, int]] = []
        self.trained: list[tuple[float, float]] = []
        """When each job that has ended began and ended, by `time.monotonic`."""
        self.all_busy = math.inf
        """When every worker had a job for the first time; inf: never."""
        network = build_network(10, seed=0)
        self.weights = {name: value.numpy() for name, value in network.state_dict().items()}

    def open(self, data: Dataset, data_dir: Path) -> None:
        """Open nothing."""

    def hardware(self) -> str:
        """Return the name of no hardware."""
        return "simulated"

    def arithmetic(self, device: str) -> dict[str, str]:  # noqa: ARG002
        """Return no arithmetic."""
        return {}

    @property
    def num_idle(self) -> int:
        """How many workers are idle."""
        return self.num_workers - len(self.jobs)

    def submit(self, job: int, config: TrainConfig) -> None:
        """Hand a job to an idle worker."""
        assert self.num_idle
        now = time.monotonic()
        self.jobs[job] = _Job(config, now)
        self._train(job, 1, now)
        if not self.num_idle:
            self.all_busy = min(self.all_busy, now)

    def stop(self, job: int) -> None:
        """Stop a job after its present epoch."""
        if job in self.jobs:
            self.jobs[job].stopped = time.monotonic()

    def forget(self, config: TrainConfig) -> None:
        """Remove no checkpoint."""

    def wait(self, timeout: float) -> list[Event]:
        """Return the next events, or none after `timeout` seconds."""
        end = time.monotonic() + timeout
        first = self.due[0][0] if self.due else math.inf
        time.sleep(max(0, min(first, end) - time.monotonic()))
        return list(self._happened(time.monotonic()))

    def busy_seconds(self, begin: float, end: float) -> float:
        """Return how long all workers together have trained between two times in the past."""
        for _ in self._happened(end):
            pass
        spans = [*self.trained, *((job.began, end) for job in self.jobs.values())]
        return sum(max(0, min(end, ended) - max(begin, began)) for began, ended in spans)

    def _train(self, job: int, number: int, began: float) -> None:
        pace = random.Random(f"{job} {number}").uniform(0.9, 1.1)
        heapq.heappush(self.due, (began + pace * self.epoch_seconds, job, number))

    def _happened(self, now: float) -> Iterator[Event]:
        while self.due and self.due[0][0] <= now:
            ended, job, number = heapq.heappop(self.due)
            training = self.jobs[job]
            yield epoch_of(job, number, training.config)
            if number < training.config.epochs and ended < training.stopped:
                self._train(job, number + 1, ended)
                continue
            self.trained.append((training.began, ended))
            del self.jobs[job]
            yield JobEnded(job=job, weights=self.weights)


def epoch_of(job: int, number: int, config: TrainConfig) -> EpochEnded:
    """Return the end of an epoch: the closer to the best learning rate, the more accurate."""
    off = math.log10(config.learning_rate / BEST_LEARNING_RATES[config.loss])
    luck = random.Random(f"{job} {number}").gauss(0, 0.01)
    accuracy = 0.7 * math.exp(-(off**2) / 2) * (1 - math.exp(-number / 4)) + luck
    metrics = {
        "train/loss": 1 - accuracy,
        "train/accuracy": accuracy,
        "val/loss": 1 - accuracy,
        "val/accuracy": accuracy,
        "train/learning_rate": config.learning_rate,
        "worker/epoch_seconds": 3.0,
        "worker/images_per_second": 9000.0,
    }
    return EpochEnded(job=job, number=number, metrics=metrics, diverged=False)
