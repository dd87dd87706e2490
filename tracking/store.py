"""MLflow's tracking store, opened: what it can't do is a ValueError of one line.

`import tracking.store` is quick: MLflow is imported by what asks it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlflow
    import sqlalchemy

# What a server gets that doesn't answer, unless the user says otherwise. MLflow's own bounds (7
# retries, 120 seconds each) make a wrong address a matter of minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

_MESSAGE_LENGTH = 300


def reading() -> AbstractContextManager[mlflow.MlflowClient]:
    """Open the tracking store to read from it; none is made where there is none.

    Raises:
        ValueError: it can't be opened, or refused something that was asked in the `with` block.
    """
    return _opened(must_exist=True)


def opening() -> AbstractContextManager[mlflow.MlflowClient]:
    """Open the tracking store, which is made where there is none; else like `reading`.

    The client serves beyond the block, with MLflow's own patience: a server that answered once is
    waited for.
    """
    return _opened(must_exist=False)


@contextmanager
def _opened(*, must_exist: bool) -> Iterator[mlflow.MlflowClient]:
    import mlflow
    import requests
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    with environment({key: value for key, value in _PATIENCE.items() if key not in os.environ}):
        try:
            check_database(uri, must_exist=must_exist)
            yield mlflow.MlflowClient()
        except MlflowException as error:
            if isinstance(error.__context__, requests.exceptions.RequestException):
                line = f"the MLflow server {uri} doesn't answer"
            else:
                line = f"MLflow ({uri}): {one_line(error)}"
            raise ValueError(_without_passwords(line)) from error


def check_database(uri: str, *, must_exist: bool) -> None:
    """Raise ValueError for a database that isn't there or can't be opened; others are passed over.

    MLflow makes a database file that isn't there, with its folder, and tries for 100 seconds to
    open what can't be opened.
    """
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        if not _is_to_be_made(engine.url, must_exist=must_exist):
            sqlalchemy.inspect(engine).get_table_names()
    except sqlalchemy.exc.ArgumentError:
        return  # no database: a server, or what MLflow itself has something to say about
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        line = f"can't open the database {uri}: {one_line(getattr(error, 'orig', None) or error)}"
        raise ValueError(_without_passwords(line)) from error


def _is_to_be_made(url: sqlalchemy.URL, *, must_exist: bool) -> bool:
    """Return whether a database is a file that isn't there yet, but can be."""
    if url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return False
    file = Path(str(url.database)).absolute()
    if file.exists():
        return False
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


def _without_passwords(text: str) -> str:
    return re.sub(r"(?<=://)([^/@\s]*):[^/\s]*@", r"\1:***@", text)


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


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line, cut where it gets too long to read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]} …"
