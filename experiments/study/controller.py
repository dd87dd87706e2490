"""One sweep: the Optuna study, the workers that train, and the runs in MLflow brought together.

`sweep()` is a generator of what happens: its caller shows it, and stops it by closing it. All
writing to Optuna and MLflow is done here, in one thread that asks, waits and tells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from cnn.config import TrainConfig
from cnn.data import Dataset
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
from experiments.interrupts import InterruptionError, Interrupts
from experiments.study.events import (
    BestRegistered,
    SweepEnded,
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialMoved,
    TrialProgressed,
    TrialStarted,
    TrialUnprotected,
)
from experiments.study.heartbeat import Heartbeat
from experiments.study.identity import differences, environment
from experiments.study.opening import open_study
from experiments.study.recorder import OBJECTIVE, Recorder, RunningTrial
from experiments.study.settings import Settings
from experiments.study.storage import (
    cause_of,
    recording_errors,
    set_attributes,
    set_once,
    study_lock,
)
from experiments.study.trial_cache import TrialCache
from experiments.study.trials import best_trial, num_begun, num_finished, trials_table
from tracking.errors import is_transient, one_line, refusal
from tracking.store import check_tracking, sqlite_file

# MLflow, a second to import, and its tables, another, can wait until the workers have begun.
if TYPE_CHECKING:
    from tracking.system_metrics import SystemMetrics

WAIT_SECONDS = 0.2
"""How long a wait for the workers may take before it is asked again whether to stop."""

MAX_DISPATCH = 16
"""Trials dispatched in a row, before events are read: 1,000 idle workers would take minutes."""

STATES = {
    "complete": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""What Optuna is told of each outcome."""


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

    Trials that an earlier process left unfinished are resumed under their own numbers. However
    the iteration ends, no run stays RUNNING.

    Args:
        settings: what to do.
        data: the data set.
        pool: the workers, which have opened the same data; it is not closed.
        interrupts: asked several times a second; once true, what runs is closed as `interrupted`
            and the iteration ends.
        under: the id of the run that the sweep's run is part of, if it is part of one.
        storage: that of the settings, if it is open already.

    Raises:
        ValueError: study, storage, tracking server or settings can't be used, in one line;
            `TransientError`, if it is no fault of theirs.
        KeyboardInterrupt: there was a second signal, or a first before anything was recorded.
    """
    for batch_size in settings.search["batch_size"].values:
        check_batch_size(int(batch_size), data)
    with ExitStack() as stack:
        interrupts = interrupts or Interrupts()
        if storage is None:  # else both databases have been looked at
            check_tracking()
        study = open_study(settings, data, interrupts, storage=storage)
        stack.enter_context(study_lock(settings.storage, study.study_name))
        running = _Sweep(settings, study, pool, data, interrupts)
        stack.callback(running.close)
        try:
            running.begin()
            recorder = running.connect(under)
        except InterruptionError:
            raise  # before it is asked what the others are: MLflow may be half imported
        except recording_errors() as error:
            raise refusal(one_line(cause_of(error)), error) from error
        yield SweepStarted(
            study=study.study_name,
            experiment=recorder.tracker.experiment,
            experiment_id=recorder.tracker.experiment_id,
            parent_run_id=recorder.parent.run_id,
            num_before=num_finished(study),
            best_before=best_trial(study),
            notes=running.notes,
        )
        try:
            yield from running.events()
            yield from running.register()
        except recording_errors() as error:
            # Only after an error that may pass does the same command continue the sweep.
            running.outcome = "interrupted" if is_transient(error) else "failed"
            running.reason = one_line(cause_of(error))
        yield from running.close()


class _Sweep:
    """The loop: dispatch trials, receive events, record them."""

    def __init__(
        self,
        settings: Settings,
        study: Study,
        pool: WorkerPool,
        data: Dataset,
        interrupts: Interrupts,
    ) -> None:
        self.settings, self.study = settings, study
        self.pool, self.data, self.interrupts = pool, data, interrupts
        self.space = settings.space()
        self.recorder: Recorder
        self.has_recorder = False
        self.system_metrics: SystemMetrics
        self.notes: tuple[str, ...] = ()
        self.pending_runs: list[tuple[Trial, TrainConfig]] = []
        """Trials that a worker has, and that have no run yet."""
        self.run_requested: set[int] = set()
        """Trials whose run was asked for: it may exist, whatever went wrong after that."""
        self.resumed: set[int] = set()
        """Trials that an earlier process has begun: MLflow has what it recorded of them."""
        self.orphaned: list[FrozenTrial] = []
        """Trials that an earlier process left unfinished, and that no worker has yet."""
        self.running: dict[int, RunningTrial] = {}
        self.lost: set[int] = set()
        """Trials that another process has resumed, because our heartbeat was late."""
        self.failures_in_a_row = 0
        self.should_look = False
        """Whether it is time to look for orphaned trials."""
        self.outcome, self.reason = "interrupted", ""
        self.closed = False
        self.heartbeat = Heartbeat(study, is_shared=sqlite_file(settings.storage) is None)
        self.deadline = time.monotonic() + (settings.timeout or math.inf)

    def begin(self) -> None:
        """Dispatch the first trials, before MLflow is open to record them.

        If there are orphaned trials, wait: MLflow knows what became of them.
        """
        if not self.heartbeat.orphaned():
            self._dispatch()

    def connect(self, under: str | None) -> Recorder:
        """Open MLflow's experiment and the parent of the trials' runs."""
        fixed = self.space.fixed
        code = environment(fixed["precision"], fixed["device"])
        made_with = self.settings.made_with(self.data)
        with self.interrupts.at_once():
            from tracking.retries import RetryPolicy
            from tracking.system_metrics import SystemMetrics
            from tracking.tracker import Tracker

            timeout = self.settings.tracking_timeout
            retries = RetryPolicy(seconds=timeout, should_stop=self._stop_requested)
            tracker = Tracker.open(self.settings.experiment, retries=retries)
        self.recorder = Recorder(
            tracker,
            self.study,
            self.settings,
            self.data,
            made_with=made_with,
            environment=code,
        )
        self.has_recorder = True
        self.system_metrics = SystemMetrics(self.recorder.open_parent(under))
        set_once(self.study, "made_with", made_with)
        before = set_once(self.study, "environment", code)
        if changes := differences(before, code):
            self.notes += (f"this study was begun with another environment: {changes}",)
        return self.recorder

    def events(self) -> Iterator[SweepEvent]:
        if not self.pending_runs:
            self.orphaned = self._reconcile()
        while self.running or self.pending_runs or self._has_more() or self._waits_for_others():
            if self.interrupts():
                return
            if self.failures_in_a_row >= self.settings.max_failures:
                self.outcome = "failed"
                self.reason = (
                    f"{self.failures_in_a_row} trials failed one after another: their runs in "
                    "MLflow say why; the same command continues with the next trials"
                )
                return
            self._keep_alive()
            if self.should_look:
                self.should_look = False
                self.orphaned = self._reconcile()
            yield from self._drop_lost()
            has_more = self._dispatch()
            yield from self._open_runs()
            self._warm_up_export()
            self.system_metrics.log_if_due()
            for event in self.pool.wait(0 if has_more else WAIT_SECONDS):
                # After each event: a process that was suspended must not record trials that others
                # have resumed, and one with many events must not miss its heartbeat.
                self._keep_alive()
                yield from self._drop_lost()
                try:
                    yield from self._receive(event)
                except recording_errors() as error:
                    yield self._end_without_run(event, error)
                if self.interrupts():
                    return
        self.outcome = "complete"

    def register(self) -> Iterator[BestRegistered]:
        """Register the best trial's model, once the sweep is complete.

        Trials whose run or model was deleted are skipped.
        """
        name = self.settings.registered_model(self.data)
        if name is None or self.outcome != "complete":
            return
        from tracking.registry import register_best
        from tracking.run_search import first_with_model

        complete = trials_table(self.study).query("outcome == 'complete'")
        client = self.recorder.tracker.client
        run_id = first_with_model(client, complete["run_id"])
        if run_id is not None:
            yield BestRegistered(report=register_best(client, run_id, name))

    def close(self) -> list[TrialEnded | SweepEnded]:
        """Close the runs that are open as interrupted, and then the parent."""
        if self.closed:
            return []
        self.closed = True
        ended: list[TrialEnded] = []
        # Each by itself: if one can't be recorded, the next start finds it still RUNNING.
        for running in list(self.running.values()):
            with suppress(*recording_errors()):
                ended.append(self._interrupt(running))
        for trial, _ in self.pending_runs:
            self.pool.stop(trial.number)
            with suppress(*recording_errors()):
                self._abandon_pending(trial)
        num_elsewhere = 0
        with suppress(*recording_errors()):
            num_elsewhere = self.heartbeat.num_elsewhere()
        with suppress(*recording_errors()):
            if self.has_recorder and not num_elsewhere:  # else the last process ends it
                self.recorder.end_parent(self.outcome, reason=self.reason)
        table = None
        with suppress(*recording_errors()):
            table = trials_table(self.study)
        return [*ended, SweepEnded(outcome=self.outcome, reason=self.reason, trials=table)]

    def _abandon_pending(self, trial: Trial) -> None:
        """Abandon a trial that was dispatched and has no run yet, or one that was not read."""
        may_have_run = trial.number in self.resumed | self.run_requested
        run = self.recorder.find_run(trial) if may_have_run else None
        if run is not None:
            run.end("interrupted")
        if run is not None or trial.number in self.resumed:
            self.heartbeat.abandon(trial)
        else:
            self.heartbeat.requeue(trial)  # as if it had never been asked for

    def _reconcile(self) -> list[FrozenTrial]:
        """Make Optuna and MLflow agree on orphaned trials, and return those to resume.

        A trial whose run has an outcome is over: its process died before it told Optuna.
        """
        unfinished = []
        for trial in self.heartbeat.orphaned():
            run = self.recorder.find_run(trial)
            outcome = run.outcome() if run is not None else None
            if trial.number >= self.settings.trials and not trial.params:
                if self.heartbeat.claim(trial):  # one too many; see `_dispatch`
                    self.heartbeat.requeue(trial)
                continue
            if run is None or outcome is None or outcome == "interrupted":
                unfinished.append(trial)
                continue
            if not self.heartbeat.claim(trial):
                continue
            run.end(outcome)
            accuracy = run.last_value(OBJECTIVE)
            self._tell(trial, outcome, accuracy, run.last_value("val/loss"))
        return unfinished

    def _has_more(self) -> bool:
        if time.monotonic() >= self.deadline:
            return False
        # The trials of other processes count as well.
        return bool(self.orphaned) or num_begun(self.study) < self.settings.trials

    def _waits_for_others(self) -> bool:
        """Return whether other processes have trials that may become orphaned."""
        return time.monotonic() < self.deadline and self.heartbeat.num_elsewhere() > 0

    def _stop_requested(self) -> bool:
        """Return whether to stop; called while a server is away, so the heartbeat goes on."""
        self._keep_alive()
        return self.interrupts()

    def _keep_alive(self) -> None:
        """Write a heartbeat, if it is time."""
        if not self.heartbeat.is_due():
            return
        ours = [running.trial for running in self.running.values()]
        lost = self.heartbeat.record([*ours, *(trial for trial, _ in self.pending_runs)])
        self.lost |= {trial.number for trial in lost}
        self.should_look = self.heartbeat.is_shared

    def _drop_lost(self) -> Iterator[SweepEvent]:
        """Stop the trials that another process has resumed."""
        for number in self.lost:
            self.pool.stop(number)
            if running := self.running.pop(number, None):
                yield running.ended("interrupted", "another process has resumed it")
        self.pending_runs = [each for each in self.pending_runs if each[0].number not in self.lost]
        self.lost.clear()

    def _dispatch(self) -> bool:
        """Give idle workers a trial each; its run is opened while it trains.

        Return whether there are more idle workers and trials.
        """
        end = len(self.pending_runs) + MAX_DISPATCH
        while self.pool.num_idle and self._has_more():
            if len(self.pending_runs) == end:
                return True
            if self.orphaned:
                resumed = self.heartbeat.resume(self.orphaned.pop(0))
                if resumed is None:
                    continue
                trial = resumed
                self.resumed.add(trial.number)
            else:
                trial = self.heartbeat.ask()
                if trial.number >= self.settings.trials:
                    # Another process asked at the same time: it waits for a larger --trials.
                    self.heartbeat.requeue(trial)
                    continue
            config = self.space.suggest(trial)
            self.pool.submit(trial.number, config)
            self.pending_runs.append((trial, config))
        return False

    def _open_runs(self) -> Iterator[TrialStarted]:
        while self.pending_runs:
            trial, config = self.pending_runs[0]
            is_new = trial.number not in self.resumed
            self.run_requested.add(trial.number)
            open_run = self.recorder.open_run if is_new else self.recorder.reopen_run
            run = open_run(trial, config)
            self.running[trial.number] = RunningTrial(trial, config, run, is_new=is_new)
            self.pending_runs.pop(0)
            yield TrialStarted(trial=trial.number, run_id=run.run_id, config=config)

    def _receive(self, event: Event) -> Iterator[SweepEvent]:
        running = self.running.get(event.job)
        if running is None:  # it was stopped, and its worker had not heard of it yet
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
                self.recorder.record_model(running, event)
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
                if running.may_be_retried():
                    self.pool.submit(event.job, running.config)
                else:
                    yield self._end(running, "failed", event.error)

    def _end_without_run(self, event: Event, error: BaseException) -> TrialEnded:
        """End a trial whose run somebody has deleted; raise any other error again."""
        running, tracker = self.running.get(event.job), self.recorder.tracker
        is_deleted = (
            running is not None
            and not is_transient(error)
            and tracker.find_run(running.run.run_id) is None
            # If the experiment is deleted as well, it may be restored, and the trial continues.
            and tracker.is_active()
        )
        if running is None or not is_deleted:
            raise error
        self.pool.stop(event.job)
        del self.running[event.job]
        self._tell(running.trial, "failed", running.accuracy, None)
        return running.ended("failed", "its run in MLflow was deleted")

    def _warm_up_export(self) -> None:
        if self.running:
            config = next(iter(self.running.values())).config
            self.recorder.warm_up_export(config, self.interrupts)

    def _should_prune(self, running: RunningTrial, event: EpochEnded) -> bool:
        # After the last epoch there is nothing left to save.
        return event.number < running.config.epochs and running.trial.should_prune()

    def _end(self, running: RunningTrial, outcome: str, reason: str = "") -> TrialEnded:
        """Close the run, then tell Optuna."""
        running.run.end(outcome, reason=reason)
        del self.running[running.trial.number]  # from here on it has an outcome, whatever happens
        self._tell(running.trial, outcome, running.accuracy, running.val_loss)
        self.failures_in_a_row = self.failures_in_a_row + 1 if outcome == "failed" else 0
        self.pool.forget(running.config)
        return running.ended(outcome, reason)

    def _tell(
        self,
        trial: Trial | FrozenTrial,
        outcome: str,
        accuracy: float | None,
        val_loss: float | None,
    ) -> None:
        state = STATES[outcome]
        attributes: dict[str, object] = {"outcome": outcome}
        if outcome == "complete":
            attributes["val_loss"] = val_loss
        set_attributes(self.study, trial, attributes)
        self.study.tell(trial.number, accuracy if state == TrialState.COMPLETE else None, state)

    def _interrupt(self, running: RunningTrial) -> TrialEnded:
        """Close the run; for Optuna the trial stays RUNNING, and the next start resumes it."""
        running.run.end("interrupted")
        self.heartbeat.abandon(running.trial)
        del self.running[running.trial.number]
        return running.ended("interrupted", "")
