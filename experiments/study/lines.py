"""The events of a sweep as lines: plain ones, those on problems alone, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Self

from experiments.study.events import (
    BestRegistered,
    SweepEnded,
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialNote,
    TrialProgressed,
    TrialReused,
    TrialStarted,
)
from experiments.study.progress import Row, SweepProgress, WholeWork, how_they_resume
from experiments.study.rows import Rows
from experiments.study.settings import Settings
from tracking.text import printable
from tracking.wording import counted


class _Lines:
    """Shows a sweep's events in lines; the way in which lines appear is that of a subclass."""

    def __init__(self, settings: Settings, whole: WholeWork | None = None) -> None:
        self.settings = settings
        self.progress = SweepProgress(settings, whole)
        self.rows = rows_of(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class PlainLines(_Lines):
    """A line on standard output for each event that a log should have."""

    def show(self, event: SweepEvent) -> None:
        """Print an event."""
        row = self.progress.follow(event)
        match event:
            case SweepStarted():
                for line in introduction(self.settings, event, self.progress.whole):
                    print(line, flush=True)
            case TrialNote():
                print(note(event), flush=True)
            case TrialReused() | TrialEnded() if row is not None:
                width = len(str(self.progress.total))
                place = f"{self.progress.done:{width}d}/{self.progress.total}"
                print(f"{place}  trial {_line(self.rows, row)}", flush=True)


class ProblemLines(_Lines):
    """A line on standard error for each note and each failed trial."""

    def show(self, event: SweepEvent) -> None:
        """Print an event that is a problem."""
        match event:
            case SweepStarted():
                for text in event.notes:
                    print(f"note: {printable(text)}", file=sys.stderr, flush=True)
            case TrialNote():
                print(note(event), file=sys.stderr, flush=True)
            case TrialEnded(outcome="failed"):
                line = f"trial {event.trial} failed: {printable(event.reason)}"
                print(line, file=sys.stderr, flush=True)


class JsonLines(_Lines):
    """A JSON object for each event: `docs/reference/output.md` has the fields."""

    def __init__(
        self, settings: Settings, whole: WholeWork | None, record: Callable[..., None]
    ) -> None:
        super().__init__(settings, whole)
        self.record = record
        self.study = ""

    def show(self, event: SweepEvent) -> None:
        """Record an event."""
        self.progress.follow(event)
        if isinstance(event, SweepStarted):
            self.study = event.study
        name, fields = _as_json(event, self.settings)
        match event:
            case TrialEnded() | TrialReused():
                fields |= {
                    "done": self.progress.done,
                    "total": self.progress.total,
                    "seconds_left": self.progress.seconds_left(),
                }
        self.record(name, study=self.study, **fields)


def _as_json(event: SweepEvent, settings: Settings) -> tuple[str, dict[str, Any]]:
    """Return the name of an event, and its fields."""
    match event:
        case SweepStarted():
            return "sweep_started", {
                "experiment": event.experiment,
                "experiment_id": event.experiment_id,
                "run_id": event.parent_run_id,
                "trials": settings.trials,
                "epochs": settings.epochs,
                "workers": settings.workers,
                "finished": event.num_before,
                "unfinished": event.unfinished,
                "notes": event.notes,
            }
        case TrialStarted():
            return "trial_started", {
                "trial": event.trial,
                "run_id": event.run_id,
                "config": event.config.as_params(),
                "resumed_after": event.resumed_after,
            }
        case TrialProgressed():
            return "epoch_ended", {
                "trial": event.trial,
                "epoch": event.number,
                "metrics": event.metrics,
            }
        case TrialNote():
            return "trial_note", {"trial": event.trial, "text": event.text}
        case TrialReused():
            return "trial_reused", {
                "trial": event.trial,
                "run_id": event.run_id,
                "config": event.config.as_params(),
                "outcome": event.outcome,
                "val_accuracy": event.accuracy,
            }
        case TrialEnded():
            return "trial_ended", {
                "trial": event.trial,
                "outcome": event.outcome,
                "val_accuracy": event.accuracy,
                "epochs": event.epochs,
                "seconds": event.seconds,
                "reason": event.reason,
            }
        case BestRegistered():
            return "best_registered", {"text": event.report}
        case SweepEnded():
            return "sweep_ended", {
                "outcome": event.outcome,
                "reason": event.reason,
                "finished": None if event.trials is None else len(event.trials),
            }


def rows_of(settings: Settings) -> Rows:
    """Return the rows of a sweep with these settings."""
    return Rows(
        settings.search, settings.configurations, trials=settings.trials, epochs=settings.epochs
    )


def print_rows(settings: Settings, rows: Sequence[Row]) -> None:
    """Print rows of trials."""
    arranged = rows_of(settings)
    for row in rows:
        print(_line(arranged, row), flush=True)


def _line(arranged: Rows, row: Row) -> str:
    (cells,) = arranged.lines(row)
    return "".join(cell.text for cell in cells).rstrip()


def introduction(settings: Settings, event: SweepStarted, whole: WholeWork | None) -> list[str]:
    """Return what is said of a sweep at its start, a line each; a part of a whole says less."""
    already = f", {event.num_before} already finished" if event.num_before else ""
    of_this_process = (
        f"; {counted(settings.workers, 'worker')}; MLflow experiment {printable(event.experiment)}"
    )
    lines = [
        f"study {printable(event.study)}: {counted(settings.trials, 'trial')} of "
        f"{counted(settings.epochs, 'epoch')}{already}{of_this_process if whole is None else ''}"
    ]
    if event.unfinished:
        lines.append(how_they_resume(event.unfinished))
    if settings.patience:
        lines.append(
            f"ends early if the best accuracy gains no more than {100 * settings.min_delta:g} "
            f"points in {counted(settings.patience, 'trial')}"
        )
    lines += [f"note: {printable(text)}" for text in event.notes]
    if event.num_before >= settings.trials:
        lines.append("nothing is left to do: --trials is the total")
    return lines


def note(event: TrialNote) -> str:
    """Return a note on a trial as a line."""
    return f"note: trial {event.trial} {printable(event.text)}"
