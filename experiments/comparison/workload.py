"""How much work a comparison is, before it starts and while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from cnn.data import Dataset
from cnn.training import train
from experiments.comparison.plan import Planned
from experiments.study.progress import clock
from experiments.study.settings import Settings

_PROBES = (32, 256)
"""Images of the trainings that are timed before anything starts."""
_ENOUGH_SECONDS = 0.5
"""After a probe that takes so long, there is no larger one."""


def measure_rate(settings: Settings, data: Dataset) -> float:
    """Return how many images a second one worker of this machine trains; 0 if that is unknown.

    It is timed on a few images, with the first configuration and one thread.
    """
    config = settings.space().example()
    if config.device != "cpu" or settings.worker_device is not None:
        return 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate = 0.0
    try:
        for images in _PROBES:
            start = time.monotonic()
            rows = data.train.rows[:images]
            few = replace(data.train, rows=rows)
            size = min(config.batch_size, len(rows))
            probe = replace(config, batch_size=size, epochs=2)
            epochs = train(probe, replace(data, train=few, validation=few))
            rate = max(epoch.images_per_second for epoch in epochs)
            if time.monotonic() > start + _ENOUGH_SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return rate


class Workload:
    """Counts the trainings of a comparison over its stages, and estimates the time left."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self.done = 0
        self._counted = 0  # trainings that this process made, over which the time went
        self._start = time.monotonic()

    def lines(self, rate: float) -> Iterator[str]:
        """Yield what the work is, given the images a second of all workers; 0: unknown."""
        planned = self.planned
        for loss, trainings in planned.trainings.items():
            yield f"{loss:16s} {trainings:5,d} trainings, {trainings * planned.epochs:7,d} epochs"
        if planned.others:
            epochs = planned.others * planned.epochs
            yield f"{'to use':16s} {planned.others:5,d} trainings, {epochs:7,d} epochs"
        epochs = planned.total * planned.epochs
        text = f"{'in all':16s} {planned.total:5,d} trainings, {epochs:7,d} epochs"
        if rate:
            text += f": about {clock(epochs * planned.images / rate)}, if none is known already"
        yield text

    def begin(self, num_before: int) -> None:
        """Note that a stage begins, some of whose trials ended before."""
        self.done += num_before

    def count(self, *, reused: bool = False) -> None:
        """Count a training that ended."""
        self.done += 1
        self._counted += not reused

    def place(self) -> str:
        """Return how much of the work is done, and the time left, as text."""
        text = f"{self.done} of {self.planned.total}"
        if self._counted:
            left = (time.monotonic() - self._start) / self._counted
            text += f", {clock(left * max(0, self.planned.total - self.done))} left"
        return text
