"""Heartbeats of a study's trials: this process writes its own, and finds orphaned trials.

On a storage that several processes share, a trial belongs to the process that wrote its last
heartbeat. A heartbeat is only written over the one that was read before. So only one process gets
an orphaned trial, and a process that was suspended notices that it has lost its trials.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime

import sqlalchemy
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import column, func, select, table

from experiments.study.storage import GRACE_SECONDS, INTERVAL_SECONDS, retries_of, transact
from experiments.study.trial_cache import TrialCache

EXPIRED = datetime(2000, 1, 1)

# A table of Optuna's. Optuna has no call that writes only if no other process has.
HEARTBEATS = table("trial_heartbeats", column("trial_id"), column("heartbeat", sqlalchemy.DateTime))


class Heartbeat:
    """The heartbeats of one process' trials.

    Optuna writes them in a thread, from `Study.optimize` only. Here the sweep's loop writes them.
    """

    def __init__(self, study: Study, *, is_shared: bool) -> None:
        self.study, self.is_shared = study, is_shared
        self.storage: TrialCache = study._storage  # type: ignore[assignment]
        self.retries = retries_of(study)
        self.last = time.monotonic()
        self.last_heartbeats: dict[int, datetime] = {}
        """The last heartbeat that was read or written, by the trial's id."""
        self.ours: set[int] = set()

    def orphaned(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that no process trains.

        On a storage that is not shared, these are all that are not ours.
        """
        running = self._elsewhere()
        if not self.is_shared or not running:
            return running
        if time.monotonic() < self.retries.last_away + 2 * INTERVAL_SECONDS:
            return []  # the storage was away: nobody could write a heartbeat
        read = self._read(running)
        for trial in running:
            if trial._trial_id not in read:
                # Its process has written none yet, or died before. This one expires in time.
                self.storage.record_heartbeat(trial._trial_id)
        self.last_heartbeats |= read
        now = self._now()
        old = {key for key, last in read.items() if (now - last).total_seconds() > GRACE_SECONDS}
        return [trial for trial in running if trial._trial_id in old]

    def num_elsewhere(self) -> int:
        """Return how many trials other processes run; 0 on a storage that is not shared."""
        return len(self._elsewhere()) if self.is_shared else 0

    def ask(self) -> Trial:
        """Return a new trial of the study, with its first heartbeat."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
            trial = self.study.ask()
        self.storage.record_heartbeat(trial._trial_id)
        if self.is_shared:
            self.last_heartbeats |= self._read([trial])
        self.ours.add(trial._trial_id)
        return trial

    def requeue(self, trial: Trial | FrozenTrial) -> None:
        """Give back a trial that has not begun: the next process that asks gets it."""
        self.ours.discard(trial._trial_id)
        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def claim(self, orphaned: FrozenTrial) -> bool:
        """Make an orphaned trial ours; False if another process was faster."""
        if not self._write_heartbeat(orphaned._trial_id):
            return False
        self.ours.add(orphaned._trial_id)
        return True

    def resume(self, orphaned: FrozenTrial) -> Trial | None:
        """Return an orphaned trial, now ours; None if another process was faster."""
        return Trial(self.study, orphaned._trial_id) if self.claim(orphaned) else None

    def abandon(self, trial: Trial) -> None:
        """Make a trial that has begun orphaned at once."""
        if trial._trial_id in self.ours and self.is_shared:
            self._write_heartbeat(trial._trial_id, EXPIRED)
        self.ours.discard(trial._trial_id)

    def is_due(self) -> bool:
        """Return whether `record` is due."""
        return time.monotonic() >= self.last + INTERVAL_SECONDS

    def record(self, trials: Iterable[Trial]) -> list[Trial]:
        """Write heartbeats for trials, and return those that another process has resumed."""
        self.last = time.monotonic()
        trials = list(trials)
        now = self._now()
        # One transaction: with 1,000 trials, single commits take seconds.
        if not self.is_shared:
            ours = HEARTBEATS.c.trial_id.in_([trial._trial_id for trial in trials])
            update = HEARTBEATS.update().where(ours).values(heartbeat=now)
            transact(self.study, lambda connection: connection.execute(update))
            return []
        lost = transact(
            self.study,
            lambda connection: [
                each for each in trials if not self._replace(connection, each._trial_id, now)
            ],
        )
        self.last_heartbeats |= {trial._trial_id: now for trial in trials}
        self.ours -= {trial._trial_id for trial in lost}
        return lost

    def _elsewhere(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that are not ours, read again."""
        self.storage.refresh()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial._trial_id not in self.ours]

    def _read(self, trials: Sequence[Trial | FrozenTrial]) -> dict[int, datetime]:
        """Return the last heartbeats by the ids of their trials."""
        ids = [trial._trial_id for trial in trials]
        read = select(HEARTBEATS).where(HEARTBEATS.c.trial_id.in_(ids))
        rows = transact(self.study, lambda connection: connection.execute(read).all())
        return dict(tuple(row) for row in rows)

    def _write_heartbeat(self, trial_id: int, when: datetime | None = None) -> bool:
        """Replace the last heartbeat that we know; False if another process wrote one."""
        if not self.is_shared:
            self.storage.record_heartbeat(trial_id)
            return True
        new = when or self._now()
        is_written = transact(
            self.study, lambda connection: self._replace(connection, trial_id, new)
        )
        self.last_heartbeats[trial_id] = new
        return is_written

    def _replace(self, connection: sqlalchemy.Connection, trial_id: int, new: datetime) -> bool:
        # It may be the new one already, if the answer to the first try was lost.
        is_ours = HEARTBEATS.c.heartbeat.in_([self.last_heartbeats[trial_id], new])
        last = (HEARTBEATS.c.trial_id == trial_id) & is_ours
        return bool(
            connection.execute(HEARTBEATS.update().where(last).values(heartbeat=new)).rowcount
        )

    def _now(self) -> datetime:
        """Return the time of the database's clock, as heartbeats have it."""
        now: datetime = transact(
            self.study, lambda connection: connection.execute(select(func.now())).scalar_one()
        )
        return now.replace(tzinfo=None)
