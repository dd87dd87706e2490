"""MLflow's tracking store, opened: what it can't do is a ValueError of one line.

`import tracking.store` is quick: MLflow is imported by what asks it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from tracking.errors import is_refused_user, one_line, refusal, without_passwords
from tracking.files import open_own

if TYPE_CHECKING:
    import mlflow

# What a server gets that doesn't answer, unless the user says otherwise. MLflow's own bounds (7
# retries, 120 seconds each) make a wrong address a matter of minutes.
_BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def tracking_uri() -> str:
    """Return where runs are recorded, without importing MLflow for it."""
    if "mlflow" in sys.modules:
        import mlflow

        with environment(default_store()):
            return str(mlflow.get_tracking_uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or default_store()["MLFLOW_TRACKING_URI"]


def default_store() -> dict[str, str]:
    """Return the environment that names this folder's `mlflow.db`, unless another store is named.

    MLflow's own default has the folder's name in it as in a web address, and makes a folder of that
    name beside it. Where an address can't hold the name, it is the one relative to this folder.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    file = str(Path("mlflow.db").absolute())
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{'mlflow.db' if _is_odd(file) else file}"}


def _is_odd(path: str) -> bool:
    """Return whether a path is written otherwise in an address, or means something else there.

    MLflow makes a folder of the name as it is written there. A space it reads as one.
    """
    return quote(path, safe="/ +") != path


def default_location(experiment: str) -> str | None:
    """Return where a new experiment's artifacts go, where MLflow's own way leads elsewhere.

    It takes a folder's name for a web address, in which `%` and `#` stand for something else.
    """
    folder = Path("mlruns").absolute()
    if sqlite_file(tracking_uri()) is None or not _is_odd(str(folder)):
        return None
    return f"{folder.as_uri()}/{quote(experiment, safe='')}"


def check_location(experiment: str, location: str) -> None:
    """Raise ValueError where a project was moved, and an experiment still names its old place.

    Args:
        experiment: its name.
        location: where its artifacts are, as MLflow notes it once and for all.
    """
    database = sqlite_file(tracking_uri())
    path = Path(unquote(location.removeprefix("file://")) if ":" in location else location)
    if database is None or not path.is_absolute() or path.parent.name != "mlruns":
        return
    old, new = path.parent, database.absolute().parent / "mlruns"
    if old.resolve() == new.resolve() or (old.parent.exists() and not (new / path.name).exists()):
        return
    is_gone = not old.parent.exists()
    folder, there, here = (shlex.quote(str(each)) for each in (old.parent, old, new))
    link = f"mkdir -p {folder} && ln -s {here} {there}"
    advice = f"if it was moved, let the old place lead here: {link}" if is_gone else "it is a copy"
    raise ValueError(
        f"experiment {experiment!r} keeps its models in {str(old)!r}, but this project's are in "
        f"{str(new)!r}: {advice}; or choose another --experiment"
    )


def check_tracking() -> None:
    """Raise ValueError for an address that no runs can be recorded at; nothing is made or changed.

    For a start that should be refused before anything is: MLflow itself takes a second to import.
    """
    uri = tracking_uri()
    check_uri(uri)
    check_database(uri, must_exist=False)


def check_uri(uri: str) -> None:
    """Raise ValueError for what is no address of a tracking store, and say what one looks like."""
    shown = without_passwords(uri)
    what = f"MLFLOW_TRACKING_URI is {shown!r}"
    scheme, colon, rest = uri.partition("://")
    if not colon:
        is_server = re.match(r"[\w.-]+:\d+", uri)
        if (":" in uri and not is_server) or uri == "databricks":
            return  # a store that MLflow knows, or has something to say about
        meant = f"http://{uri}" if is_server else f"sqlite:///{uri}"
        raise ValueError(f"{what}, no address of a tracking store: say {meant}")
    if scheme in ("http", "https"):
        if "#" in uri:
            server = f"{scheme}://{rest.partition('/')[0].partition('#')[0]}"
            raise ValueError(f"{what}, the address of a page: say {without_passwords(server)}")
    elif scheme.partition("+")[0] in ("postgres", "redis", "mongodb"):
        raise ValueError(
            f"{what}, which MLflow can't use: say http://HOST:PORT for a server, "
            "sqlite:///mlflow.db for a file, or postgresql+psycopg://USER@HOST/DATABASE"
        )
    elif re.fullmatch(r"sqlite(\+\w+)?:///?((file)?:memory:.*|.*\bmode=memory\b.*|\?.*)?", uri):
        raise ValueError(
            f"{what}, in memory: all runs would be gone with the process; say sqlite:///mlflow.db "
            "for a file"
        )


def table_names(url: str) -> set[str]:
    """Return the tables of a database; none where it is a file that isn't there."""
    import sqlalchemy

    file = sqlite_file(url)
    if file is not None and not file.exists():
        return set()
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def reading() -> AbstractContextManager[mlflow.MlflowClient]:
    """Open the tracking store to read from it; none is made where there is none.

    Raises:
        ValueError: it can't be opened, or refused something that was asked in the `with` block.
    """
    return _opened(must_exist=True)


def opening() -> AbstractContextManager[mlflow.MlflowClient]:
    """Open the tracking store, which is made where there is none; else like `reading`.

    The client serves beyond the block, with MLflow's own retries: a server that answered once is
    waited for.
    """
    return _opened(must_exist=False)


@contextmanager
def _opened(*, must_exist: bool) -> Iterator[mlflow.MlflowClient]:
    import mlflow
    import requests
    import sqlalchemy
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException

    bounds = {key: value for key, value in _BOUNDS.items() if key not in os.environ}
    with environment(bounds | default_store()):
        uri = mlflow.get_tracking_uri()
        try:
            check_uri(uri)
            check_database(uri, must_exist=must_exist)
            check_database(registry := mlflow.get_registry_uri(), must_exist=False)
            if not must_exist:
                for database in (uri, registry):
                    make_whole(database, _make_tables)
            yield mlflow.MlflowClient()
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError, CommandError) as error:
            if isinstance(error.__context__, requests.exceptions.RequestException):
                line = f"the MLflow server {uri} doesn't answer"
            elif is_refused_user(error):
                line = one_line(error)
            else:
                line = f"MLflow ({uri}): {one_line(getattr(error, 'orig', None) or error)}"
            raise refusal(line, error) from error


def _make_tables(uri: str) -> None:
    """Have MLflow make the tables of a database, and leave no connection open."""
    import mlflow

    with environment({"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"}):
        mlflow.MlflowClient(uri).get_experiment("0")


def make_whole(url: str, make: Callable[[str], None]) -> None:
    """Make an SQLite file with its tables, if it isn't there: all of them, or no file.

    Tables are made in many steps, MLflow's in seconds; a process that is killed meanwhile would
    leave a database that is refused from then on. So they are made in a draft beside the file,
    which takes its place once it is whole. Of several processes one does it, and the others wait.

    Args:
        url: of a database; where it is no SQLite file, there is nothing to do.
        make: makes the tables of the database at the URL that it is handed, and leaves it closed.

    Raises:
        OSError: it can't be made there.
        ValueError: what has the draft's name is no draft: see `tracking.files.check_own`.
    """
    file = sqlite_file(url)
    if file is None or file.exists():
        return
    import fcntl

    import sqlalchemy

    draft = file.with_name(f"{file.name}.draft")
    with open_own(draft, is_shared=True) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if not file.exists():
            stream.truncate(0)  # what a process that was killed left of it
            drafted = sqlalchemy.make_url(url).set(database=str(draft))
            try:
                with _without_syncing():
                    make(drafted.render_as_string(hide_password=False))
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(0)  # on a full disk, others need the room
                raise
            draft.rename(file)
    draft.unlink(missing_ok=True)  # the file is there: whoever has made another draft finds that


@contextmanager
def _without_syncing() -> Iterator[None]:
    """Have SQLite keep its journal in memory and not wait for the disk, as no draft needs it to."""
    import sqlalchemy

    def speed_up(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", speed_up)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", speed_up)


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite database; None for another, one in memory, or none at all."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return None
    name = parsed.database
    if parsed.get_backend_name() != "sqlite" or not name or name.startswith((":", "file:")):
        return None
    return Path(name)


def check_database(uri: str, *, must_exist: bool) -> None:
    """Raise ValueError for a database that isn't there or can't be opened; others are passed over.

    MLflow makes a database file that isn't there, with its folder, and tries for 100 seconds to
    open what can't be opened.
    """
    import sqlalchemy

    try:
        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)  # its driver is there
        if not _is_to_be_made(uri, must_exist=must_exist):
            tables = table_names(uri)
            if "studies" in tables and "experiments" not in tables:
                raise ValueError(
                    f"{without_passwords(uri)} is a database of Optuna's studies, not MLflow's: "
                    "MLFLOW_TRACKING_URI has to name another"
                )
    except sqlalchemy.exc.ArgumentError:
        return  # no database: a server, or what MLflow itself has something to say about
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        line = f"can't open the database {uri}: {one_line(getattr(error, 'orig', None) or error)}"
        raise refusal(line, error) from error


def _is_to_be_made(url: str, *, must_exist: bool) -> bool:
    """Return whether a database is a file that isn't there yet, but can be."""
    found = sqlite_file(url)
    if found is None or found.exists():
        return False
    file = found.absolute()
    if must_exist:
        raise ValueError(
            f"there are no runs here: MLflow's database {str(file)!r} does not exist "
            "(python -m experiments.sweep makes it; MLFLOW_TRACKING_URI can name another)"
        )
    if not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"can't make MLflow's database {str(file)!r}: there is no such folder, or it is "
            "read-only (MLFLOW_TRACKING_URI can name another)"
        )
    return True


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, for the whole process, while the `with` block lasts."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


DEFAULT_EXPERIMENT = "cnn-sweep"


def default_experiment() -> str:
    """Return the name of the experiment that is meant where none is named.

    That is the one which `mlflow run` or the user's environment has chosen, else `cnn-sweep`.
    """
    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return str(_client().get_experiment(experiment_id).name)
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def _client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


def quoted(value: str) -> str:
    """Return a value as MLflow's search language takes it: it knows two quotes, and no escape."""
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise ValueError(f"{value!r} holds both kinds of quotes: MLflow can't search for it")
