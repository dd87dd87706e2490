"""The progress of a sweep: a line for each trial that ended, and live lines for running trials."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from importlib.util import find_spec
from operator import itemgetter
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cnn.config import TrainConfig
from experiments.study.events import (
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialNote,
    TrialProgressed,
    TrialReused,
    TrialStarted,
)
from experiments.study.parameters import BY_NAME
from experiments.study.settings import Settings


class Display(AbstractContextManager["Display"]):
    """Show a sweep's events: on a terminal with a live line for each running trial."""

    def __init__(
        self,
        settings: Settings,
        console: Console | None = None,
        *,
        workload: WholeWork | None = None,
    ) -> None:
        self.settings = settings
        self.workload = workload
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[accuracy]}"),
            console=self.console,
            transient=True,
            disable=not _is_live(self.console),
        )
        self.space = settings.space()
        self.tasks: dict[int, TaskID] = {}
        self.configs: dict[int, TrainConfig] = {}
        self.best: tuple[float, int] | None = None
        self.num_ended = 0
        self.num_epochs = 0
        self.num_before = 0
        self.start = time.monotonic()

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: SweepEvent) -> None:
        """Show an event."""
        match event:
            case SweepStarted():
                if self.workload is not None:
                    self.workload.begin(event.num_before)
                self._show_start(event)
            case TrialStarted():
                self.configs[event.trial] = event.config
                self.tasks[event.trial] = self.progress.add_task(
                    self._description(event.trial, event.config),
                    total=event.config.epochs,
                    accuracy="",
                )
            case TrialProgressed():
                self.num_epochs += 1
                accuracy = f"epoch {event.number}  {event.metrics['val/accuracy']:7.2%}"
                self.progress.update(
                    self.tasks[event.trial],
                    completed=event.number,
                    accuracy=f"{accuracy}   {self._outlook()}",
                )
            case TrialNote():
                description = self._description(event.trial, self.configs[event.trial])
                self.console.print(f"{description}  {event.text}", markup=False)
            case TrialReused():
                self._count(event.outcome, event.accuracy, event.trial, reused=True)
                self.console.print(
                    f"{self._description(event.trial, event.config)}  {event.outcome:11s} "
                    f"{event.accuracy:7.2%} reused, not trained again",
                    markup=False,
                )
            case TrialEnded():
                self._show_end(event)

    def _show_start(self, event: SweepStarted) -> None:
        self.num_before, self.best = event.num_before, event.best_before
        already = f", {event.num_before} already finished" if event.num_before else ""
        workers = f"{self.settings.workers} worker{'s' * (self.settings.workers > 1)}"
        self.console.print(
            f"study {event.study}: {self.settings.trials} trials of {self.settings.epochs} "
            f"epochs{already}; {workers}; MLflow experiment {event.experiment}",
            markup=False,
        )
        if self.settings.patience:
            self.console.print(
                f"ends early if the best accuracy gains no more than "
                f"{100 * self.settings.min_delta:g} points in {self.settings.patience} trials",
                markup=False,
            )
        for note in event.notes:
            self.console.print(f"note: {note}", markup=False)
        if event.num_before >= self.settings.trials:
            self.console.print("nothing is left to do: --trials is the total")

    def _show_end(self, event: TrialEnded) -> None:
        self.progress.remove_task(self.tasks.pop(event.trial))
        config = self.configs.pop(event.trial)
        self._count(event.outcome, event.accuracy, event.trial)
        accuracy = "      –" if event.accuracy is None else f"{event.accuracy:7.2%}"
        reason = f"   {event.reason}" if event.reason else ""
        self.console.print(
            f"{self._description(event.trial, config)}  {event.outcome:11s} {accuracy} "
            f"{event.epochs:3d} epochs {event.seconds:6.1f} s   {self._outlook()}{reason}",
            markup=False,
        )

    def _count(
        self, outcome: str, accuracy: float | None, trial: int, *, reused: bool = False
    ) -> None:
        self.num_ended += 1
        if self.workload is not None:
            self.workload.count(reused=reused)
        if outcome == "complete" and accuracy is not None:
            best = (accuracy, trial)
            self.best = max(self.best or best, best, key=itemgetter(0))

    def _description(self, trial: int, config: TrainConfig) -> str:
        parts = [f"{trial:4d} "]
        values = self.space.varied(config)
        for parameter in (BY_NAME[name] for name in self.settings.search):
            label = f"{parameter.short} " if parameter.short else ""
            value = parameter.text(values.get(parameter.name))
            parts.append(f"{label}{value:{parameter.width}s}")
        return " ".join(parts)

    def _outlook(self) -> str:
        if self.workload is not None:
            return self.workload.place()
        best = "" if self.best is None else f"best {self.best[0]:.2%} (trial {self.best[1]})"
        left = self._seconds_left()
        time_left = "" if left is None else f"  {clock(left)} left"
        return f"{best}{time_left}"

    def _seconds_left(self) -> float | None:
        """Estimate the time left from the trials that ended, or else from the epochs."""
        elapsed = time.monotonic() - self.start
        wanted = self.settings.trials - self.num_before
        if self.num_ended:
            return elapsed / self.num_ended * (wanted - self.num_ended)
        if self.num_epochs:
            return elapsed / self.num_epochs * (wanted * self.settings.epochs - self.num_epochs)
        return None


class WholeWork(Protocol):
    """The work that a sweep is a part of."""

    def begin(self, num_before: int) -> None:
        """Note that a part begins, some of whose trials ended before."""

    def count(self, *, reused: bool = False) -> None:
        """Count a trial that ended."""

    def place(self) -> str:
        """Return how much of the work is done, and the time left, as text."""


def _is_live(console: Console) -> bool:
    """Return whether lines can change: on a terminal, or in a notebook that has widgets."""
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None  # without it, rich warns
    return console.is_terminal


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
