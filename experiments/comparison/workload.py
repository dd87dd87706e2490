"""How much work a comparison is, before it starts and while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from cnn.data import Dataset
from cnn.training import train
from experiments.comparison.plan import Planned
from experiments.study.settings import Settings
from tracking.text import shortened
from tracking.wording import clock, counted

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

    @property
    def total(self) -> int:
        """All trainings."""
        return self.planned.total

    def lines(self, seconds: float | None) -> Iterator[str]:
        """Yield what the work is, and how long it takes at most; None: unknown."""
        planned = self.planned
        rows = dict(planned.trainings)
        if planned.others:
            rows["to use"] = planned.others
        rows["in all"] = planned.total
        cells = [
            (shortened(name), counted(each, "training"), counted(each * planned.epochs, "epoch"))
            for name, each in rows.items()
        ]
        names, trainings, epochs = (max(map(len, column)) for column in zip(*cells, strict=True))
        for name, training, epoch in cells:
            yield f"{name:{names}s}  {training:>{trainings}s}  {epoch:>{epochs}s}"
        if seconds is not None:
            yield f"takes about {clock(seconds)}, if no training is known already"

    def expected_seconds(self, rate: float) -> float | None:
        """Return how long all takes at so many images a second; None if the rate is 0: unknown."""
        images = self.total * self.planned.epochs * self.planned.images
        return images / rate if rate else None

    def begin(self, num_before: int) -> None:
        """Note that a stage begins, some of whose trials ended before."""
        self.done += num_before

    def count(self, *, reused: bool = False) -> None:
        """Count a training that ended."""
        self.done += 1
        self._counted += not reused

    def seconds_left(self) -> float | None:
        """Return the time left; None if this process has made no training yet."""
        if not self._counted:
            return None
        each = (time.monotonic() - self._start) / self._counted
        return each * max(0, self.total - self.done)

    def place(self) -> str:
        """Return how much of the work is done, and the time left, as text."""
        seconds = self.seconds_left()
        left = "" if seconds is None else f", {clock(seconds)} left"
        return f"{self.done} of {self.total}{left}"
