"""Which trials of a study are alive: a sign of life for ours, and those that no process trains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tracking.store import make_whole

INTERVAL_SECONDS = 20
GRACE_SECONDS = 120
"""A trial whose last sign of life is older is taken to be abandoned."""


def open_storage(url: str) -> RDBStorage:
    """Open a storage that keeps signs of life of its trials."""
    make_whole(url, lambda draft: RDBStorage(draft).engine.dispose())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument ``heartbeat_interval`` is an experimental")
        return RDBStorage(url, heartbeat_interval=INTERVAL_SECONDS, grace_period=GRACE_SECONDS)


class Heartbeat:
    """Signs of life for the trials of one process.

    Optuna writes them from `Study.optimize` only, in a thread; with ask and tell, the loop does.
    """

    def __init__(self, study: Study, *, is_shared: bool) -> None:
        self.study, self.is_shared = study, is_shared
        self.storage: Any = study._storage  # it is an RDBStorage's, with a cache before it
        self.last = time.monotonic()

    def abandoned(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that no process trains.

        On a storage that is not shared that is all of them.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not self.is_shared:
            return running
        stale = set(self.storage._get_stale_trial_ids(self.study._study_id))
        return [trial for trial in running if trial._trial_id in stale]

    def ask(self) -> Trial:
        """Return a new trial of the study, with a first sign of life."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
            trial = self.study.ask()
        self.storage.record_heartbeat(trial._trial_id)
        return trial

    def take_up(self, abandoned: FrozenTrial) -> Trial:
        """Return a trial that no process trains, under its own number, with a sign of life."""
        self.storage.record_heartbeat(abandoned._trial_id)
        return Trial(self.study, abandoned._trial_id)

    def record(self, trials: Iterable[Trial]) -> None:
        """Give a sign of life for each, if it is time."""
        if time.monotonic() < self.last + INTERVAL_SECONDS:
            return
        self.last = time.monotonic()
        for trial in trials:
            self.storage.record_heartbeat(trial._trial_id)
