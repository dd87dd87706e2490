"""The database of studies: opened, checked, locked, and retried while it is away.

A database that can't be opened is a ValueError of one line. If a server goes away later, calls are
retried for a limited time, as `tracking.retries` does for MLflow's server.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import optuna
import sqlalchemy
from alembic.util import CommandError
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from sqlalchemy import column, table

from experiments.interrupts import InterruptionError
from experiments.study.identity import name_of
from experiments.study.retrying_storage import RetryingStorage
from experiments.study.trial_cache import TrialCache
from tracking.errors import (
    AwayError,
    is_database_away,
    is_transient,
    one_line,
    refusal,
    without_passwords,
)
from tracking.files import open_own
from tracking.retries import ArtifactStoreError, RetryPolicy
from tracking.store import make_whole, sqlite_file, table_names, tracking_uri

Result = TypeVar("Result")

INTERVAL_SECONDS = 20  # interval of a trial's heartbeats
GRACE_SECONDS = 120  # a trial whose last heartbeat is older is orphaned

MAKING_TRIES, MAKING_PAUSE_SECONDS = 5, 1.0
"""Retries while another process makes the tables of a storage."""

CONNECT_SECONDS = 10  # how long to wait for a connection to a server

LONGEST_NAME = 400
"""Of a study, in characters: Optuna takes 512, and a comparison's stages append to it."""

EXAMPLES = "sqlite:///optuna.db for a file, postgresql+psycopg://USER@HOST/DATABASE for a server"
SERVERS = ("postgresql", "mysql", "mariadb")

# A table of Optuna's. Optuna has no call that writes only if no other process has.
ATTRIBUTES = table("study_user_attributes", *map(column, ("study_id", "key", "value_json")))


def storage_retries(seconds: float, should_stop: Callable[[], bool]) -> RetryPolicy:
    """Return the retry policy of an open storage."""
    return RetryPolicy(
        seconds=seconds, should_stop=should_stop, why_away=_why_away, why_refused=lambda _: None
    )


def _why_away(error: BaseException) -> str | None:
    cause = cause_of(error)
    is_away = is_database_away(error) or is_database_away(cause)
    return f"the storage doesn't answer: {one_line(cause)}" if is_away else None


def open_storage(url: str, retries: RetryPolicy | None = None) -> TrialCache:
    """Open a storage with heartbeats; make it if it does not exist.

    Args:
        url: of the database.
        retries: what to do when a server goes away later.
    """
    make_whole(url, lambda draft: RDBStorage(draft).engine.dispose())
    # Optuna would log what it does when a server goes away. We retry, and say so once.
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
    for tries_left in reversed(range(MAKING_TRIES)):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Argument ``heartbeat_interval`` is an exp")
                backend = RDBStorage(
                    url,
                    engine_kwargs=_engine_options(url),
                    heartbeat_interval=INTERVAL_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
            return TrialCache(RetryingStorage(backend, retries or storage_retries(0, bool)))
        except (RuntimeError, CommandError) as error:
            shown = without_passwords(url)
            line = f"the storage {shown!r} was made by another Optuna: {one_line(error)}"
            raise ValueError(line) from error
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError):
            # Another process made a table between Optuna's check and its CREATE.
            if not tries_left:
                raise
            time.sleep(MAKING_PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")


def _engine_options(url: str) -> dict[str, Any]:
    parsed = sqlalchemy.make_url(url)
    if parsed.get_backend_name() != "postgresql" or "connect_timeout" in parsed.query:
        return {}
    return {"connect_args": {"connect_timeout": CONNECT_SECONDS}}


def retries_of(study: Study) -> RetryPolicy:
    """Return the retry policy of a study's storage."""
    return _backend(study).retries


def _backend(study: Study) -> RetryingStorage:
    storage: Any = study._storage
    backend: RetryingStorage = storage._backend
    return backend


def transact(study: Study, do: Callable[[sqlalchemy.Connection], Result]) -> Result:
    """Return the result of a function in a transaction, retried while the server is away."""
    backend = _backend(study)

    def once() -> Result:
        with backend.engine.begin() as connection:
            return do(connection)

    return backend.retries.call(once)


def set_once(study: Study, key: str, value: Any) -> Any:
    """Set a study's attribute unless it has one, and return its value: the first process wins."""
    row = {"study_id": study._study_id, "key": key, "value_json": json.dumps(value)}
    with suppress(sqlalchemy.exc.IntegrityError):
        transact(study, lambda connection: connection.execute(ATTRIBUTES.insert().values(row)))
    return study.user_attrs[key]


def set_attributes(
    study: Study, trial: Trial | FrozenTrial, attributes: Mapping[str, object]
) -> None:
    """Set attributes of a trial. A resumed `Trial` would sample first."""
    for key, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, key, value)


def last_reported_epoch(trial: Trial) -> int:
    """Return the last epoch that was reported to Optuna, 0 for none."""
    return max(trial.storage.get_trial(trial._trial_id).intermediate_values, default=0)


def load_or_create(**options: Any) -> Study:
    """Load a study, or make it. Loading writes nothing, and so works on a full disk."""
    try:
        return optuna.load_study(**options)
    except KeyError:
        return optuna.create_study(direction="maximize", load_if_exists=True, **options)


def existing_name(
    storage: TrialCache, prefix: str, fingerprint: Mapping[str, Any], made: Mapping[str, Any]
) -> str:
    """Return the default name of a study: an existing study's, or a new one.

    Studies older than `made_with` were named without it. Such a study resumes, unless it was
    recorded since that it has other digests.
    """
    name, old_name = name_of(prefix, fingerprint, made), name_of(prefix, fingerprint)
    for each in (name, old_name):
        with suppress(KeyError):
            study = optuna.load_study(study_name=each, storage=storage)
            if study.user_attrs.get("made_with") in (None, made):
                return each
    return name


# Checks


def check_storage(url: str) -> None:
    """Raise ValueError for an address that can't store studies, or is MLflow's database.

    Neither this database nor MLflow's is made or changed.
    """
    shown = without_passwords(url)
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        meant = f"sqlite:///{url}" if url and "://" not in url else EXAMPLES
        raise ValueError(
            f"the storage {shown!r} is not the address of a database: use {meant}"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if sqlite_file(url) is None:
            raise ValueError(
                f"the storage {shown!r} is in memory, and lost with the process: use {EXAMPLES}"
            )
    elif backend not in SERVERS:
        raise ValueError(f"studies can't be stored in {shown!r}: use {EXAMPLES}")
    mlflow = tracking_uri()
    if _is_same_database(url, mlflow):
        raise ValueError(
            f"the storage {shown!r} is also MLflow's database, and both would be damaged: use "
            "another --storage, or another MLFLOW_TRACKING_URI"
        )
    with storage_errors(url):
        tables = table_names(url)
        if tables and "studies" not in tables and tables & {"alembic_version", "experiments"}:
            raise ValueError(
                f"the storage {shown!r} is a database of "
                f"{'MLflow' if 'experiments' in tables else 'something else'}, not of Optuna's "
                f"studies: use another, {EXAMPLES}"
            )


def _is_same_database(url: str, other: str) -> bool:
    one, two = sqlite_file(url), sqlite_file(other)
    if one is not None and two is not None:
        are_there = one.exists() and two.exists()
        return one.resolve() == two.resolve() or (are_there and one.samefile(two))
    try:
        first, second = _server_database(url), _server_database(other)
    except sqlalchemy.exc.ArgumentError:
        return False  # for example, the address of a tracking server
    return first == second and first[-1] is not None


def _server_database(address: str) -> tuple[str, str, int, str | None]:
    """Return backend, host, port and database of an address, with defaults filled in."""
    url = sqlalchemy.make_url(address)
    backend, host = url.get_backend_name(), str(url.host or url.query.get("host") or "localhost")
    ports = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
    host = "localhost" if host in ("127.0.0.1", "::1") else host
    return backend, host, url.port or ports.get(backend, 0), url.database


def check_study_name(name: str) -> None:
    """Raise ValueError for a name that is not possible in Optuna or in MLflow's searches."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(
            f"--study takes up to {LONGEST_NAME} printable characters, not {name[:80]!r}"
        )
    if "'" in name and '"' in name:
        raise ValueError(
            f"MLflow can't search for a name with both kinds of quotes: choose another --study "
            f"than {name}"
        )


# Errors


def recording_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of a server that is away, a full disk, a locked or read-only database."""
    errors: tuple[type[BaseException], ...] = (
        AwayError,
        ArtifactStoreError,
        StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        OSError,
    )
    if "mlflow.exceptions" in sys.modules:  # else it has raised nothing
        from mlflow.exceptions import MlflowException

        errors += (MlflowException,)
    return errors


def cause_of(error: BaseException) -> BaseException:
    """Return the database's own error, which Optuna or SQLAlchemy wrapped."""
    if isinstance(error, StorageInternalError):
        error = error.__cause__ or error
    return getattr(error, "orig", None) or error


@contextmanager
def start_errors() -> Iterator[None]:
    """Turn what a database or server raises, before anything is recorded, into one line."""
    try:
        yield
    except InterruptionError:
        raise  # MLflow may be half imported, and `recording_errors` would import from it
    except recording_errors() as error:
        raise refusal(one_line(cause_of(error)), error) from error


def outcome_of(error: BaseException) -> tuple[str, str]:
    """Return outcome and reason of a sweep that a recording error stopped.

    Only after a transient error does the same command continue the sweep.
    """
    return "interrupted" if is_transient(error) else "failed", one_line(cause_of(error))


@contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """Turn the errors of a storage into one line for the user."""
    errors = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, OSError, AwayError)
    try:
        yield
    except errors as error:
        cause = cause_of(error)
        shown = without_passwords(storage)
        raise refusal(f"the storage {shown!r} can't be opened: {one_line(cause)}", cause) from error
    except ImportError as error:
        line = f"the storage {without_passwords(storage)!r} needs a driver: {error}"
        raise refusal(line, error) from error


@contextmanager
def study_lock(storage: str, study: str) -> Iterator[None]:
    """Lock a study during a block, on a storage that only one process may write to.

    The operating system releases the lock of a dead process.

    Raises:
        ValueError: another process holds it, or the lock can't be written.
    """
    path = sqlite_file(storage)
    if path is None:
        yield
        return
    import fcntl

    key = hashlib.sha256(study.encode()).hexdigest()[:8]
    lock = path.with_name(f"{path.name}.{key}.lock")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_own(lock, is_shared=True, buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode().strip() or "?"
            raise ValueError(
                f"study {study!r} is being run by process {holder}: wait for it, stop it, or "
                "choose another --study"
            ) from error
        except OSError as error:
            raise refusal(f"can't lock study {study!r}: {error}", error) from error
        yield
