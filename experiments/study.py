"""One sweep: the Optuna study, the workers that train, and the runs in MLflow brought together.

`sweep()` is a generator of what happens: its caller shows it, and stops it by closing it. All
writing to Optuna and MLflow is done here, in one thread that asks, waits and tells.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.losses import PROBABILITIES, get_loss
from cnn.networks import CNN, Classifier
from cnn.training import check_batch_size
from experiments.engine.base import (
    CheckpointLost,
    EpochEnded,
    Event,
    JobEnded,
    JobFailed,
    JobMoved,
    WorkerPool,
)
from experiments.heartbeat import Heartbeat
from experiments.identity import check_same, differences, environment
from experiments.interrupts import InterruptionError, Interrupts
from experiments.ranking import best_first
from experiments.settings import Settings
from experiments.space import make_pruner
from experiments.storage import (
    agree,
    cause_of,
    check_storage,
    check_study_name,
    existing_name,
    held,
    load_or_create,
    open_storage,
    recording_errors,
    storage_errors,
    storage_patience,
)
from experiments.trial_cache import TrialCache
from tracking.errors import is_passing, one_line, refusal, without_passwords
from tracking.store import check_tracking, sqlite_file

# MLflow, a second to import, and its tables, another, can wait until the workers have begun.
if TYPE_CHECKING:
    from tracking.runs import Run
    from tracking.system_metrics import MachineLoad
    from tracking.tracker import Tracker

WAIT_SECONDS = 0.2
"""How long a wait for the workers may take before it is asked again whether to stop."""

HANDED_OUT_AT_ONCE = 16
"""Trials, before the driver does something else: with 1,000 idle workers it would for minutes."""

RETRIES = 1
"""How often a trial that failed is tried again, on a fresh worker."""

OBJECTIVE = "val/accuracy"
STATES = {
    "complete": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""What Optuna is told of each outcome."""

TRIALS_COLUMNS = [
    "trial",
    "outcome",
    "loss",
    "learning_rate",
    "batch_size",
    "epochs",
    "val_accuracy",
    "val_loss",
    "run_id",
]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, kw_only=True)
class SweepStarted:
    """The study is open."""

    study: str
    experiment: str
    experiment_id: str
    parent_run_id: str
    num_before: int
    """Trials that the study had finished already."""
    best_before: tuple[float, int] | None
    """Accuracy and number of the best complete one of them."""
    notes: tuple[str, ...] = ()
    """What people should know of it, a line each."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial was handed to a worker."""

    trial: int
    run_id: str
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrialProgressed:
    """A trial has an epoch more, and it is recorded."""

    trial: int
    number: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial is over, and recorded."""

    trial: int
    outcome: str
    """`complete`, `pruned`, `diverged`, `failed` or `interrupted`."""
    accuracy: float | None
    """The last validation accuracy, if there is one."""
    epochs: int
    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialMoved:
    """A trial lost its worker with the machine that it was on, and goes on elsewhere."""

    trial: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TrialUnprotected:
    """A trial has no checkpoint that can be used: it is trained for all that."""

    trial: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SweepEnded:
    """Nothing runs any more, and all is recorded."""

    outcome: str
    """`complete`; `interrupted`, which the same command continues; or `failed`."""
    reason: str
    trials: pd.DataFrame | None = field(default=None, compare=False)
    """What `trials_table` returns, if the storage could still be read."""


@dataclass(frozen=True, kw_only=True)
class BestRegistered:
    """The model of the best trial was offered to the model registry."""

    report: str
    """What came of it, in a line."""


SweepEvent = (
    SweepStarted
    | TrialStarted
    | TrialProgressed
    | TrialMoved
    | TrialUnprotected
    | TrialEnded
    | BestRegistered
    | SweepEnded
)


def sweep(
    settings: Settings,
    data: Dataset,
    pool: WorkerPool,
    interrupts: Interrupts | None = None,
    *,
    under: str | None = None,
    storage: TrialCache | None = None,
) -> Generator[SweepEvent]:
    """Bring a study to `settings.trials` trials, and yield what happens.

    Trials that an earlier process left unfinished are taken up again under their own numbers.
    However the iteration ends, no run stays RUNNING.

    Args:
        settings: what to do.
        data: the data set.
        pool: the workers, which have opened the same data; it is not closed.
        interrupts: asked several times a second; once true, what runs is closed as `interrupted`
            and the iteration ends.
        under: the run, by its id, that the sweep's own is part of, if it is of any.
        storage: that of the settings, where it is open already.

    Raises:
        ValueError: study, storage, tracking server or settings can't be used, in one line;
            `NotNowError`, if it is no fault of theirs.
        KeyboardInterrupt: there was a second signal, or a first before anything was recorded.
    """
    for batch_size in settings.batch_sizes:
        check_batch_size(batch_size, data)
    with ExitStack() as stack:
        interrupts = interrupts or Interrupts()
        if storage is None:  # else both databases have been looked at
            check_tracking()
        study = open_study(settings, data, interrupts, storage=storage)
        stack.enter_context(held(settings.storage, study.study_name))
        running = _Sweep(settings, study, pool, data, interrupts, under)
        stack.callback(running.close)
        try:
            running.begin()
            tracker, parent = running.connect()
        except InterruptionError:
            raise  # before it is asked what the others are: MLflow may be half imported
        except recording_errors() as error:
            raise refusal(one_line(cause_of(error)), error) from error
        yield SweepStarted(
            study=study.study_name,
            experiment=tracker.experiment,
            experiment_id=tracker.experiment_id,
            parent_run_id=parent.run_id,
            num_before=_num_finished(study),
            best_before=_best(study),
            notes=running.notes,
        )
        try:
            yield from running.events()
            yield from running.register()
        except recording_errors() as error:
            # What waiting does not mend is not told as what the same command continues.
            running.outcome = "interrupted" if is_passing(error) else "failed"
            running.reason = one_line(cause_of(error))
        yield from running.close()


class _Sweep:
    """The loop: hand out trials, take in events, record them."""

    def __init__(
        self,
        settings: Settings,
        study: Study,
        pool: WorkerPool,
        data: Dataset,
        interrupts: Interrupts,
        under: str | None,
    ) -> None:
        self.settings, self.study, self.under = settings, study, under
        self.pool, self.data, self.interrupts = pool, data, interrupts
        self.space = settings.space()
        self.tracker: Tracker
        self.parent: Run | None = None
        self.load: MachineLoad
        self.notes: tuple[str, ...] = ()
        self.environment: dict[str, str]
        self.made_with = settings.made_with(data)
        self.without_run: list[tuple[Trial, TrainConfig]] = []
        self.with_run: set[int] = set()
        """Trials whose run was asked for: it may be there, whatever went wrong after that."""
        self.taken_up: set[int] = set()
        """Trials that an earlier process has begun: what it recorded of them, MLflow is asked."""
        self.running: dict[int, _RunningTrial] = {}
        self.classifiers: dict[str, Classifier] = {}
        self.outcome, self.reason = "interrupted", ""
        self.closed = False
        self.leftover: list[FrozenTrial] = []
        self.failures_in_a_row = 0
        self.lost: set[int] = set()
        self.should_look = False
        """Whether it is time to look for what other processes left."""
        self.heartbeat = Heartbeat(study, is_shared=sqlite_file(settings.storage) is None)
        self.deadline = time.monotonic() + (settings.timeout or math.inf)

    def begin(self) -> None:
        """Hand out the first trials, before MLflow is there to record them.

        Unless an earlier process left some: what became of those, MLflow knows.
        """
        if not self.heartbeat.abandoned():
            self._hand_out()

    def connect(self) -> tuple[Tracker, Run]:
        """Open MLflow's experiment and the run that the trials' runs hang under."""
        fixed = self.space.fixed
        self.environment = environment(fixed["precision"], fixed["device"])
        with self.interrupts.at_once():
            from tracking.retries import Patience
            from tracking.system_metrics import MachineLoad
            from tracking.tracker import Tracker

            timeout = self.settings.tracking_timeout
            patience = Patience(seconds=timeout, should_stop=self._should_wait_no_more)
            self.tracker = Tracker.open(self.settings.experiment, patience=patience)
        parent = self._open_parent()
        self.load = MachineLoad(parent)
        self._note_environment()
        return self.tracker, parent

    def _note_environment(self) -> None:
        """Note in the study what it is made with: what is there already may have been otherwise."""
        agree(self.study, "made_with", self.made_with)
        before = agree(self.study, "environment", self.environment)
        if changes := differences(before, self.environment):
            self.notes += (f"this study was begun with another environment: {changes}",)

    def _open_parent(self) -> Run:
        """Return the run that the trials' runs hang under: the study's own, if it has one."""
        study, tags = self.study, self.settings.tags
        own = {"study": study.study_name, "study_id": study.user_attrs["id"], "role": "sweep"}
        earlier = study.user_attrs.get("parent_run_id")
        whole = tags.get("comparison")
        name = f"sweep {study.study_name}"
        if whole is not None:
            name = study.study_name.removeprefix(f"{whole}/").replace("/", " ")
        parent = self.tracker.parent_run(
            name, tags={**tags, **own}, earlier=earlier, under=self.under
        )
        self.parent = parent  # from here on it is closed, whatever happens
        if earlier is None and parent.run_id != os.environ.get("MLFLOW_RUN_ID"):
            first = agree(study, "parent_run_id", parent.run_id)
            if first != parent.run_id and (run := self.tracker.find_run(first)) is not None:
                parent.delete()  # another process made one at the same time
                self.parent = parent = run
        else:
            study.set_user_attr("parent_run_id", parent.run_id)
        # Not under the flags' own names: `mlflow run` has logged these already, quoted for a shell.
        identity = self.settings.identity(self.data)
        network = {"network_digest": self.made_with["network"]}
        parent.log_params({f"sweep/{k}": v for k, v in {**identity, **network}.items()})
        parent.set_tags(self._environment_tags())
        log_data(parent, self.data)
        # That nothing can be stored is found now, and not at the first model.
        parent.log_text(json.dumps({**identity, **self.made_with}, indent=2), "settings.json")
        return parent

    def events(self) -> Iterator[SweepEvent]:
        assert self.parent is not None
        if not self.without_run:
            self.leftover = self._reconcile()
        while self.running or self.without_run or self._has_more() or self._waits_for_others():
            if self.interrupts():
                return
            if self.failures_in_a_row >= self.settings.max_failures:
                self.outcome = "failed"
                self.reason = (
                    f"{self.failures_in_a_row} trials failed one after another: their runs in "
                    "MLflow say why; the same command goes on with the next trials"
                )
                return
            self._keep_alive()
            if self.should_look:
                self.should_look = False
                self.leftover = self._reconcile()
            yield from self._give_up_lost()
            has_more = self._hand_out()
            yield from self._open_runs()
            self._rehearse()
            self.load.log_if_due()
            for event in self.pool.wait(0 if has_more else WAIT_SECONDS):
                # A process that was suspended records nothing of what others have taken up
                # meanwhile; nor may one that is busy with many events forget its signs of life.
                self._keep_alive()
                yield from self._give_up_lost()
                try:
                    yield from self._take(event)
                except recording_errors() as error:
                    yield self._without_its_run(event, error)
                if self.interrupts():
                    return
        self.outcome = "complete"

    def register(self) -> Iterator[BestRegistered]:
        """Offer the best trial's model to the model registry, once the sweep is complete.

        It is that of the best trial whose run and model nobody has deleted.
        """
        name = self.settings.registered_model(self.data)
        if name is None or self.outcome != "complete":
            return
        from tracking.registry import offer
        from tracking.run_search import first_with_model

        complete = trials_table(self.study).query("outcome == 'complete'")
        run_id = first_with_model(self.tracker.client, complete["run_id"])
        if run_id is not None:
            yield BestRegistered(report=offer(self.tracker.client, run_id, name))

    def close(self) -> list[TrialEnded | SweepEnded]:
        """Close what still runs as interrupted, and then the parent."""
        if self.closed:
            return []
        self.closed = True
        ended: list[TrialEnded] = []
        # Each by itself: what can't be recorded of one, the next start finds still RUNNING.
        for running in list(self.running.values()):
            with suppress(*recording_errors()):
                ended.append(self._interrupt(running))
        for trial, _ in self.without_run:
            self.pool.stop(trial.number)
            with suppress(*recording_errors()):
                self._leave(trial)
        num_elsewhere = 0
        with suppress(*recording_errors()):
            num_elsewhere = self.heartbeat.num_elsewhere()
        with suppress(*recording_errors()):
            if self.parent is not None and not num_elsewhere:  # else the last process ends it
                self.parent.end(self.outcome, reason=self.reason)
        table = None
        with suppress(*recording_errors()):
            table = trials_table(self.study)
        return [*ended, SweepEnded(outcome=self.outcome, reason=self.reason, trials=table)]

    def _leave(self, trial: Trial) -> None:
        """Leave a trial that is handed out, and has no run yet, or an unfinished one."""
        may_have_run = trial.number in self.taken_up | self.with_run
        run = self._find_run(trial.number, trial.user_attrs) if may_have_run else None
        if run is not None:
            run.end("interrupted")
        if run is not None or trial.number in self.taken_up:
            self.heartbeat.release(trial)
        else:
            self.heartbeat.give_back(trial)  # as if it had never been asked for

    def _reconcile(self) -> list[FrozenTrial]:
        """Make Optuna and MLflow agree on what a dead process left, and return what to take up.

        A trial whose run has an outcome was over: Optuna was still to be told.
        """
        unfinished = []
        for trial in self.heartbeat.abandoned():
            run = self._find_run(trial.number, trial.user_attrs)
            outcome = run.outcome() if run is not None else None
            if trial.number >= self.settings.trials and not trial.params:
                if self.heartbeat.claim(trial):  # one too many; see `_hand_out`
                    self.heartbeat.give_back(trial)
                continue
            if run is None or outcome is None or outcome == "interrupted":
                unfinished.append(trial)
                continue
            if not self.heartbeat.claim(trial):
                continue
            run.end(outcome)
            accuracy = run.last_value(OBJECTIVE)
            self._tell(trial.number, trial._trial_id, outcome, accuracy, run.last_value("val/loss"))
        return unfinished

    def _has_more(self) -> bool:
        if time.monotonic() >= self.deadline:
            return False
        # Those of other processes, on a storage that several share, are counted as well.
        return bool(self.leftover) or _num_begun(self.study) < self.settings.trials

    def _waits_for_others(self) -> bool:
        """Return whether trials are under way that may be left for us to take up."""
        return time.monotonic() < self.deadline and self.heartbeat.num_elsewhere() > 0

    def _should_wait_no_more(self) -> bool:
        """Answer `Patience`, and keep our trials alive while a tracking server is away."""
        self._keep_alive()
        return self.interrupts()

    def _keep_alive(self) -> None:
        """Give signs of life, if it is time."""
        if not self.heartbeat.is_due():
            return
        ours = [running.trial for running in self.running.values()]
        lost = self.heartbeat.record([*ours, *(trial for trial, _ in self.without_run)])
        self.lost |= {trial.number for trial in lost}
        self.should_look = self.heartbeat.is_shared

    def _give_up_lost(self) -> Iterator[SweepEvent]:
        """Leave the trials that another process has taken up, as we gave no sign of life."""
        for number in self.lost:
            self.pool.stop(number)
            if running := self.running.pop(number, None):
                yield running.ended("interrupted", "another process has taken it up")
        self.without_run = [each for each in self.without_run if each[0].number not in self.lost]
        self.lost.clear()

    def _hand_out(self) -> bool:
        """Give idle workers a trial, whose run is opened while it trains.

        Return whether there are more of both.
        """
        end = len(self.without_run) + HANDED_OUT_AT_ONCE
        while self.pool.num_idle and self._has_more():
            if len(self.without_run) == end:
                return True
            if self.leftover:
                taken = self.heartbeat.take_up(self.leftover.pop(0))
                if taken is None:
                    continue
                trial = taken
                self.taken_up.add(trial.number)
            else:
                trial = self.heartbeat.ask()
                if trial.number >= self.settings.trials:
                    # Another process asked at the same time: it stays for a larger --trials.
                    self.heartbeat.give_back(trial)
                    continue
            config = self.space.suggest(trial)
            self.pool.submit(trial.number, config)
            self.without_run.append((trial, config))
        return False

    def _open_runs(self) -> Iterator[TrialStarted]:
        while self.without_run:
            trial, config = self.without_run[0]
            is_new = trial.number not in self.taken_up
            self.with_run.add(trial.number)
            run = self._begin_run(trial, config) if is_new else self._reopen_run(trial, config)
            self.running[trial.number] = _RunningTrial(trial, config, run, is_new=is_new)
            self.without_run.pop(0)
            yield TrialStarted(trial=trial.number, run_id=run.run_id, config=config)

    def _begin_run(self, trial: Trial, config: TrainConfig) -> Run:
        rate = f"lr={config.learning_rate:.3g}"
        name = f"{trial.number:03d} {config.loss} {rate} bs={config.batch_size}"
        if self.space.varies_seed:
            name += f" seed={config.seed}"
        tags = self._tags(trial.number) | self._environment_tags()
        run = self.tracker.start_run(name, tags=tags, parent=self.parent)
        trial.set_user_attr("run_id", run.run_id)
        self._log_config(run, config)
        log_data(run, self.data)
        return run

    def _reopen_run(self, trial: Trial, config: TrainConfig) -> Run:
        """Return the run of a trial that is taken up again; a new one, if it came to have none."""
        run = self._find_run(trial.number, trial.user_attrs)
        if run is None:
            return self._begin_run(trial, config)
        run.reopen(tags=self.tracker.process_tags)
        trial.set_user_attr("run_id", run.run_id)
        # The process that opened it may have died before it came to these.
        if not run.params():
            self._log_config(run, config)
        log_data(run, self.data)
        return run

    def _log_config(self, run: Run, config: TrainConfig) -> None:
        run.log_params(
            {
                **config.as_params(),
                "dataset": self.data.name,
                "dataset_digest": self.data.digest,
                "network_digest": self.made_with["network"],
                "training_digest": self.made_with["training"][config.loss],
            }
        )

    def _environment_tags(self) -> dict[str, str]:
        names = ("commit", "uncommitted", "source", "python", "torch")
        return {f"code.{name}": self.environment[name] for name in names}

    def _tags(self, number: int) -> dict[str, str]:
        # The study's own id: one that was deleted and made again may have the same name.
        study = {"study": self.study.study_name, "study_id": self.study.user_attrs["id"]}
        return {**self.settings.tags, **study, "trial": str(number), "role": "trial"}

    def _find_run(self, number: int, user_attrs: Mapping[str, Any]) -> Run | None:
        """Return the run of a trial, though its process may have died before it noted its id."""
        if run_id := user_attrs.get("run_id"):
            return self.tracker.find_run(run_id)
        return self.tracker.find_tagged(self._tags(number))

    def _take(self, event: Event) -> Iterator[SweepEvent]:
        running = self.running.get(event.job)
        if running is None:  # stopped, and over for us: its worker has just noticed
            return
        match event:
            case EpochEnded():
                running.record(event)
                yield TrialProgressed(trial=event.job, number=event.number, metrics=event.metrics)
                if not event.diverged and self._should_prune(running, event):
                    self.pool.stop(event.job)
                    yield self._end(running, "pruned")
            case JobEnded() if running.diverged:
                reason = f"not finite in epoch {running.epochs}"
                yield self._end(running, "diverged", reason)
            case JobEnded():
                self._record_model(running, event)
                yield self._end(running, "complete")
            case JobMoved():
                running.run.set_tags({"moved": event.reason})
                yield TrialMoved(trial=event.job, reason=event.reason)
            case CheckpointLost():
                running.run.set_tags({"checkpoint_lost": event.reason})
                yield TrialUnprotected(trial=event.job, reason=event.reason)
            case JobFailed():
                if event.details:
                    running.run.log_text(event.details, "traceback.txt")
                if running.may_be_tried_again():
                    self.pool.submit(event.job, running.config)
                else:
                    yield self._end(running, "failed", event.error)

    def _without_its_run(self, event: Event, error: BaseException) -> TrialEnded:
        """End a trial whose run somebody has deleted; whatever else went wrong is raised again."""
        running = self.running.get(event.job)
        is_deleted = (
            running is not None
            and not is_passing(error)
            and self.tracker.find_run(running.run.run_id) is None
            # With its experiment, it may come back, and the trial goes on then.
            and self.tracker.is_active()
        )
        if running is None or not is_deleted:
            raise error
        self.pool.stop(event.job)
        del self.running[event.job]
        self._tell(event.job, running.trial._trial_id, "failed", running.accuracy, None)
        return running.ended("failed", "its run in MLflow was deleted")

    def _should_prune(self, running: _RunningTrial, event: EpochEnded) -> bool:
        # After the last epoch there is nothing left to save.
        return event.number < running.config.epochs and running.trial.should_prune()

    def _rehearse(self) -> None:
        """Make a model's graph for nothing, while the workers train their first trials.

        The first time in a process it takes seconds, for PyTorch's compiler is imported: a worker
        would wait as long, and a Ctrl-C, too.
        """
        if "torch._dynamo" in sys.modules or not self.running:
            return
        from tracking.models.recording import save_model

        config = next(iter(self.running.values())).config
        model = self._classifier(config)
        classes = {"classes": self.data.classes}
        with (
            suppress(InterruptionError),
            TemporaryDirectory() as scratch,
            self.interrupts.at_once(),
        ):
            folder = Path(scratch, "model")
            save_model(model, folder, input_example=self._example(), metadata=classes)

    def _example(self) -> np.ndarray[Any, Any]:
        images, _ = self.data.validation.batch(torch.arange(2))
        return images.numpy()

    def _classifier(self, config: TrainConfig) -> Classifier:
        """Return the model to record, but for the weights: one for all trials with the same graph.

        So a graph is traced once a sweep, which is quicker, and all that PyTorch keeps of it.
        """
        kind = get_loss(config.loss).outputs_to_probabilities
        if kind not in self.classifiers:
            network = CNN(len(self.data.classes))
            self.classifiers[kind] = Classifier(network, PROBABILITIES[kind]).eval()
        return self.classifiers[kind]

    def _record_model(self, running: _RunningTrial, event: JobEnded) -> None:
        model = self._classifier(running.config)
        weights = {name: torch.from_numpy(values) for name, values in event.weights.items()}
        model.network.load_state_dict(weights)
        running.run.log_model(
            model,
            input_example=self._example(),
            classes=self.data.classes,
            step=running.epochs,
            metadata={
                "dataset": self.data.name,
                "dataset_digest": self.data.digest,
                "loss": running.config.loss,
                "seed": running.config.seed,
                "study": self.study.study_name,
                "trial": running.trial.number,
            },
        )

    def _end(self, running: _RunningTrial, outcome: str, reason: str = "") -> TrialEnded:
        """Close the run, then tell Optuna."""
        running.run.end(outcome, reason=reason)
        number = running.trial.number
        del self.running[number]  # from here on it has an outcome, whatever happens
        self._tell(number, running.trial._trial_id, outcome, running.accuracy, running.val_loss)
        self.failures_in_a_row = self.failures_in_a_row + 1 if outcome == "failed" else 0
        self.pool.forget(running.config)
        return running.ended(outcome, reason)

    def _tell(
        self,
        number: int,
        trial_id: int,
        outcome: str,
        accuracy: float | None,
        val_loss: float | None,
    ) -> None:
        state = STATES[outcome]
        storage = self.study._storage
        storage.set_trial_user_attr(trial_id, "outcome", outcome)
        if outcome == "complete":
            storage.set_trial_user_attr(trial_id, "val_loss", val_loss)
        self.study.tell(number, accuracy if state == TrialState.COMPLETE else None, state)

    def _interrupt(self, running: _RunningTrial) -> TrialEnded:
        """Close the run; for Optuna the trial goes on, and the next start takes it up again."""
        running.run.end("interrupted")
        self.heartbeat.release(running.trial)
        del self.running[running.trial.number]
        return running.ended("interrupted", "")


class _RunningTrial:
    """A trial under way: its Optuna trial, its run, and what came of it so far."""

    def __init__(self, trial: Trial, config: TrainConfig, run: Run, *, is_new: bool) -> None:
        self.trial, self.config, self.run = trial, config, run
        self.start = time.monotonic()
        self.epochs = 0
        self.accuracy: float | None = None
        self.val_loss: float | None = None
        self.diverged = False
        # Of a trial that is taken up again, an earlier process has recorded these epochs. Training
        # repeats them bit for bit, so that they need not be recorded again.
        self.recorded = 0 if is_new else run.last_step(OBJECTIVE)
        self.reported = 0 if is_new else max(_frozen(trial).intermediate_values, default=0)

    def record(self, event: EpochEnded) -> None:
        self.epochs, self.diverged = event.number, event.diverged
        self.accuracy, self.val_loss = event.metrics[OBJECTIVE], event.metrics["val/loss"]
        if event.number > self.recorded:
            self.run.log_metrics(event.metrics, step=event.number)
            self.recorded = event.number
        if event.number > self.reported:
            self.trial.report(self.accuracy, event.number)
            self.reported = event.number

    def may_be_tried_again(self) -> bool:
        """Note a failure, and return whether it was the first: no fault of the trial's, maybe."""
        failures = self.trial.user_attrs.get("failures", 0) + 1
        self.trial.set_user_attr("failures", failures)
        return bool(failures <= RETRIES)

    def ended(self, outcome: str, reason: str) -> TrialEnded:
        return TrialEnded(
            trial=self.trial.number,
            outcome=outcome,
            accuracy=self.accuracy,
            epochs=self.epochs,
            seconds=time.monotonic() - self.start,
            reason=reason,
        )


def open_study(
    settings: Settings,
    data: Dataset,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    storage: TrialCache | None = None,
) -> Study:
    """Open the study of these settings, or make it.

    Without a name of its own it has one that follows from the settings and the code, so that the
    same command comes to the same study, and another command or network to another.

    Args:
        settings: of the study.
        data: that it is of.
        should_stop: asked while a storage that has gone away is waited for.
        storage: that of the settings, where it is open already.

    Raises:
        ValueError: the storage can't be opened, or the study is of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if storage is None:
        check_storage(settings.storage)
    identity, made = settings.identity(data), settings.made_with(data)
    patience = storage_patience(settings.tracking_timeout, should_stop)
    with storage_errors(settings.storage):
        storage = storage or open_storage(settings.storage, patience)
        name = settings.study or existing_name(storage, data.name, identity, made)
        check_study_name(name)
        study = load_or_create(
            study_name=name,
            storage=storage,
            sampler=settings.make_sampler(),
            pruner=make_pruner(settings.pruner, settings.epochs),
        )
        # In this order: another process that makes it sets them before it asks for a trial.
        has_trials = bool(study.get_trials(deepcopy=False))
        attributes = study.user_attrs
        settings_before = attributes.get("settings")
        if settings_before is None:
            if has_trials:
                where = without_passwords(settings.storage)
                raise ValueError(f"study {name!r} in {where} was not made by this tool")
            agree(study, "id", uuid.uuid4().hex)
            settings_before = agree(study, "settings", identity)
    before = (settings_before, identity), (attributes.get("made_with"), made)
    check_same(f"study {name!r}", *before)
    return study


def trials_table(study: Study) -> pd.DataFrame:
    """Return the finished trials, the best first: what was tried and what came of it."""
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    rows = [
        {
            "trial": trial.number,
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            "loss": trial.params.get("loss"),
            "learning_rate": trial.params.get("learning_rate"),
            "batch_size": trial.params.get("batch_size"),
            "epochs": len(trial.intermediate_values),
            "val_accuracy": _last_value(trial),
            "val_loss": trial.user_attrs.get("val_loss"),
            "run_id": trial.user_attrs.get("run_id"),
        }
        for trial in trials
    ]
    return best_first(pd.DataFrame(rows, columns=TRIALS_COLUMNS)).reset_index(drop=True)


def log_data(run: Run, data: Dataset) -> None:
    """Log to a run which data it trains on."""
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


def _num_finished(study: Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def _num_begun(study: Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))


def _best(study: Study) -> tuple[float, int] | None:
    complete = trials_table(study).query("outcome == 'complete'")
    return (complete["val_accuracy"].iloc[0], complete["trial"].iloc[0]) if len(complete) else None


def _frozen(trial: Trial) -> FrozenTrial:
    return trial.storage.get_trial(trial._trial_id)


def _last_value(trial: FrozenTrial) -> float:
    steps = trial.intermediate_values
    return steps[max(steps)] if steps else math.nan
