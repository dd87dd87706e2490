"""What went wrong, in one line: whether it may pass, and whose fault it is."""

from __future__ import annotations

import re

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
    # SQLAlchemy's, where the connection was lost amid a transaction; the next one is whole again.
    r"|Can't reconnect until invalid transaction is rolled back"
    r"|TEMPORARILY_UNAVAILABLE|database is locked",
    re.DOTALL | re.IGNORECASE,
)

# What MLflow's client says of its API, and of artifacts that come through the server.
_REFUSED_USER = re.compile(r"\b(401|403) (?:!= \d+|Client Error: \w+ for url: \S*/api/)")

_ASKED = re.compile(r"/api/[\d.]+/([\w/-]+)")


def is_refused_user(error: BaseException) -> bool:
    """Return whether an MLflow server said no because of who asked it."""
    return bool(_REFUSED_USER.search(str(error)))


def is_transient(error: BaseException) -> bool:
    """Return whether it is a disk, a database or a server that said no, and may not do so later."""
    return (
        isinstance(error, TransientError | AwayError)
        or any(part in str(error) for part in _TRANSIENT)
        or (not isinstance(error, ValueError) and is_database_away(error))
    )


class TransientError(ValueError):
    """A full disk, a database that is locked or read-only: no fault of what was asked for."""


class AwayError(Exception):
    """A server has not answered for as long as it was waited for."""


def is_database_away(error: BaseException) -> bool:
    """Return whether a database server, or what relays for it, says that it is away for now.

    Drivers have no common code for it, and MLflow's server hands on a text.
    """
    return bool(_DATABASE_AWAY.search(str(error)))


def refusal(line: str, error: BaseException) -> ValueError:
    """Return the error to raise, with this line, for one that a database has raised."""
    return (TransientError if is_transient(error) else ValueError)(without_passwords(line))


def without_passwords(text: str) -> str:
    """Return a text with the passwords of the URLs in it hidden."""
    # Up to the last @ before another URL, spaces, slashes and all: SQLAlchemy takes passwords that
    # are not escaped. A port, after which there is no @ in the same word, is none.
    text = re.sub(
        r"(?<=://)([^/@:\s]*):(?!\d{1,5}(?:[/\s'\",;:)]|$)(?!\S*@))(?:(?!://).)*@", r"\1:***@", text
    )
    return re.sub(r"(?<=password=)[^&'\"]*?(?=&|['\"]|\s\(|: |$)", "***", text)


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line, cut where it gets too long to read.

    Without passwords, and without the statement that SQLAlchemy adds: it is not the user's.
    """
    text = " ".join(str(error).split()).partition(" [SQL:")[0]
    if is_refused_user(error):
        text = _why_refused(text)
    text = without_passwords(text) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]} …"


def _why_refused(text: str) -> str:
    """Return what a server with users means that said no, and where to look."""
    from urllib.parse import urlsplit

    import mlflow
    from mlflow.utils.credentials import read_mlflow_creds

    refused, asked = _REFUSED_USER.search(text), _ASKED.search(text)
    of_registry = asked and asked[1].startswith(
        ("mlflow/registered-models", "mlflow/model-versions")
    )
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
