"""MLflow's tracking store: its address is checked, and its errors are ValueErrors of one line.

`import tracking.store` is quick: functions import MLflow when called.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from tracking.errors import is_refused_user, one_line, refusal, without_passwords
from tracking.files import open_own

if TYPE_CHECKING:
    import mlflow

Result = TypeVar("Result")

# Unless the user sets others: with MLflow's own, 7 retries of 120 s, a wrong address takes minutes.
_BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def tracking_uri() -> str:
    """Return the address that runs are recorded at. It does not import MLflow."""
    if "mlflow" in sys.modules:
        import mlflow

        with environment(default_store()):
            return str(mlflow.get_tracking_uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or default_store()["MLFLOW_TRACKING_URI"]


def default_store() -> dict[str, str]:
    """Return the environment that names this folder's `mlflow.db`, or {} if the user names a store.

    MLflow's own default quotes the folder's name as in a web address, and creates a folder of the
    quoted name. If the name needs quoting, the address is relative.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    file = str(Path("mlflow.db").absolute())
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{'mlflow.db' if _needs_quoting(file) else file}"}


def _needs_quoting(path: str) -> bool:
    """Return whether an address writes a path in another way. MLflow takes spaces as they are."""
    return quote(path, safe="/ +") != path


def default_location(experiment: str) -> str | None:
    """Return where a new experiment's artifacts go; None leaves the choice to MLflow.

    MLflow reads a folder's name as a web address, in which `%` and `#` mean something else.
    """
    folder = Path("mlruns").absolute()
    if sqlite_file(tracking_uri()) is None or not _needs_quoting(str(folder)):
        return None
    return f"{folder.as_uri()}/{quote(experiment, safe='')}"


def check_location(experiment: str, location: str) -> None:
    """Raise ValueError if a project was moved: MLflow never changes the location of artifacts."""
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
    """Raise ValueError for an address that no runs can be recorded at, before MLflow's import."""
    uri = tracking_uri()
    check_uri(uri)
    check_database(uri, must_exist=False)


def check_uri(uri: str) -> None:
    """Raise ValueError, with an example, for what is no address of a tracking store."""
    shown = without_passwords(uri)
    what = f"MLFLOW_TRACKING_URI is {shown!r}"
    scheme, colon, rest = uri.partition("://")
    if not colon:
        is_server = re.match(r"[\w.-]+:\d+", uri)
        if (":" in uri and not is_server) or uri == "databricks":
            return  # MLflow knows it, or has a message of its own
        meant = f"http://{uri}" if is_server else f"sqlite:///{uri}"
        raise ValueError(f"{what}, not the address of a tracking store: use {meant}")
    if scheme in ("http", "https"):
        if "#" in uri:
            server = f"{scheme}://{rest.partition('/')[0].partition('#')[0]}"
            raise ValueError(f"{what}, the address of a page: use {without_passwords(server)}")
    elif scheme.partition("+")[0] in ("postgres", "redis", "mongodb"):
        raise ValueError(
            f"{what}, which MLflow doesn't know: use http://HOST:PORT for a server, "
            "sqlite:///mlflow.db for a file, or postgresql+psycopg://USER@HOST/DATABASE"
        )
    elif re.fullmatch(r"sqlite(\+\w+)?:///?((file)?:memory:.*|.*\bmode=memory\b.*|\?.*)?", uri):
        raise ValueError(
            f"{what}, in memory, and lost with the process: use sqlite:///mlflow.db for a file"
        )


def table_names(url: str) -> set[str]:
    """Return the tables of a database; none if its file does not exist."""
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
    """Open the tracking store, which must exist, to read from it.

    Raises:
        ValueError: it can't be opened, or a request in the `with` block failed.
    """
    return _opened(must_exist=True)


def opening() -> AbstractContextManager[mlflow.MlflowClient]:
    """Open the tracking store, and create it if it does not exist; else like `reading`.

    The client works after the block as well, then with MLflow's own retries.
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
    """Let MLflow create the tables of a database, and leave no connection open."""
    import mlflow

    with environment({"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"}):
        mlflow.MlflowClient(uri).get_experiment("0")


def make_whole(url: str, make: Callable[[str], None]) -> None:
    """Create a missing SQLite file with all of its tables, or no file.

    Creating the tables takes MLflow seconds. A process killed meanwhile would leave a database that
    nothing opens. So a draft beside the file gets the tables, and then the name. Of several
    processes, one does this and the others wait.

    Args:
        url: of a database; if it is no SQLite file, nothing is done.
        make: creates the tables of the database at a URL, and closes it.

    Raises OSError if the file can't be created, and ValueError as `tracking.files.check_own` does.
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
            stream.truncate(0)  # a killed process may have left a part
            drafted = sqlalchemy.make_url(url).set(database=str(draft))
            try:
                with _without_syncing():
                    make(drafted.render_as_string(hide_password=False))
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(0)  # frees the space of a full disk
                raise
            draft.rename(file)
    draft.unlink(missing_ok=True)  # the file exists: a process with another draft sees that


@contextmanager
def _without_syncing() -> Iterator[None]:
    """Let SQLite keep its journal in memory and not wait for the disk: a draft needs neither."""
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
    """Return the file of an SQLite database; None for other databases, and for one in memory."""
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
    """Raise ValueError for a database that does not exist or can't be opened.

    MLflow itself would create a missing file with its folder, and retry for 100 seconds what can't
    be opened.
    """
    import sqlalchemy

    try:
        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)  # raises without a driver
        if not _can_be_created(uri, must_exist=must_exist):
            tables = table_names(uri)
            if "studies" in tables and "experiments" not in tables:
                raise ValueError(
                    f"{without_passwords(uri)} is a database of Optuna's studies, not MLflow's: "
                    "MLFLOW_TRACKING_URI has to name another"
                )
    except sqlalchemy.exc.ArgumentError:
        return  # no database: a server, or an address for which MLflow has a message of its own
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        line = f"can't open the database {uri}: {one_line(getattr(error, 'orig', None) or error)}"
        raise refusal(line, error) from error


def _can_be_created(url: str, *, must_exist: bool) -> bool:
    """Return whether a database is a file that does not exist yet and may be created."""
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


DEFAULT_EXPERIMENT, DEFAULT_METRIC = "cnn-sweep", "val/accuracy"


def default_experiment() -> str:
    """Return the experiment of `mlflow run` or of the user's environment, else `cnn-sweep`."""
    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        import mlflow

        return str(mlflow.MlflowClient().get_experiment(experiment_id).name)
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def none_if_missing(request: Callable[[], Result]) -> Result | None:
    """Return what MLflow answers to a request, None if what it asks for does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return request()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def quoted(value: str) -> str:
    """Return a value in quotes for MLflow's search language, which has two quotes and no escape."""
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise ValueError(f"{value!r} holds both kinds of quotes: MLflow can't search for it")
