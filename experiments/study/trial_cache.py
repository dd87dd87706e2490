"""A study's trials in memory: only what may have changed is read again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo

if TYPE_CHECKING:
    from experiments.study.retrying_storage import RetryingStorage

REFRESH_SECONDS = 10.0  # maximum age of what is known of running trials of other processes


class TrialCache(_CachedStorage):
    """Optuna's cache, which reads running trials less often.

    Optuna reads them on each request for trials: half a second with 1,000 workers, several times
    per trial. This cache reads a trial after this process has written to it, and those of other
    processes every `REFRESH_SECONDS`. New trials are always read.
    """

    def __init__(self, backend: RDBStorage | RetryingStorage) -> None:
        super().__init__(cast(RDBStorage, backend))
        self._written: set[int] = set()
        self._last_read: dict[int, int] = {}
        """The highest id of a trial, by study. The ids of a study's trials increase."""
        self._refreshed: dict[int, float] = {}

    def refresh(self) -> None:
        """Read all running trials again on the next request."""
        self._refreshed.clear()

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            unfinished, now = study.unfinished_trial_ids, time.monotonic()
            if now >= self._refreshed.get(study_id, 0.0) + REFRESH_SECONDS:
                self._refreshed[study_id] = now
                again = set(unfinished)
            else:
                again = unfinished & self._written
            trials = self._backend._get_trials(
                study_id,
                states=None,
                included_trial_ids=again,
                trial_id_greater_than=self._last_read.get(study_id, -1),
            )
            self._add_trials_to_cache(study_id, trials)
            for trial in trials:
                self._written.discard(trial._trial_id)
                if trial.state.is_finished():
                    unfinished.discard(trial._trial_id)
                else:
                    unfinished.add(trial._trial_id)
            if trials:
                self._last_read[study_id] = max(
                    self._last_read.get(study_id, -1), trials[-1]._trial_id
                )


def _noting(name: str) -> Callable[..., Any]:
    """Return a method of Optuna's cache that also notes which trial it writes."""
    write: Callable[..., Any] = getattr(_CachedStorage, name)

    @wraps(write)
    def method(self: TrialCache, trial_id: int, *args: Any, **kwargs: Any) -> Any:
        self._written.add(trial_id)
        return write(self, trial_id, *args, **kwargs)

    return method


for name in ("param", "state_values", "intermediate_value", "user_attr", "system_attr"):
    setattr(TrialCache, f"set_trial_{name}", _noting(f"set_trial_{name}"))
