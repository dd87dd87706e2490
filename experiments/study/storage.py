"""The database that studies are kept in: opened, checked, locked, and waited for when it is away.

What can't be opened is a ValueError of one line. A server that is away once a study is open is
waited for, within a bound, as `tracking.retries` does it for MLflow's.
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

from experiments.study.identity import name_of
from experiments.study.retrying_storage import RetryingStorage
from experiments.study.trial_cache import TrialCache
from tracking.errors import AwayError, is_database_away, one_line, refusal, without_passwords
from tracking.files import open_own
from tracking.retries import ArtifactStoreError, RetryPolicy
from tracking.store import make_whole, sqlite_file, table_names, tracking_uri

Result = TypeVar("Result")

INTERVAL_SECONDS = 20
"""Between two heartbeats of a trial."""
GRACE_SECONDS = 120
"""A trial whose last heartbeat is older is orphaned."""

MAKING_TRIES, MAKING_PAUSE_SECONDS = 5, 1.0
"""For a storage whose tables another process is making."""

CONNECT_SECONDS = 10
"""How long a server may take to answer that is connected to."""

LONGEST_NAME = 400
"""Of a study, in characters: Optuna takes 512, and those of a comparison's stages are longer."""

EXAMPLES = "sqlite:///optuna.db for a file, postgresql+psycopg://USER@HOST/DATABASE for a server"
SERVERS = ("postgresql", "mysql", "mariadb")

# Of Optuna's tables; it has no call that writes only if nobody else has.
ATTRIBUTES = table("study_user_attributes", *map(column, ("study_id", "key", "value_json")))


def storage_retries(seconds: float, should_stop: Callable[[], bool]) -> RetryPolicy:
    """Return how long a storage that is open is waited for when it goes away."""
    return RetryPolicy(
        seconds=seconds, should_stop=should_stop, why_away=_why_away, why_refused=lambda _: None
    )


def _why_away(error: BaseException) -> str | None:
    cause = cause_of(error)
    is_away = is_database_away(error) or is_database_away(cause)
    return f"the storage doesn't answer: {one_line(cause)}" if is_away else None


def open_storage(url: str, retries: RetryPolicy | None = None) -> TrialCache:
    """Open a storage that keeps heartbeats of its trials; it is made if it isn't there.

    Args:
        url: of the database.
        retries: how long to wait for a server that goes away later.
    """
    make_whole(url, lambda draft: RDBStorage(draft).engine.dispose())
    # It tells of what it tries otherwise when a server goes away: we wait, and say so once.
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
            # A table came to be between the look whether it was there and the making of it.
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
    """Return how long the storage of a study is waited for when it goes away."""
    storage: Any = study._storage
    retries: RetryPolicy = storage._backend.retries
    return retries


def transact(study: Study, do: Callable[[sqlalchemy.Connection], Result]) -> Result:
    """Return what a function returns of a transaction, which is repeated while it can't be had."""
    storage: Any = study._storage
    backend: RetryingStorage = storage._backend

    def once() -> Result:
        with backend.engine.begin() as connection:
            return do(connection)

    return backend.retries.call(once)


def set_once(study: Study, key: str, value: Any) -> Any:
    """Set an attribute of a study that has none, and return what it has: the first one decides."""
    row = {"study_id": study._study_id, "key": key, "value_json": json.dumps(value)}
    with suppress(sqlalchemy.exc.IntegrityError):
        transact(study, lambda connection: connection.execute(ATTRIBUTES.insert().values(row)))
    return study.user_attrs[key]


def set_attributes(
    study: Study, trial: Trial | FrozenTrial, attributes: Mapping[str, object]
) -> None:
    """Set attributes of a trial. A `Trial` could do it; a resumed one would sample first."""
    for key, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, key, value)


def last_reported_epoch(trial: Trial) -> int:
    """Return the last epoch that Optuna was told of, 0 for none."""
    return max(trial.storage.get_trial(trial._trial_id).intermediate_values, default=0)


def load_or_create(**options: Any) -> Study:
    """Load a study, or make it; to load one writes nothing, which a full disk would not take."""
    try:
        return optuna.load_study(**options)
    except KeyError:
        return optuna.create_study(direction="maximize", load_if_exists=True, **options)


def existing_name(
    storage: TrialCache, prefix: str, identity: Mapping[str, Any], made: Mapping[str, Any]
) -> str:
    """Return the name of the study that follows from what it is of.

    Studies that are older than `made_with` were named without it: one that is there goes on, unless
    it was noted since that it is of something else.
    """
    name, old_name = name_of(prefix, identity, made), name_of(prefix, identity)
    for each in (name, old_name):
        with suppress(KeyError):
            study = optuna.load_study(study_name=each, storage=storage)
            if study.user_attrs.get("made_with") in (None, made):
                return each
    return name


# What is refused


def check_storage(url: str) -> None:
    """Raise ValueError for what is no database that studies can be kept in, beside MLflow's.

    Nothing is made or changed: neither this database nor MLflow's.
    """
    shown = without_passwords(url)
    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        meant = f"sqlite:///{url}" if url and "://" not in url else EXAMPLES
        raise ValueError(
            f"the storage {shown!r} is no address of a database: say {meant}"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if sqlite_file(url) is None:
            raise ValueError(
                f"the storage {shown!r} is in memory, and gone with the process: say {EXAMPLES}"
            )
    elif backend not in SERVERS:
        raise ValueError(f"studies can't be kept in the storage {shown!r}: say {EXAMPLES}")
    mlflow = tracking_uri()
    if _is_same_database(url, mlflow):
        raise ValueError(
            f"the storage {shown!r} is MLflow's database, too, and both would be damaged: say "
            "another --storage, or another MLFLOW_TRACKING_URI"
        )
    with storage_errors(url):
        tables = table_names(url)
        if tables and "studies" not in tables and tables & {"alembic_version", "experiments"}:
            raise ValueError(
                f"the storage {shown!r} is a database of "
                f"{'MLflow' if 'experiments' in tables else 'something else'}, not of Optuna's "
                f"studies: say another, {EXAMPLES}"
            )


def _is_same_database(url: str, other: str) -> bool:
    files = sqlite_file(url), sqlite_file(other)
    if None not in files:
        one, two = files
        assert one is not None
        assert two is not None
        return one.resolve() == two.resolve() or (
            one.exists() and two.exists() and one.samefile(two)
        )
    try:
        servers = [sqlalchemy.make_url(each) for each in (url, other)]
    except sqlalchemy.exc.ArgumentError:
        return False  # the tracking server's address, say
    if None in (each.database for each in servers) or any(files):
        return False
    first, second = ((each.get_backend_name(), *_place(each), each.database) for each in servers)
    return first == second


def _place(url: sqlalchemy.URL) -> tuple[str, int]:
    ports = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
    host = url.host or url.query.get("host") or "localhost"
    local = {"127.0.0.1": "localhost", "::1": "localhost"}
    return local.get(str(host), str(host)), url.port or ports.get(url.get_backend_name(), 0)


def check_study_name(name: str) -> None:
    """Raise ValueError for a name that a study can't have, in Optuna and in MLflow's searches."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(
            f"--study takes up to {LONGEST_NAME} characters that can be shown, not {name[:80]!r}"
        )
    if "'" in name and '"' in name:
        raise ValueError(
            f"MLflow can't search for a name with both kinds of quotes: choose another --study "
            f"than {name}"
        )


# What goes wrong


def recording_errors() -> tuple[type[BaseException], ...]:
    """Return what a server that is away raises, a full disk, a locked or read-only database."""
    errors: tuple[type[BaseException], ...] = (
        AwayError,
        ArtifactStoreError,
        StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        OSError,
    )
    if "mlflow.exceptions" in sys.modules:  # else it has raised none
        from mlflow.exceptions import MlflowException

        errors += (MlflowException,)
    return errors


def cause_of(error: BaseException) -> BaseException:
    """Return what the database said, of an error that Optuna or SQLAlchemy made of it."""
    if isinstance(error, StorageInternalError):
        error = error.__cause__ or error
    return getattr(error, "orig", None) or error


@contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """Turn what is raised about a storage into one line for the user."""
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
    """Hold a study, on a storage that only one process may write to, until the block ends.

    A lock of the operating system's, which a dead process holds no longer.

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
            raise refusal(f"can't hold study {study!r}: {error}", error) from error
        yield
