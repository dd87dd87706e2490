"""What is known of a running sweep: its running trials, how many ended, the best, the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

from experiments.study.events import (
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialProgressed,
    TrialReused,
    TrialStarted,
)
from experiments.study.settings import Settings


@dataclass(kw_only=True)
class Row:
    """What is shown of a trial."""

    trial: int
    values: Mapping[str, Any]  # what is searched, by the names of parameters; and the seed
    epochs_planned: int
    outcome: str = ""  # empty while it runs
    accuracies: dict[int, float] = field(default_factory=dict)  # by epoch
    accuracy: float | None = None  # the last one, if there is one
    epochs: int = 0  # how many have ended
    seconds: float | None = None  # how long it took, once it has ended
    note: str = ""
    is_best: bool = False  # whether it has the best accuracy of all complete trials so far


class WholeWork(Protocol):
    """The work that a sweep is a part of."""

    done: int
    """Its trainings that have ended."""

    @property
    def total(self) -> int:
        """All of its trainings."""

    def begin(self, num_before: int) -> None:
        """Note that a part begins, some of whose trials ended before."""

    def count(self, *, reused: bool = False) -> None:
        """Count a trial that ended."""

    def seconds_left(self) -> float | None:
        """Return the time left, None if it is unknown."""


class SweepProgress:
    """Follows the events of a sweep.

    If the sweep is a part of a `whole`, all counts and the time left are those of the whole.
    """

    def __init__(self, settings: Settings, whole: WholeWork | None = None) -> None:
        self.settings, self.whole = settings, whole
        self.space = settings.space()
        self.running: dict[int, Row] = {}
        self.best: tuple[float, int] | None = None  # accuracy and number of the best trial
        self._num_before = 0
        self._ended: list[int] = []  # the epochs of each trial that ended
        self._num_epochs = 0  # epochs that were trained since the start
        self._resumed_after: dict[int, int] = {}
        self._start = time.monotonic()

    def follow(self, event: SweepEvent) -> Row | None:
        """Take note of an event, and return the row of a trial that ended."""
        match event:
            case SweepStarted():
                self._num_before, self.best = event.num_before, event.best_before
                if self.whole is not None:
                    self.whole.begin(event.num_before)
            case TrialStarted():
                self.running[event.trial] = self._begun(event)
            case TrialProgressed():
                row, accuracy = self.running[event.trial], event.metrics["val/accuracy"]
                row.epochs, row.accuracy = event.number, accuracy
                if math.isfinite(accuracy):
                    row.accuracies[event.number] = accuracy
                # The epochs before a resumption come again, in no time.
                self._num_epochs += event.number > self._resumed_after.get(event.trial, 0)
            case TrialReused():
                row = Row(
                    trial=event.trial,
                    values=self.space.varied(event.config),
                    epochs_planned=event.config.epochs,
                    accuracy=event.accuracy,
                    epochs=event.config.epochs,
                    note="reused, not trained again",
                )
                return self._ended_as(row, event.outcome, reused=True)
            case TrialEnded():
                row = self.running.pop(event.trial)
                row.accuracy, row.epochs = event.accuracy, event.epochs
                row.seconds = event.seconds
                row.note = ", ".join(filter(None, (event.reason, row.note)))
                return self._ended_as(row, event.outcome)
        return None

    @property
    def done(self) -> int:
        """How many trials have ended, in earlier processes as well."""
        return self._num_before + len(self._ended) if self.whole is None else self.whole.done

    @property
    def total(self) -> int:
        """How many trials there are in all."""
        if self.whole is not None:
            return self.whole.total
        return max(self.settings.trials, self.done)

    def seconds_left(self) -> float | None:
        """Estimate the time left from the epochs that were trained; None if there are none."""
        if self.whole is not None:
            return self.whole.seconds_left()
        if not self._num_epochs:
            return None
        elapsed = time.monotonic() - self._start
        # A pruned trial has fewer epochs: those to come are taken as those that ended.
        mean = sum(self._ended) / len(self._ended) if self._ended else self.settings.epochs
        to_come = self.total - self.done - len(self.running)
        left = to_come * mean + sum(max(0, mean - row.epochs) for row in self.running.values())
        return elapsed / self._num_epochs * left

    def _begun(self, event: TrialStarted) -> Row:
        note, before = "", event.resumed_after
        if before is not None:
            self._resumed_after[event.trial] = before
            note = f"resumed after epoch {before}" if before else "started again"
        return Row(
            trial=event.trial,
            values=self.space.varied(event.config),
            epochs_planned=event.config.epochs,
            note=note,
        )

    def _ended_as(self, row: Row, outcome: str, *, reused: bool = False) -> Row:
        row.outcome = outcome
        if outcome != "interrupted":
            self._ended.append(row.epochs)
            if self.whole is not None:
                self.whole.count(reused=reused)
        if outcome == "complete" and row.accuracy is not None:
            found = (row.accuracy, row.trial)
            self.best = max(self.best or found, found, key=itemgetter(0))
            row.is_best = self.best == found
        return row


def how_they_resume(unfinished: Mapping[int, int]) -> str:
    """Return in words how trials resume: see `SweepStarted.unfinished`."""
    return "; ".join(
        f"trial {trial} resumes after epoch {epochs}" if epochs else f"trial {trial} starts again"
        for trial, epochs in unfinished.items()
    )


def sparkline(accuracies: Sequence[float], width: int) -> str:
    """Return accuracies as bars, from 0 to 100 %; of more than `width`, evenly spread ones."""
    blocks = "▁▂▃▄▅▆▇█"
    if len(accuracies) > width:
        step = (len(accuracies) - 1) / max(1, width - 1)
        accuracies = [accuracies[round(-1 - i * step)] for i in reversed(range(width))]
    return "".join(blocks[min(7, int(8 * each))] for each in accuracies)
