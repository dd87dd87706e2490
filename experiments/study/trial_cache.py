"""A study's trials, kept in memory: what changed is read again, and not all that may have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.trial import TrialState

if TYPE_CHECKING:
    from experiments.study.retrying_storage import RetryingStorage

REFRESH_SECONDS = 10.0
"""How old may be what is known of trials that are under way in other processes."""


class TrialCache(_CachedStorage):
    """Optuna's cache, but for when a trial that is under way is read again.

    Optuna does so whenever it is asked for any trials: half a second with 1,000 workers, several
    times a trial. Here it is once we have written to it, and for the sake of other processes every
    `REFRESH_SECONDS`. New trials are always read.
    """

    def __init__(self, backend: RDBStorage | RetryingStorage) -> None:
        super().__init__(cast(RDBStorage, backend))
        self._written: set[int] = set()
        self._last_read: dict[int, int] = {}
        """The highest id of a trial, by study. A study's trials are made in the order of ids."""
        self._refreshed: dict[int, float] = {}

    def refresh(self) -> None:
        """Have all trials that are under way be read again with the next ones."""
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

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter of a trial."""
        self._written.add(trial_id)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a trial's state, and values, unless it is over; return whether it was."""
        self._written.add(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set the value of a step."""
        self._written.add(trial_id)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of the user's."""
        self._written.add(trial_id)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's."""
        self._written.add(trial_id)
        super().set_trial_system_attr(trial_id, key, value)
