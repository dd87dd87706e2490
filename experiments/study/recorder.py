"""A sweep's records in MLflow: runs with params, metrics, tags and models."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.images import IMAGE_SIZE
from experiments.engine.base import EpochEnded, JobEnded
from experiments.interrupts import Interrupts
from experiments.study.events import TrialEnded, TrialStarted
from experiments.study.identity import differences, digest_of_network, training_digest
from experiments.study.models import Models
from experiments.study.parameters import run_name
from experiments.study.parent import ENDED, Parent, WriteReport
from experiments.study.reuse import KEY, FinishedTraining, find_finished, training_key
from experiments.study.settings import Settings
from experiments.study.storage import last_reported_epoch, set_once
from experiments.study.summary import Summary, study_view
from tracking.views import View, runs_link

# MLflow takes a second to import: the workers start first.
if TYPE_CHECKING:
    from tracking.runs import Run
    from tracking.tracker import Tracker

RETRIES = 1  # how often a failed trial is retried, on a fresh worker

OBJECTIVE = "val/accuracy"

EARLIER_NAMES = {
    "train/learning_rate": "learning_rate",
    "worker/epoch_seconds": "time/epoch_seconds",
    "worker/images_per_second": "time/images_per_second",
}
"""Names that earlier versions gave to metrics. A trial that was resumed since may have both."""

OPTIONS_FILE = "study.toml"
"""The artifact with the options of a command, for `--config`."""


def open_tracker(settings: Settings, should_stop: Callable[[], bool]) -> Tracker:
    """Open MLflow's experiment; `should_stop` is asked while the server is away."""
    from tracking.retries import RetryPolicy
    from tracking.tracker import Tracker

    retries = RetryPolicy(seconds=settings.tracking_timeout, should_stop=should_stop)
    return Tracker.open(settings.experiment, retries=retries)


def show(tracker: Tracker, view: View) -> tuple[str, tuple[str, ...]]:
    """Store a view of runs in MLflow; return the link to the runs, and a note if it failed."""
    page, problem = tracker.show(view)
    if problem:
        return page, (f"MLflow can't keep the view {view.name!r}: {problem}",)
    return page, ()


class Recorder:
    """Opens the runs of a sweep, and records their params, tags and models.

    For `made_with` and `provenance` of this process, see `identity`; for the workers' `arithmetic`,
    `WorkerPool`.
    """

    def __init__(
        self,
        tracker: Tracker,
        study: Study,
        settings: Settings,
        data: Dataset,
        *,
        made_with: Mapping[str, Any],
        provenance: Mapping[str, str],
        arithmetic: Mapping[str, str],
    ) -> None:
        self.tracker, self.study, self.settings, self.data = tracker, study, settings, data
        self.made_with, self.provenance, self.arithmetic = made_with, provenance, arithmetic
        self.models = Models(data)
        self._parent: Run | None = None
        self._page: Parent | None = None
        self.runs_page = ""
        """The address of the list of the runs, after that of the server."""
        self.notes: tuple[str, ...] = ()
        """Notes for the user, a line each."""
        self._space = settings.space()

    def open_parent(self, under: str | None) -> Run:
        """Open and return the parent of the trials' runs: the study's own run, if it has one.

        Args:
            under: the id of the run that is the parent's parent, if any.
        """
        study, tags = self.study, self.settings.tags
        own = {"study": study.study_name, "study_id": study.user_attrs["id"], "role": "sweep"}
        earlier = study.user_attrs.get("parent_run_id")
        whole = tags.get("comparison")
        name = f"sweep {study.study_name}"
        if whole is not None:
            name = study.study_name.removeprefix(f"{whole}/").replace("/", " ")
        parent = self.tracker.parent_run(name, tags={**tags, **own}, earlier=earlier, under=under)
        self._parent = parent  # `end_parent` ends it, even after an error here
        if earlier is None and parent.run_id != os.environ.get("MLFLOW_RUN_ID"):
            first = set_once(study, "parent_run_id", parent.run_id)
            if first != parent.run_id and (run := self.tracker.find_run(first)) is not None:
                parent.delete()  # another process made one at the same time
                self._parent = parent = run
        else:
            study.set_user_attr("parent_run_id", parent.run_id)
        # Not under the flags' names: `mlflow run` has recorded those, quoted for a shell.
        fingerprint = self.settings.fingerprint(self.data)
        network = {"network_digest": str(self.made_with["network"])}
        parent.log_params({f"sweep/{k}": v for k, v in {**fingerprint, **network}.items()})
        parent.set_tags(provenance_tags(self.provenance))
        log_data(parent, self.data)
        if self.settings.options:
            parent.log_text(self.settings.options, OPTIONS_FILE)
        # An artifact store that refuses files is noticed now, not at the first model.
        parent.log_text(json.dumps({**fingerprint, **self.made_with}, indent=2), "settings.json")
        set_once(study, "made_with", self.made_with)
        if changes := differences(set_once(study, "environment", self.provenance), self.provenance):
            self.notes += (f"this study was begun with another environment: {changes}",)
        self.runs_page = runs_link(self.tracker.experiment_id)
        if whole is None:  # else the comparison has the answer
            self._open_page(parent)
        return parent

    def _open_page(self, parent: Run) -> None:
        view = study_view(self.study.study_name, self.study.user_attrs["id"], self.settings)
        self.runs_page, notes = show(self.tracker, view)
        self.notes += notes
        summary = Summary(
            study=self.study.study_name,
            settings=self.settings,
            data=self.data,
            experiment_id=parent.experiment_id,
            run_id=parent.run_id,
            all_trials=self.runs_page,
        )
        self._page = Parent(parent, self.study, summary)
        self._page.update_if_due()
        if self._page.problem:
            self.notes += (f"MLflow can't keep the sweep's description: {self._page.problem}",)

    def update_parent(self) -> None:
        """Write on the parent's page what has changed, if it is due."""
        if self._page is not None:
            self._page.update_if_due()

    def store_report(self, write: WriteReport | None, outcome: str) -> tuple[str, ...]:
        """Store the report of a complete sweep in the parent; return a note if that failed."""
        if self._page is None or write is None or outcome != "complete":
            return ()
        problem = self._page.store_report(write)
        return (problem,) if problem else ()

    def end_parent(self, outcome: str, *, reason: str) -> None:
        """End the parent, if it was opened."""
        if self._parent is not None:
            self._parent.end(outcome, reason=reason)
        if self._page is not None:
            self._page.update(ENDED[outcome] + (f" {reason}" if reason else ""))

    @property
    def parent(self) -> Run:
        """The parent of the trials' runs."""
        assert self._parent is not None
        return self._parent

    def open_run(self, trial: Trial, config: TrainConfig) -> Run:
        """Open a run for a new trial."""
        name = run_name(trial.number, self._space.varied(config))
        tags = self._tags(trial.number) | provenance_tags(self.provenance, self.arithmetic)
        tags[KEY] = self._key(config)
        run = self.tracker.start_run(name, tags=tags, parent=self.parent)
        trial.set_user_attr("run_id", run.run_id)
        log_config(run, config, self.data)
        log_data(run, self.data)
        return run

    def reopen_run(self, trial: Trial, config: TrainConfig) -> Run:
        """Reopen the run of a resumed trial, or open a new one if it has none."""
        run = self.find_run(trial)
        if run is None:
            return self.open_run(trial, config)
        run.reopen(tags=self.tracker.process_tags)
        if run.tags().get(KEY) != self._key(config):  # its epochs have several environments
            run.set_tags({KEY: ""})
        trial.set_user_attr("run_id", run.run_id)
        # The process that opened it may have died before these steps.
        if not run.params():
            log_config(run, config, self.data)
        log_data(run, self.data)
        return run

    def find_run(self, trial: Trial | FrozenTrial) -> Run | None:
        """Return the run of a trial, even if its process died before it stored the run's id."""
        if run_id := trial.user_attrs.get("run_id"):
            return self.tracker.find_run(run_id)
        return self.tracker.find_tagged(self._tags(trial.number))

    def find_finished(self, config: TrainConfig) -> FinishedTraining | None:
        """Return a finished training with the same results as this configuration would have."""
        return find_finished(self.tracker, self._key(config))

    def _key(self, config: TrainConfig) -> str:
        return training_key(config, self.data, self.provenance, self.arithmetic)

    def _tags(self, number: int) -> dict[str, str]:
        # With the study's id: a deleted study may have had the same name.
        study = {"study": self.study.study_name, "study_id": self.study.user_attrs["id"]}
        return {**self.settings.tags, **study, "trial": str(number), "role": "trial"}

    def warm_up_export(self, config: TrainConfig, interrupts: Interrupts) -> None:
        """Export a model once, while the workers train: see `Models.warm_up`."""
        self.models.warm_up(config, interrupts)

    def record_model(self, running: RunningTrial, event: JobEnded) -> None:
        """Record the model of a trial that has ended."""
        about = {"study": self.study.study_name, "trial": running.trial.number}
        config, step = running.config, running.epochs
        self.models.record(running.run, config, event.weights, step=step, about=about)


class RunningTrial:
    """A running trial: its Optuna trial, its run, and its results so far."""

    def __init__(self, trial: Trial, config: TrainConfig, run: Run, *, is_new: bool) -> None:
        self.trial, self.config, self.run = trial, config, run
        self.start = time.monotonic()
        self.epochs = 0
        self.accuracy: float | None = None
        self.val_loss: float | None = None
        self.diverged = False
        # An earlier process has recorded these epochs of a resumed trial. Training repeats them
        # bit for bit, so they are not recorded again.
        self.recorded = 0 if is_new else run.last_step(OBJECTIVE)
        self.reported = 0 if is_new else last_reported_epoch(trial)
        self.resumed_after = None if is_new else self.reported

    def started(self) -> TrialStarted:
        """Return the event of the trial's start."""
        return TrialStarted(
            trial=self.trial.number,
            run_id=self.run.run_id,
            config=self.config,
            resumed_after=self.resumed_after,
        )

    def record(self, event: EpochEnded) -> None:
        """Record an epoch in MLflow and Optuna, unless an earlier process did."""
        self.epochs, self.diverged = event.number, event.diverged
        self.accuracy, self.val_loss = event.metrics[OBJECTIVE], event.metrics["val/loss"]
        if event.number > self.recorded:
            self.run.log_metrics(event.metrics, step=event.number)
            self.recorded = event.number
        if event.number > self.reported:
            self.trial.report(self.accuracy, event.number)
            self.reported = event.number

    def may_be_retried(self) -> bool:
        """Count a failure, and return whether to retry: its cause may be the worker."""
        failures = self.trial.user_attrs.get("failures", 0) + 1
        self.trial.set_user_attr("failures", failures)
        return bool(failures <= RETRIES)

    def ended(self, outcome: str, reason: str) -> TrialEnded:
        """Return the event of the trial's end."""
        return TrialEnded(
            trial=self.trial.number,
            outcome=outcome,
            accuracy=self.accuracy,
            epochs=self.epochs,
            seconds=time.monotonic() - self.start,
            reason=reason,
        )


def log_config(run: Run, config: TrainConfig, data: Dataset) -> None:
    """Log all that a training depends on as params of its run."""
    run.log_params(
        {
            **config.as_params(),
            "dataset": data.name,
            "dataset_digest": data.digest,
            **_image_size(data),
            "network_digest": digest_of_network(config.network, data),
            "training_digest": training_digest(config.loss, config.optimizer, config.schedule),
        }
    )


def provenance_tags(
    provenance: Mapping[str, str], arithmetic: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return code, versions and the workers' arithmetic as tags of a run."""
    names = ("commit", "uncommitted", "source", "python", "torch")
    tags = {f"code.{name}": provenance[name] for name in names}
    return tags | {f"worker.{name}": value for name, value in (arithmetic or {}).items()}


def _image_size(data: Dataset) -> dict[str, int]:
    """Return the images' size, where it is not that of all earlier runs."""
    return {} if data.image_size == IMAGE_SIZE else {"image_size": data.image_size}


def log_data(run: Run, data: Dataset) -> None:
    """Log the data set of a run."""
    run.log_dataset(
        name=data.name,
        digest=data.digest,
        source=data.source,
        profile={
            "classes": len(data.classes),
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        context="training",
    )
