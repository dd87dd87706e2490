"""What a comparison shows while it runs: its cost, its stages with their trials, tested models."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from typing import Self

from cnn.data import Dataset
from experiments.comparison.plan import (
    ComparisonEnded,
    Event,
    ModelTested,
    Plan,
    Planned,
    StageStarted,
)
from experiments.comparison.workload import Workload, measure_rate
from experiments.study.events import SweepStarted
from experiments.study.output import Display, Mode, Output
from tracking.wording import percent, wrapped


class ComparisonDisplay(AbstractContextManager["ComparisonDisplay"]):
    """Shows the events of a comparison, in a `with` block."""

    def __init__(self, output: Output, plan: Plan, data: Dataset) -> None:
        self.output, self.plan, self.data = output, plan, data
        self._workload: Workload | None = None
        self._stage = ExitStack()
        self._sweep: Display | None = None
        self._title = ""
        self._trials = 0  # of the stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stage.close()

    def show(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Planned():
                self._show_work(event)
            case StageStarted():
                self._begin_stage(event)
            case ModelTested():
                self._say(f"  {event.loss}, seed {event.seed}: {percent(event.accuracy)}")
                self.output.record(
                    "model_tested",
                    loss=event.loss,
                    seed=event.seed,
                    test_accuracy=event.accuracy,
                )
            case ComparisonEnded():
                self._stage.close()
                self.output.record("comparison_ended", outcome=event.outcome, reason=event.reason)
            case SweepStarted() if self._is_silent(event):
                assert self._workload is not None
                self._workload.begin(event.num_before)
            case _:
                assert self._workload is not None
                assert self._sweep is not None
                if isinstance(event, SweepStarted):
                    self._say(f"\n{self._title} · {self._workload.place()}")
                self._sweep.show(event)

    def _is_silent(self, event: SweepStarted) -> bool:
        """Return whether a stage has nothing left to do, of which people need not hear."""
        return event.num_before >= self._trials and self.output.mode != Mode.JSON

    def _show_work(self, planned: Planned) -> None:
        """Say how much work the comparison is."""
        self._workload = workload = Workload(planned)
        seconds = None
        if self.output.mode != Mode.QUIET:
            rate = self.plan.settings.workers * measure_rate(self.plan.settings, self.data)
            seconds = workload.expected_seconds(rate)
        self._say("\n".join(workload.lines(seconds)))
        self.output.record(
            "comparison_planned", **asdict(planned), total=planned.total, expected_seconds=seconds
        )

    def _begin_stage(self, event: StageStarted) -> None:
        self._stage.close()
        self._title = event.title
        workload, settings = self._workload, event.settings
        assert workload is not None
        self.output.record(
            "stage_started", title=event.title, done=workload.done, total=workload.total
        )
        if settings is None:
            self._say(f"\n{event.title}")
        else:
            self._trials = settings.trials
            self._sweep = self._stage.enter_context(self.output.display(settings, workload))

    def _say(self, text: str) -> None:
        """Print lines, unless only the result is wanted."""
        if self.output.mode in (Mode.LIVE, Mode.PLAIN):
            print(wrapped(text, self.output.width), flush=True)
