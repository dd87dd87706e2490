"""RetryPolicy with a tracking server that is away: try again, within a bound, and lose nothing."""

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

# The second is what is left of an answer once MLflow's client has tried again itself.
_UNAVAILABLE = re.compile(r"failed with error code 50[234]|too many 50[234] error responses")

NOT_REPEATABLE = {"create_experiment", "create_run", "create_logged_model", "log_outputs"}
"""What a server may have done though its answer was lost: tried again by those who can tell."""


class TrackingAwayError(AwayError):
    """The tracking server has not answered for as long as it was waited for."""


class ArtifactStoreError(Exception):
    """The tracking server answers, but can neither store nor hand out artifacts."""


def refused_artifacts(error: BaseException) -> str | None:
    """Return that the server has no artifact store, in a line, if that is why a call failed.

    Whatever is wrong there (no boto3, a wrong bucket, no credentials), the server says it in its
    log alone: its client sees the error 500, or a connection that was closed.
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
    """Return that the tracking server is away, in a line, if that is what an error says."""
    from mlflow import get_tracking_uri

    if not is_away(error):
        return None
    where = without_passwords(get_tracking_uri())
    line = f"the MLflow server {where} doesn't answer"
    if is_locked(error):
        line = f"MLflow's database {where} is locked by another process"
    return f"{line}: {one_line(error)}"


@dataclass(kw_only=True)
class RetryPolicy:
    """How long to wait for a server that is away. It is lost once: then no call is waited for."""

    seconds: float = 0
    should_stop: Callable[[], bool] = lambda: False
    """Asked several times a second while waiting: once true, nothing is retried any more."""
    why_away: Callable[[BaseException], str | None] = why_away
    """Says in a line that an error is one to wait out; None for others, which are raised."""
    why_refused: Callable[[BaseException], str | None] = refused_artifacts
    """Says in a line what waiting does not mend, of an error that looks as if it did."""
    last_away: float = -math.inf
    """When it was waited for last, by `time.monotonic`."""

    def call(self, request: Callable[[], Result]) -> Result:
        """Call until the server answers.

        Raises:
            TrackingAwayError: it did not, for `seconds`.
            ArtifactStoreError: it did, but several times not to this.
        """
        deadline, pause, tries = time.monotonic() + self.seconds, FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                return request()
            except Exception as error:
                tries += 1
                line = self.why_away(error)
                # Once may be by chance: a server that was just started again.
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
    """An `MlflowClient` of which every call that can be repeated is, while the server is away."""

    def __init__(self, client: mlflow.MlflowClient, retries: RetryPolicy) -> None:
        self._client, self.retries = client, retries

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name in NOT_REPEATABLE:
            return call
        return lambda *args, **kwargs: self.retries.call(lambda: call(*args, **kwargs))


def is_away(error: BaseException) -> bool:
    """Return whether an error says that there is no answer, or that it can be had later."""
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


def is_locked(error: BaseException) -> bool:
    """Return whether an error says that another process holds an SQLite database."""
    return "database is locked" in str(error)
