"""Errors as one line, and which of them are transient."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGE_LENGTH = 300

_TRANSIENT = (
    "database or disk is full",
    "database is locked",
    "readonly database",
    "Read-only file system",
    "No space left on device",
    "Disk quota exceeded",
    "requested and ",  # "5520384 requested and 8064 written", as NumPy says it
)

_DATABASE_AWAY = re.compile(
    r"server closed the connection|terminating connection|connection (?:is|was) (?:lost|closed)"
    r"|SSL connection has been closed|consuming input failed|the connection is (?:lost|closed)"
    r"|connection (?:failed|to server).*(?:refused|No such file|timeout|reset|unreachable)"
    r"|the database system is (?:starting up|shutting down|in recovery|not yet accepting)"
    r"|(?:too many clients|connection slots are reserved|could not fork new process)"
    r"|(?:Lost connection to|Can't connect to) MySQL|MySQL server has gone away"
    # SQLAlchemy raises this once after a lost connection; the next transaction works again.
    r"|Can't reconnect until invalid transaction is rolled back"
    r"|TEMPORARILY_UNAVAILABLE|database is locked",
    re.DOTALL | re.IGNORECASE,
)

# MLflow's client says the first of its API, the second of artifacts that the server relays.
_REFUSED_USER = re.compile(r"\b(401|403) (?:!= \d+|Client Error: \w+ for url: \S*/api/)")

_ASKED = re.compile(r"/api/[\d.]+/([\w/-]+)")


def is_refused_user(error: BaseException) -> bool:
    """Return whether an MLflow server refused the user (401 or 403)."""
    return bool(_REFUSED_USER.search(str(error)))


def is_transient(error: BaseException) -> bool:
    """Return whether a disk, a database or a server failed in a way that may pass."""
    return (
        isinstance(error, TransientError | AwayError)
        or any(part in str(error) for part in _TRANSIENT)
        or (not isinstance(error, ValueError) and is_database_away(error))
    )


class TransientError(ValueError):
    """A disk is full, or a database is locked or read-only: the same request may work later."""


class AwayError(Exception):
    """A server did not answer within the time that the retries had."""


@contextmanager
def refusals_ignored() -> Iterator[None]:
    """Ignore that MLflow refuses to store what its pages show only; raise transient errors."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if is_transient(error):
            raise


def is_database_away(error: BaseException) -> bool:
    """Return whether a database server is away for now, by the text of the error.

    Drivers have no common error code, and MLflow's server passes on text only.
    """
    return bool(_DATABASE_AWAY.search(str(error)))


def refusal(line: str, error: BaseException) -> ValueError:
    """Return the error to raise with this line: a TransientError if `error` is transient."""
    return (TransientError if is_transient(error) else ValueError)(without_passwords(line))


def without_passwords(text: str) -> str:
    """Return a text with the passwords of the URLs in it hidden."""
    # A password ends at the last @ before another URL: SQLAlchemy takes unescaped passwords, with
    # spaces and slashes. Digits that no @ follows in the same word are a port.
    text = re.sub(
        r"(?<=://)([^/@:\s]*):(?!\d{1,5}(?:[/\s'\",;:)]|$)(?!\S*@))(?:(?!://).)*@", r"\1:***@", text
    )
    return re.sub(r"(?<=password=)[^&'\"]*?(?=&|['\"]|\s\(|: |$)", "***", text)


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters.

    Passwords are hidden. The SQL statement that SQLAlchemy adds is left out.
    """
    text = " ".join(str(error).split()).partition(" [SQL:")[0]
    if is_refused_user(error):
        text = _why_refused(text)
    text = without_passwords(text) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]} …"


def _why_refused(text: str) -> str:
    """Return why a server with users refused a request, and what to set."""
    from urllib.parse import urlsplit

    import mlflow
    from mlflow.utils.credentials import read_mlflow_creds

    refused, asked = _REFUSED_USER.search(text), _ASKED.search(text)
    registry = ("mlflow/registered-models", "mlflow/model-versions")
    of_registry = asked and asked[1].startswith(registry)
    uri = mlflow.get_registry_uri() if of_registry else mlflow.get_tracking_uri()
    name, password = read_mlflow_creds()
    where = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if in_address := urlsplit(uri).username:
        name, password, where = in_address, "there is one", "the address"
    if "Invalid Host header" in text:
        return f"the MLflow server {uri} takes no requests by this name: see its --allowed-hosts"
    if refused and refused[1] == "403":
        code = f"403, {asked[1]}" if asked else "403"
        return f"the MLflow server {uri} does not permit user {name!r} to do this ({code})"
    if name is None or password is None:
        return f"the MLflow server {uri} asks who you are (401): set {where}"
    return f"the MLflow server {uri} knows no user {name!r} with this password (401): check {where}"
