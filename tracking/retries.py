"""Retries while the tracking server is away: bounded in time, and nothing is lost."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tracking.errors import AwayError, is_database_away, one_line, without_passwords

if TYPE_CHECKING:
    import mlflow

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
LOOK_EVERY_SECONDS = 0.2
HEALTH_SECONDS = 5.0
TRIES_OF_ARTIFACTS = 4

# MLflow's client raises the second after its own retries.
_UNAVAILABLE = re.compile(r"failed with error code 50[234]|too many 50[234] error responses")

NOT_REPEATABLE = {"create_experiment", "create_run", "create_logged_model", "log_outputs"}
"""Calls that may have succeeded although the answer was lost: their callers check, then retry."""


class TrackingAwayError(AwayError):
    """The tracking server did not answer within the time that the retries had."""


class ArtifactStoreError(Exception):
    """The tracking server answers, but can neither store nor return artifacts."""


def refused_artifacts(error: BaseException) -> str | None:
    """Return a line if a call failed because the server's artifact store does not work, else None.

    The server writes the cause (no boto3, a wrong bucket, no credentials) to its log only. The
    client sees the error 500 or a closed connection.
    """
    from mlflow import get_tracking_uri

    uri = str(get_tracking_uri())
    if "/mlflow-artifacts/" not in str(error) or not uri.startswith("http") or not _is_well(uri):
        return None
    return (
        f"the MLflow server {without_passwords(uri)} answers, but can't store artifacts: its log "
        "says why (--artifacts-destination, boto3, credentials, bucket)"
    )


def _is_well(uri: str) -> bool:
    import requests

    try:
        return requests.get(f"{uri.rstrip('/')}/health", timeout=HEALTH_SECONDS).ok
    except requests.RequestException:
        return False


def why_away(error: BaseException) -> str | None:
    """Return a line if an error says that the tracking server is away, else None."""
    from mlflow import get_tracking_uri

    if not is_away(error):
        return None
    where = without_passwords(get_tracking_uri())
    line = f"the MLflow server {where} doesn't answer"
    if "database is locked" in str(error):
        line = f"MLflow's database {where} is locked by another process"
    return f"{line}: {one_line(error)}"


@dataclass(kw_only=True)
class RetryPolicy:
    """How long to retry while a server is away. After one failure, no later call is retried."""

    seconds: float = 0
    should_stop: Callable[[], bool] = lambda: False
    """Asked every 0.2 s while waiting: once it is true, nothing is retried."""
    why_away: Callable[[BaseException], str | None] = why_away
    """Returns a line for an error to retry, None for an error to raise."""
    why_refused: Callable[[BaseException], str | None] = refused_artifacts
    """Returns a line for an error that no retry mends, although it looks like one to retry."""
    last_away: float = -math.inf
    """When a call last failed, by `time.monotonic`."""

    def call(self, request: Callable[[], Result]) -> Result:
        """Call until the server answers.

        Raises:
            TrackingAwayError: it did not answer for `seconds`.
            ArtifactStoreError: it answers other requests, but failed this one several times.
        """
        deadline, pause, tries = time.monotonic() + self.seconds, FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                return request()
            except Exception as error:
                tries += 1
                line = self.why_away(error)
                # The first failure may be a restart of the server: `why_refused` is asked again.
                if tries in (1, TRIES_OF_ARTIFACTS) and (line is None or tries > 1):
                    refused = self.why_refused(error)
                    if refused is not None:
                        raise ArtifactStoreError(refused) from error
                if line is None:
                    raise
                self.last_away = time.monotonic()
                if self.last_away + pause > deadline or not self._sleep(pause):
                    self.seconds = 0
                    raise TrackingAwayError(line) from error
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _sleep(self, seconds: float) -> bool:
        """Sleep, and return whether to retry."""
        end = time.monotonic() + seconds
        while not self.should_stop():
            left = end - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, LOOK_EVERY_SECONDS))
        return False


class RetryingClient:
    """An `MlflowClient` that retries each repeatable call while the server is away."""

    def __init__(self, client: mlflow.MlflowClient, retries: RetryPolicy) -> None:
        self._client, self.retries = client, retries

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name in NOT_REPEATABLE:
            return call
        return lambda *args, **kwargs: self.retries.call(lambda: call(*args, **kwargs))


def is_away(error: BaseException) -> bool:
    """Return whether an error says that the server did not answer, or asks to come back later."""
    import requests
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException | requests.RequestException):
        return False
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, requests.ConnectionError | requests.Timeout):
            return True
        seen = seen.__cause__ or seen.__context__
    return bool(_UNAVAILABLE.search(str(error))) or is_database_away(error)
