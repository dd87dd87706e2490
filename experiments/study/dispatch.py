"""Which trial comes next: orphaned trials first, then new ones from the sampler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from cnn.config import TrainConfig
from experiments.engine.base import WorkerPool
from experiments.study.heartbeat import Heartbeat
from experiments.study.recorder import OBJECTIVE, Recorder
from experiments.study.reuse import FinishedTraining
from experiments.study.settings import Settings
from experiments.study.trials import num_begun, num_without_gain, tell
from tracking.store import sqlite_file

MAX_DISPATCH = 16
"""Trials dispatched in a row, before events are read: 1,000 idle workers would take minutes."""


class Dispatcher:
    """Gives trials to idle workers, and keeps the heartbeats of this process' trials."""

    def __init__(self, settings: Settings, study: Study, pool: WorkerPool) -> None:
        self.settings, self.study, self.pool = settings, study, pool
        self.space = settings.space()
        self.heartbeat = Heartbeat(study, is_shared=sqlite_file(settings.storage) is None)
        self.deadline = time.monotonic() + (settings.timeout or math.inf)
        self.pending_runs: list[tuple[Trial, TrainConfig]] = []
        """Trials that a worker has, and that have no run yet."""
        self.run_requested: set[int] = set()  # trials whose run was requested, so that it may exist
        self.resumed: set[int] = set()  # trials that another process began, and recorded in MLflow
        self.orphaned: list[FrozenTrial] = []
        """Trials that another process left unfinished, and that no worker has yet."""
        self.lost: set[int] = set()
        """Trials that another process has resumed, because our heartbeat was late."""
        self.is_check_due = False  # whether to look for orphaned trials again
        self.find_finished: Callable[[TrainConfig], FinishedTraining | None] | None = None
        """Finds a finished training, which is not made again; None: make all."""
        self.reused: list[tuple[Trial, TrainConfig, FinishedTraining]] = []
        """Trials that need no worker."""

    def has_more(self) -> bool:
        """Return whether a trial is left to start, counting those of all processes."""
        if time.monotonic() >= self.deadline:
            return False
        if self.orphaned:
            return True
        return num_begun(self.study) < self.settings.trials and not self.is_stalled()

    def is_stalled(self) -> bool:
        """Return whether enough trials have ended without a gain: see `Settings.patience`."""
        patience = self.settings.patience
        return bool(patience) and num_without_gain(self.study, self.settings.min_delta) >= patience

    def waits_for_others(self) -> bool:
        """Return whether other processes have trials that may become orphaned."""
        return time.monotonic() < self.deadline and self.heartbeat.num_elsewhere() > 0

    def dispatch(self) -> bool:
        """Give each idle worker a trial, and return whether more idle workers and trials are left.

        The run of a trial is opened while it trains.
        """
        end = len(self.pending_runs) + len(self.reused) + MAX_DISPATCH
        while self.pool.num_idle and self.has_more():
            if len(self.pending_runs) + len(self.reused) == end:
                return True
            trial = self._next_trial()
            if trial is not None:
                self._start(trial, self.space.suggest(trial))
        return False

    def _start(self, trial: Trial, config: TrainConfig) -> None:
        found = self.find_finished(config) if self.find_finished else None
        if found is None:
            self.pool.submit(trial.number, config)
            self.pending_runs.append((trial, config))
        else:
            self.reused.append((trial, config, found))

    def _next_trial(self) -> Trial | None:
        """Return an orphaned or a new trial; None if another process was faster."""
        if self.orphaned:
            trial = self.heartbeat.resume(self.orphaned.pop(0))
            if trial is not None:
                self.resumed.add(trial.number)
            return trial
        trial = self.heartbeat.ask()
        if trial.number < self.settings.trials:
            return trial
        self.heartbeat.requeue(trial)  # for a larger --trials: others asked at the same time
        return None

    def reconcile(self, recorder: Recorder) -> None:
        """Make Optuna and MLflow agree on orphaned trials, and find those to resume.

        A trial whose run has an outcome has ended: its process died before it told Optuna.
        """
        self.is_check_due, self.orphaned = False, []
        for trial in self.heartbeat.orphaned():
            run = recorder.find_run(trial)
            outcome = run.outcome() if run is not None else None
            if trial.number >= self.settings.trials and not trial.params:
                if self.heartbeat.claim(trial):  # one too many, see `_next_trial`
                    self.heartbeat.requeue(trial)
            elif run is None or outcome is None or outcome == "interrupted":
                self.orphaned.append(trial)
            elif self.heartbeat.claim(trial):
                if not trial.user_attrs.get("reused"):  # else the run is that of another trial
                    run.end(outcome)
                accuracy, val_loss = run.last_value(OBJECTIVE), run.last_value("val/loss")
                tell(self.study, trial, outcome, accuracy, val_loss)

    def recorded_epochs(self) -> dict[int, int]:
        """Return how many epochs of each trial to resume are recorded, by its number."""
        return {each.number: max(each.intermediate_values, default=0) for each in self.orphaned}

    def keep_alive(self, running: Iterable[Trial]) -> None:
        """Write the heartbeats of running and pending trials, if they are due."""
        if not self.heartbeat.is_due():
            return
        lost = self.heartbeat.record([*running, *(trial for trial, _ in self.pending_runs)])
        self.lost |= {trial.number for trial in lost}
        self.is_check_due = self.heartbeat.is_shared

    def drop_lost(self) -> set[int]:
        """Stop the trials that another process has resumed, and return their numbers."""
        lost, self.lost = self.lost, set()
        for number in lost:
            self.pool.stop(number)
        self.pending_runs = [each for each in self.pending_runs if each[0].number not in lost]
        return lost

    def abandon_pending(self, trial: Trial, recorder: Recorder | None) -> None:
        """Abandon a trial that has a worker and no run yet, or whose run could not be read."""
        may_have_run = trial.number in self.resumed | self.run_requested
        run = recorder.find_run(trial) if recorder is not None and may_have_run else None
        if run is not None:
            run.end("interrupted")
        if run is not None or trial.number in self.resumed:
            self.heartbeat.abandon(trial)
        else:
            self.heartbeat.requeue(trial)  # as if it had never been asked for
