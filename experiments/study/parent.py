"""The run of a sweep, the parent of its trials' runs: what its page says while the sweep runs."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from optuna.study import Study

from experiments.study.storage import recording_errors
from experiments.study.summary import BEST_TAG, FIRST_WORDS, Summary
from experiments.study.trials import best_so_far, num_finished, trials_table
from tracking.errors import is_transient, one_line, refusals_ignored

# MLflow takes a second to import: the workers start first.
if TYPE_CHECKING:
    import pandas as pd

    from tracking.runs import Run

BEST_METRIC = "best/val_accuracy"
"""The best accuracy of the first n trials that ended; the step is n."""

REPORT_TAG = "report.trials"
"""How many trials had ended when the report was stored."""

RUNNING = "The sweep is running."
ENDED = {
    "complete": "The sweep is complete.",
    "interrupted": "The sweep was interrupted: the same command continues it.",
    "failed": "The sweep failed.",
}
"""What the sweep does, by its outcome."""

INTERVAL_SECONDS = 5.0
SHARE_OF_TIME = 0.01
"""Of the driver, at most: with thousands of trials, updates are less frequent."""

_NOTE = "mlflow.note.content"

WriteReport = Callable[[Study, Path], object]
"""Writes the report of a study to a new folder."""


class Parent:
    """Keeps metric, tags and description of a sweep's run up to date.

    All of it follows from the study. So a start after a kill repairs it, and several processes with
    one study write the same. A description that a user wrote stays as it is.
    """

    def __init__(self, run: Run, study: Study, summary: Summary) -> None:
        self.run, self.study, self.summary = run, study, summary
        self.last_step = run.last_step(BEST_METRIC)
        before = run.tags()
        note = before.get(_NOTE, "")
        self.has_note = not note or note.startswith(FIRST_WORDS)
        self.reported = before.get(REPORT_TAG, "")
        self.written: dict[str, str] = {}
        self.marked = self._find_marked()
        self.due = 0.0
        self.problem = ""
        """Why the page can't be written."""

    def update_if_due(self) -> None:
        """Write what has changed, at most every few seconds."""
        if time.monotonic() >= self.due:
            self.update(RUNNING)

    def update(self, state: str) -> None:
        """Write what has changed; `state` says what the sweep does."""
        start = time.monotonic()
        trials = trials_table(self.study)
        tags = self._best(trials)
        if self.has_note:
            tags[_NOTE] = self.summary.text(trials, state, has_report=bool(self.reported))
        changed = {key: value for key, value in tags.items() if self.written.get(key) != value}
        points = [each for each in best_so_far(self.study) if each[0] > self.last_step]
        if changed or points:
            try:
                self.run.log_history(BEST_METRIC, points, changed)
            except recording_errors() as error:
                if is_transient(error):
                    raise
                self.problem, self.due = one_line(error), math.inf
                return
            self._mark(tags.get(f"{BEST_TAG}.run_id"))
            self.written |= changed
            self.last_step = points[-1][0] if points else self.last_step
        now = time.monotonic()
        self.due = now + max(INTERVAL_SECONDS, (now - start) / SHARE_OF_TIME)

    def store_report(self, write: WriteReport) -> str:
        """Store the report, unless it is there; return a note if that failed."""
        ended = str(num_finished(self.study))
        if self.reported == ended:
            return ""
        try:
            with TemporaryDirectory() as scratch:
                folder = Path(scratch, "report")
                write(self.study, folder)
                self.run.log_folder(folder, "report")
            self.run.set_tags({REPORT_TAG: ended})
        except Exception as error:
            # The results are recorded: whatever is wrong with a figure, the sweep is complete.
            name = self.study.study_name
            return (
                f"the report is not stored in MLflow: {type(error).__name__}: {one_line(error)}; "
                f"python -m experiments.report {shlex.quote(name)} writes it"
            )
        self.reported = ended
        return ""

    def _best(self, trials: pd.DataFrame) -> dict[str, str]:
        """Return number, run and configuration of the best complete trial as tags."""
        complete = trials[trials["outcome"] == "complete"]
        if not len(complete):
            return {}
        best = complete.iloc[0]
        params = self.study.get_trials(deepcopy=False)[best["trial"]].params
        values = {name: params.get(name, "–") for name in self.summary.settings.search}
        values |= {"trial": best["trial"], "run_id": best["run_id"]}
        return {f"{BEST_TAG}.{name}": str(value) for name, value in values.items()}

    def _find_marked(self) -> set[str | None]:
        """Return the runs that have the tag of the best; a kill may leave two."""
        of_study = f"tags.study_id = '{self.study.user_attrs['id']}'"
        wanted = f"{of_study} and tags.{BEST_TAG} = 'yes'"
        found = self.run.client.search_runs([self.run.experiment_id], wanted)
        return {run.info.run_id for run in found}

    def _mark(self, best: str | None) -> None:
        """Tag the run of the best trial, and no other run."""
        client = self.run.client
        for run_id in {best} - self.marked - {None}:
            with refusals_ignored():  # the user may have deleted a run
                client.set_tag(run_id, BEST_TAG, "yes")
        for run_id in self.marked - {best}:
            with refusals_ignored():
                client.delete_tag(run_id, BEST_TAG)
        self.marked = {best} - {None}
