"""Heartbeats of a study's trials: ours are written, and orphaned ones are found.

On a storage that several processes share, a trial belongs to the process that wrote its last
heartbeat. A heartbeat replaces only the one that was read before. So of several processes that want
a trial one gets it, and a process that was suspended for too long finds that it has lost its own.
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

# Of Optuna's tables; it has no call that writes only if nobody else has.
HEARTBEATS = table("trial_heartbeats", column("trial_id"), column("heartbeat", sqlalchemy.DateTime))


class Heartbeat:
    """The heartbeats of one process' trials.

    Optuna writes them from `Study.optimize` only, in a thread; with ask and tell, the loop does.
    """

    def __init__(self, study: Study, *, is_shared: bool) -> None:
        self.study, self.is_shared = study, is_shared
        self.storage: TrialCache = study._storage  # type: ignore[assignment]
        self.retries = retries_of(study)
        self.last = time.monotonic()
        self.last_heartbeats: dict[int, datetime] = {}
        """The last heartbeat that we read or wrote, by the trial's id."""
        self.ours: set[int] = set()

    def orphaned(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that no process trains.

        On a storage that is not shared that is all of them.
        """
        running = self._elsewhere()
        if not self.is_shared or not running:
            return running
        if time.monotonic() < self.retries.last_away + 2 * INTERVAL_SECONDS:
            return []  # the storage was away: nobody could write a heartbeat
        read = self._read(running)
        for trial in running:
            if trial._trial_id not in read:
                # Its process has written none yet, or died before: this one will become too old.
                self.storage.record_heartbeat(trial._trial_id)
        self.last_heartbeats |= read
        now = self._now()
        old = {key for key, last in read.items() if (now - last).total_seconds() > GRACE_SECONDS}
        return [trial for trial in running if trial._trial_id in old]

    def num_elsewhere(self) -> int:
        """Return how many trials other processes are running; 0 on a storage that is not shared."""
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
        """Let the next process that asks for a trial have this one, which nothing was done for."""
        self.ours.discard(trial._trial_id)
        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def claim(self, orphaned: FrozenTrial) -> bool:
        """Make an orphaned trial ours, unless another process is faster."""
        if not self._write_heartbeat(orphaned._trial_id):
            return False
        self.ours.add(orphaned._trial_id)
        return True

    def resume(self, orphaned: FrozenTrial) -> Trial | None:
        """Return an orphaned trial under its own number; None if another process is faster."""
        return Trial(self.study, orphaned._trial_id) if self.claim(orphaned) else None

    def abandon(self, trial: Trial) -> None:
        """Make a trial that was begun an orphaned one at once."""
        if trial._trial_id in self.ours and self.is_shared:
            self._write_heartbeat(trial._trial_id, EXPIRED)
        self.ours.discard(trial._trial_id)

    def is_due(self) -> bool:
        """Return whether it is time for `record`."""
        return time.monotonic() >= self.last + INTERVAL_SECONDS

    def record(self, trials: Iterable[Trial]) -> list[Trial]:
        """Write a heartbeat for each, and return those that another process has resumed."""
        self.last = time.monotonic()
        trials = list(trials)
        now = self._now()
        # All in one transaction: to commit each takes seconds with 1,000 of them.
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
        """Return the RUNNING trials that are not ours, as they are by now."""
        self.storage.refresh()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial._trial_id not in self.ours]

    def _read(self, trials: Sequence[Trial | FrozenTrial]) -> dict[int, datetime]:
        """Return the last heartbeat of each trial that has one, by the trial's id."""
        ids = [trial._trial_id for trial in trials]
        read = select(HEARTBEATS).where(HEARTBEATS.c.trial_id.in_(ids))
        rows = transact(self.study, lambda connection: connection.execute(read).all())
        return dict(tuple(row) for row in rows)

    def _write_heartbeat(self, trial_id: int, when: datetime | None = None) -> bool:
        """Replace the last heartbeat that we know; False if another process has written one."""
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
        # Or this very one: written already, but the answer was lost.
        is_ours = HEARTBEATS.c.heartbeat.in_([self.last_heartbeats[trial_id], new])
        last = (HEARTBEATS.c.trial_id == trial_id) & is_ours
        return bool(
            connection.execute(HEARTBEATS.update().where(last).values(heartbeat=new)).rowcount
        )

    def _now(self) -> datetime:
        """Return the time by the database's clock, as it stands in heartbeats."""
        now: datetime = transact(
            self.study, lambda connection: connection.execute(select(func.now())).scalar_one()
        )
        return now.replace(tzinfo=None)
