"""One sweep: it connects the Optuna study, the workers that train, and the runs in MLflow.

`sweep()` is a generator of events. Its caller shows them, and closes it to stop the sweep. One
thread writes everything to Optuna and MLflow.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from optuna.study import Study

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
from experiments.interrupts import Interrupts
from experiments.study.dispatch import Dispatcher
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
from experiments.study.identity import provenance
from experiments.study.opening import open_study
from experiments.study.parent import WriteReport
from experiments.study.recorder import Recorder, RunningTrial, open_tracker
from experiments.study.settings import Settings
from experiments.study.storage import (
    last_reported_epoch,
    outcome_of,
    recording_errors,
    set_attributes,
    start_errors,
    study_lock,
)
from experiments.study.trial_cache import TrialCache
from experiments.study.trials import best_trial, num_finished, tell, trials_table
from tracking.errors import is_transient
from tracking.store import check_tracking

# MLflow takes a second to import, and its tables another: the workers start first.
if TYPE_CHECKING:
    from tracking.system_metrics import SystemMetrics

WAIT_SECONDS = 0.2  # how long to wait for the workers between checks for a signal


def sweep(
    settings: Settings,
    data: Dataset,
    pool: WorkerPool,
    interrupts: Interrupts | None = None,
    *,
    under: str | None = None,
    storage: TrialCache | None = None,
    reuse: bool = False,
    write_report: WriteReport | None = None,
) -> Generator[SweepEvent]:
    """Bring a study to `settings.trials` trials, and yield events.

    Trials that an earlier process left unfinished resume under their own numbers. However the
    iteration ends, no run stays RUNNING.

    Args:
        settings: of the sweep.
        data: the data set.
        pool: workers that have opened the same data; it is not closed.
        interrupts: checked several times a second; once true, what runs ends as `interrupted`.
        under: the id of the run that is the parent of the sweep's run, if any.
        storage: that of the settings, if it is open already.
        reuse: give a trial the results of a finished training that has the same.
        write_report: writes the report that is stored once the sweep is complete.

    Raises:
        ValueError: study, storage, tracking server or settings can't be used, in one line. It is a
            `TransientError` if a retry may help.
        KeyboardInterrupt: a second signal, or a first before anything was recorded.
    """
    for batch_size in settings.search["batch_size"].values:
        check_batch_size(int(batch_size), data)
    with ExitStack() as stack:
        interrupts = interrupts or Interrupts()
        if storage is None:  # else both databases were checked
            check_tracking()
        study = open_study(settings, data, interrupts, storage=storage)
        stack.enter_context(study_lock(settings.storage, study.study_name))
        running = _Sweep(settings, study, pool, data, interrupts, reuse=reuse)
        stack.callback(running.close)
        with start_errors():
            started = running.start(under)
        yield started
        try:
            yield from running.events()
            yield from running.register()
            running.notes = running.recorder.store_report(write_report, running.outcome)
        except recording_errors() as error:
            running.outcome, running.reason = outcome_of(error)
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
        *,
        reuse: bool,
    ) -> None:
        self.settings, self.study, self.reuse = settings, study, reuse
        self.pool, self.data, self.interrupts = pool, data, interrupts
        self.dispatcher = Dispatcher(settings, study, pool)
        self.recorder: Recorder
        self.has_recorder = False
        self.system_metrics: SystemMetrics
        self.running: dict[int, RunningTrial] = {}
        self.failures_in_a_row = 0
        self.outcome, self.reason = "interrupted", ""
        self.notes: tuple[str, ...] = ()
        self.is_closed = False

    def start(self, under: str | None) -> SweepStarted:
        """Dispatch the first trials, then open MLflow to record them.

        Orphaned trials wait for MLflow, which knows their outcomes.
        """
        trials = self.dispatcher
        if not self.reuse and not trials.heartbeat.orphaned():
            trials.dispatch()
        notes = self._connect(under)
        if not trials.pending_runs:
            trials.reconcile(self.recorder)
        return SweepStarted(
            study=self.study.study_name,
            experiment=self.recorder.tracker.experiment,
            experiment_id=self.recorder.tracker.experiment_id,
            parent_run_id=self.recorder.parent.run_id,
            runs_page=self.recorder.runs_page,
            num_before=num_finished(self.study),
            best_before=best_trial(self.study),
            unfinished=trials.recorded_epochs(),
            notes=notes,
        )

    def _connect(self, under: str | None) -> tuple[str, ...]:
        """Open MLflow's experiment and the parent of the trials' runs, and return notes."""
        fixed = self.dispatcher.space.fixed
        now = provenance(fixed["precision"], fixed["device"])
        made_with = self.settings.made_with(self.data)
        with self.interrupts.at_once():
            from tracking.system_metrics import SystemMetrics

            tracker = open_tracker(self.settings, self._stop_requested)
        self.recorder = Recorder(
            tracker,
            self.study,
            self.settings,
            self.data,
            made_with=made_with,
            provenance=now,
            arithmetic=self.pool.arithmetic(fixed["device"]),
        )
        self.has_recorder = True
        if self.reuse:
            self.dispatcher.find_finished = self.recorder.find_finished
        self.system_metrics = SystemMetrics(self.recorder.open_parent(under))
        return self.recorder.notes

    def events(self) -> Iterator[SweepEvent]:
        """Train the trials, and yield events."""
        trials = self.dispatcher
        while (
            self.running
            or trials.pending_runs
            or trials.reused
            or trials.has_more()
            or trials.waits_for_others()
        ):
            if self.interrupts():
                return
            if self.failures_in_a_row >= self.settings.max_failures:
                self.outcome = "failed"
                self.reason = (
                    f"{self.failures_in_a_row} trials failed in a row: their runs in MLflow say "
                    "why; the same command continues with the next trials"
                )
                return
            self._keep_alive()
            if trials.is_check_due:
                trials.reconcile(self.recorder)
            yield from self._drop_lost()
            has_more = trials.dispatch()
            yield from self._link_reused()
            yield from self._open_runs()
            self._warm_up_export()
            self.system_metrics.log_if_due()
            self.recorder.update_parent()
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
        if trials.is_stalled():
            self.reason = f"no gain in accuracy, --patience {self.settings.patience}"

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
        """End the open runs as interrupted, and then the parent."""
        if self.is_closed:
            return []
        self.is_closed = True
        ended: list[TrialEnded] = []
        recorder = self.recorder if self.has_recorder else None
        # Each in its own block: the next start finds a trial that can't be recorded still RUNNING.
        for running in list(self.running.values()):
            with suppress(*recording_errors()):
                ended.append(self._interrupt(running))
        for trial, *_ in self.dispatcher.reused:
            with suppress(*recording_errors()):
                self.dispatcher.heartbeat.requeue(trial)
        for trial, _ in self.dispatcher.pending_runs:
            self.pool.stop(trial.number)
            with suppress(*recording_errors()):
                self.dispatcher.abandon_pending(trial, recorder)
        num_elsewhere = 0
        with suppress(*recording_errors()):
            num_elsewhere = self.dispatcher.heartbeat.num_elsewhere()
        with suppress(*recording_errors()):
            if recorder is not None and not num_elsewhere:  # else the last process ends it
                recorder.end_parent(self.outcome, reason=self.reason)
        table = None
        with suppress(*recording_errors()):
            table = trials_table(self.study)
        end = SweepEnded(outcome=self.outcome, reason=self.reason, trials=table, notes=self.notes)
        return [*ended, end]

    def _stop_requested(self) -> bool:
        """Return whether to stop. Retries call it, and it keeps the heartbeats going."""
        self._keep_alive()
        return self.interrupts()

    def _keep_alive(self) -> None:
        self.dispatcher.keep_alive(running.trial for running in self.running.values())

    def _drop_lost(self) -> Iterator[SweepEvent]:
        for number in self.dispatcher.drop_lost():
            if running := self.running.pop(number, None):
                yield running.ended("interrupted", "another process has resumed it")

    def _open_runs(self) -> Iterator[TrialStarted]:
        pending = self.dispatcher.pending_runs
        while pending:
            trial, config = pending[0]
            is_new = trial.number not in self.dispatcher.resumed
            self.dispatcher.run_requested.add(trial.number)
            open_run = self.recorder.open_run if is_new else self.recorder.reopen_run
            run = open_run(trial, config)
            running = RunningTrial(trial, config, run, is_new=is_new)
            self.running[trial.number] = running
            pending.pop(0)
            yield running.started()

    def _link_reused(self) -> Iterator[TrialReused]:
        """Give trials the results of finished trainings; a late start does what is left of it."""
        reused = self.dispatcher.reused
        while reused:
            trial, config, found = reused[0]
            reported = last_reported_epoch(trial)
            for epoch, accuracy in sorted(found.accuracies.items()):
                if epoch > reported:
                    trial.report(accuracy, epoch)
            # Last: of a trial whose run has ended, the next start only tells Optuna the outcome.
            set_attributes(self.study, trial, {"reused": True, "run_id": found.run_id})
            tell(self.study, trial, found.outcome, found.accuracy, found.val_loss)
            reused.pop(0)
            yield TrialReused(
                trial=trial.number,
                run_id=found.run_id,
                config=config,
                outcome=found.outcome,
                accuracy=found.accuracy,
            )

    def _receive(self, event: Event) -> Iterator[SweepEvent]:
        running = self.running.get(event.job)
        if running is None:  # a late event of a stopped trial
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
                text = f"resumes on another worker: {event.reason}"
                yield TrialNote(trial=event.job, text=text)
            case CheckpointLost():
                running.run.set_tags({"checkpoint_lost": event.reason})
                yield TrialNote(trial=event.job, text=event.reason)
            case JobFailed():
                if event.details:
                    running.run.log_text(event.details, "traceback.txt")
                if running.may_be_retried():
                    self.pool.submit(event.job, running.config)
                else:
                    yield self._end(running, "failed", event.error)

    def _end_without_run(self, event: Event, error: BaseException) -> TrialEnded:
        """End a trial whose run was deleted; raise any other error again."""
        running, tracker = self.running.get(event.job), self.recorder.tracker
        is_deleted = (
            running is not None
            and not is_transient(error)
            and tracker.find_run(running.run.run_id) is None
            # A deleted experiment may be restored, and then the trial resumes.
            and tracker.is_active()
        )
        if running is None or not is_deleted:
            raise error
        self.pool.stop(event.job)
        del self.running[event.job]
        tell(self.study, running.trial, "failed", running.accuracy, None)
        return running.ended("failed", "its run in MLflow was deleted")

    def _warm_up_export(self) -> None:
        if self.running:
            config = next(iter(self.running.values())).config
            self.recorder.warm_up_export(config, self.interrupts)

    def _should_prune(self, running: RunningTrial, event: EpochEnded) -> bool:
        # Pruning after the last epoch saves nothing.
        return event.number < running.config.epochs and running.trial.should_prune()

    def _end(self, running: RunningTrial, outcome: str, reason: str = "") -> TrialEnded:
        """Close the run, then tell Optuna."""
        running.run.end(outcome, reason=reason)
        del self.running[running.trial.number]  # its run has an outcome, even if Optuna fails
        tell(self.study, running.trial, outcome, running.accuracy, running.val_loss)
        self.failures_in_a_row = self.failures_in_a_row + 1 if outcome == "failed" else 0
        self.pool.forget(running.config)
        return running.ended(outcome, reason)

    def _interrupt(self, running: RunningTrial) -> TrialEnded:
        """Close the run. In Optuna the trial stays RUNNING, and the next start resumes it."""
        running.run.end("interrupted")
        self.dispatcher.heartbeat.abandon(running.trial)
        del self.running[running.trial.number]
        return running.ended("interrupted", "")
