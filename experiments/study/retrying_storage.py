"""Optuna's database storage, with retries while its server is away."""

from __future__ import annotations

from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from tracking.retries import RetryPolicy


class RetryingStorage:
    """Optuna's storage. Every call is retried while its server is away."""

    def __init__(self, backend: RDBStorage, retries: RetryPolicy) -> None:
        self._backend, self.retries = backend, retries

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self.retries.call(lambda: value(*args, **kwargs))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """Set a trial's state. A retry accepts a state that was set, if the answer was lost."""
        tries = 0

        def call() -> bool:
            nonlocal tries
            tries += 1
            try:
                return self._backend.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and self._backend.get_trial(trial_id).state == state:
                    return True
                raise

        return self.retries.call(call)
