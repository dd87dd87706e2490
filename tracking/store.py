"""MLflow's tracking store, opened for reading: what it can't do is a ValueError of one line.

`import tracking.store` is quick: MLflow is imported by what asks it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlflow
    import sqlalchemy

# What a server gets that doesn't answer, unless the user says otherwise. MLflow's own bounds (7
# retries, 120 seconds each) make a wrong address a matter of minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

_MESSAGE_LENGTH = 300


@contextmanager
def reading() -> Iterator[mlflow.MlflowClient]:
    """Open the tracking store to read from it; none is made where there is none.

    Raises:
        ValueError: it can't be opened, or refused something that was asked in the `with` block.
    """
    import mlflow
    import requests
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    with environment({key: value for key, value in _PATIENCE.items() if key not in os.environ}):
        try:
            check_database(uri)
            yield mlflow.MlflowClient()
        except MlflowException as error:
            if isinstance(error.__context__, requests.exceptions.RequestException):
                line = f"the MLflow server {uri} doesn't answer"
            else:
                line = f"MLflow ({uri}): {one_line(error)}"
            raise ValueError(_without_passwords(line)) from error


def check_database(uri: str) -> None:
    """Raise ValueError for a database that isn't there or can't be opened; others are passed over.

    MLflow makes a database file that isn't there, with its folder, and tries for 100 seconds to
    open what can't be opened.
    """
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        _check_file(engine.url)
        sqlalchemy.inspect(engine).get_table_names()
    except sqlalchemy.exc.ArgumentError:
        return  # no database: a server, or what MLflow itself has something to say about
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        line = f"can't open the database {uri}: {one_line(getattr(error, 'orig', None) or error)}"
        raise ValueError(_without_passwords(line)) from error


def _check_file(url: sqlalchemy.URL) -> None:
    if url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return
    file = Path(str(url.database)).absolute()
    if not file.exists():
        raise ValueError(
            f"there are no runs here: MLflow's database {str(file)!r} does not exist "
            "(python -m experiments.sweep makes it; MLFLOW_TRACKING_URI can name another)"
        )


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
