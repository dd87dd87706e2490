"""Which trials of a study are alive: a sign of life for ours, and those that no process trains.

On a storage that several processes share, each trial belongs to the process that wrote its last
sign of life. It is only ever written over the one that was read before: of several that want a
trial one gets it, and a process that was suspended for too long finds that it has lost its own.
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

from experiments.storage import GRACE_SECONDS, INTERVAL_SECONDS, patience_of, transact
from experiments.trial_cache import TrialCache

LONG_AGO = datetime(2000, 1, 1)

# Of Optuna's tables; it has no call that writes only if nobody else has.
SIGNS = table("trial_heartbeats", column("trial_id"), column("heartbeat", sqlalchemy.DateTime))


class Heartbeat:
    """Signs of life for the trials of one process.

    Optuna writes them from `Study.optimize` only, in a thread; with ask and tell, the loop does.
    """

    def __init__(self, study: Study, *, is_shared: bool) -> None:
        self.study, self.is_shared = study, is_shared
        self.storage: TrialCache = study._storage  # type: ignore[assignment]
        self.patience = patience_of(study)
        self.last = time.monotonic()
        self.signs: dict[int, datetime] = {}
        """The last sign of life that was read, or written by us, by the trial's id."""
        self.ours: set[int] = set()

    def abandoned(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that no process trains.

        On a storage that is not shared that is all of them.
        """
        running = self._elsewhere()
        if not self.is_shared or not running:
            return running
        if time.monotonic() < self.patience.last_away + 2 * INTERVAL_SECONDS:
            return []  # the storage was away: nobody could write a heartbeat
        read = self._read(running)
        for trial in running:
            if trial._trial_id not in read:
                # Its process has given none yet, or died before: in time, this one is too old.
                self.storage.record_heartbeat(trial._trial_id)
        self.signs |= read
        now = self._now()
        old = {key for key, sign in read.items() if (now - sign).total_seconds() > GRACE_SECONDS}
        return [trial for trial in running if trial._trial_id in old]

    def num_elsewhere(self) -> int:
        """Return how many trials other processes have under way, where they may."""
        return len(self._elsewhere()) if self.is_shared else 0

    def ask(self) -> Trial:
        """Return a new trial of the study, with a first sign of life."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
            trial = self.study.ask()
        self.storage.record_heartbeat(trial._trial_id)
        if self.is_shared:
            self.signs |= self._read([trial])
        self.ours.add(trial._trial_id)
        return trial

    def give_back(self, trial: Trial | FrozenTrial) -> None:
        """Leave a trial that nothing was done for to whoever asks for one next."""
        self.ours.discard(trial._trial_id)
        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def claim(self, abandoned: FrozenTrial) -> bool:
        """Make an abandoned trial ours, unless another process is faster."""
        if not self._sign(abandoned._trial_id):
            return False
        self.ours.add(abandoned._trial_id)
        return True

    def take_up(self, abandoned: FrozenTrial) -> Trial | None:
        """Return an abandoned trial under its own number; None if another process is faster."""
        return Trial(self.study, abandoned._trial_id) if self.claim(abandoned) else None

    def release(self, trial: Trial) -> None:
        """Leave a trial that was begun to whoever looks for abandoned ones."""
        if trial._trial_id in self.ours and self.is_shared:
            self._sign(trial._trial_id, LONG_AGO)
        self.ours.discard(trial._trial_id)

    def is_due(self) -> bool:
        """Return whether it is time for `record`."""
        return time.monotonic() >= self.last + INTERVAL_SECONDS

    def record(self, trials: Iterable[Trial]) -> list[Trial]:
        """Give a sign of life for each, and return those that another process has taken up."""
        self.last = time.monotonic()
        trials = list(trials)
        sign = self._now()
        # All in one transaction: to commit each takes seconds with 1,000 of them.
        if not self.is_shared:
            ours = SIGNS.c.trial_id.in_([trial._trial_id for trial in trials])
            update = SIGNS.update().where(ours).values(heartbeat=sign)
            transact(self.study, lambda connection: connection.execute(update))
            return []
        lost = transact(
            self.study,
            lambda connection: [
                each for each in trials if not self._write(connection, each._trial_id, sign)
            ],
        )
        self.signs |= {trial._trial_id: sign for trial in trials}
        self.ours -= {trial._trial_id for trial in lost}
        return lost

    def _elsewhere(self) -> list[FrozenTrial]:
        """Return the RUNNING trials that are not ours, as they are by now."""
        self.storage.refresh()
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial._trial_id not in self.ours]

    def _read(self, trials: Sequence[Trial | FrozenTrial]) -> dict[int, datetime]:
        """Return the last sign of life of each trial that has one, by the trial's id."""
        ids = [trial._trial_id for trial in trials]
        read = select(SIGNS).where(SIGNS.c.trial_id.in_(ids))
        rows = transact(self.study, lambda connection: connection.execute(read).all())
        return dict(tuple(row) for row in rows)

    def _sign(self, trial_id: int, sign: datetime | None = None) -> bool:
        """Write a sign of life over the last one known; False if there is another by now."""
        if not self.is_shared:
            self.storage.record_heartbeat(trial_id)
            return True
        sign = sign or self._now()
        is_written = transact(
            self.study, lambda connection: self._write(connection, trial_id, sign)
        )
        self.signs[trial_id] = sign
        return is_written

    def _write(self, connection: sqlalchemy.Connection, trial_id: int, sign: datetime) -> bool:
        # Or this very one: written already, but the answer was lost.
        is_ours = SIGNS.c.heartbeat.in_([self.signs[trial_id], sign])
        last = (SIGNS.c.trial_id == trial_id) & is_ours
        return bool(connection.execute(SIGNS.update().where(last).values(heartbeat=sign)).rowcount)

    def _now(self) -> datetime:
        """Return the time by the database's clock, as it stands in signs of life."""
        now: datetime = transact(
            self.study, lambda connection: connection.execute(select(func.now())).scalar_one()
        )
        return now.replace(tzinfo=None)
