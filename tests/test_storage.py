"""The storage of studies: what is refused, and what is waited for."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from experiments.study.retrying_storage import RetryingStorage
from experiments.study.storage import (
    check_storage,
    open_storage,
    set_once,
    storage_errors,
    storage_retries,
)
from experiments.sweep import main
from tracking.errors import AwayError, is_database_away, is_transient
from tracking.retries import is_away
from tracking.store import check_tracking, check_uri


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without any store."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("optuna.db", "use sqlite:///optuna.db"),
        ("", "not the address of a database"),
        ("redis://localhost", "use sqlite:///optuna.db for a file"),
        ("postgres://u:secret@h/x", "postgresql+psycopg://USER@HOST/DATABASE for a server"),
        ("mssql://u@h/x", "can't be stored"),
        ("sqlite:///mlflow.db", "is also MLflow's database"),
        ("sqlite:///./mlflow.db", "is also MLflow's database"),
    ],
)
def test_a_storage_that_can_not_be_is_refused_with_what_can(
    folder: Path, url: str, said: str
) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        check_storage(url)
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("url", "mlflow"),
    [
        ("postgresql+psycopg://a@db:5432/x", "postgresql://b:p@db/x"),
        ("mysql+pymysql://a@127.0.0.1/x", "mysql://b@localhost:3306/x"),
    ],
)
def test_a_servers_database_is_not_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, mlflow: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    with pytest.raises(ValueError, match="is also MLflow's database"):
        check_storage(url)


def test_a_link_to_mlflows_database_is_mlflows_database(folder: Path) -> None:
    (folder / "mlflow.db").touch()
    (folder / "optuna.db").symlink_to("mlflow.db")
    with pytest.raises(ValueError, match="is also MLflow's database"):
        check_storage("sqlite:///optuna.db")


def test_neither_database_is_taken_for_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow_database: Path
) -> None:
    shutil.copy(empty_mlflow_database, folder / "runs.db")
    open_storage("sqlite:///studies.db")
    before = {file: (folder / file).read_bytes() for file in ("runs.db", "studies.db")}
    with pytest.raises(ValueError, match="a database of MLflow, not of Optuna's studies"):
        check_storage("sqlite:///runs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///studies.db")
    with pytest.raises(ValueError, match="a database of Optuna's studies, not MLflow's"):
        check_tracking()
    assert {file: (folder / file).read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("variables", "flags"),
    [({}, ["--storage", "sqlite:///mlflow.db"]), ({"MLFLOW_TRACKING_URI": "sqlite:///o.db"}, [])],
)
def test_a_sweep_that_would_mix_both_is_refused_before_anything_is_made(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits_cache: Path,
    variables: dict[str, str],
    flags: list[str],
) -> None:
    flags = flags or ["--storage", "sqlite:///o.db"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([*flags, "--workers", "1", "--data-dir", str(digits_cache)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is also MLflow's database" in line
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("127.0.0.1:5000", "use http://127.0.0.1:5000"),
        ("db.example.com:5000", "use http://db.example.com:5000"),
        ("runs.db", "use sqlite:///runs.db"),
        ("http://h:5000/#/experiments/1", "the address of a page: use http://h:5000"),
        ("http://u:secret@h:5000/#/experiments/1/runs?x", "use http://u:***@h:5000"),
        ("postgres://u@h/x", "which MLflow doesn't know"),
        ("redis://h", "which MLflow doesn't know"),
        ("sqlite://", "in memory"),
        ("sqlite:///", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite+pysqlite:///file:x?mode=memory&uri=true", "in memory"),
    ],
)
def test_an_address_that_is_no_tracking_store_is_refused_with_what_is(uri: str, said: str) -> None:
    with pytest.raises(ValueError, match="^MLFLOW_TRACKING_URI is [^\n]+$") as error:
        check_uri(uri)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://u:p@h/path",
        "sqlite:///mlflow.db",
        "sqlite:////home/memory.db",
        "sqlite:///memory:x.db",
        "postgresql+psycopg://u@h/x",
        "mysql+pymysql://u@h/x",
        "databricks",
        "databricks://profile",
        "uc:x",
    ],
)
def test_other_addresses_are_left_to_mlflow(uri: str) -> None:
    check_uri(uri)


def test_tables_of_another_optuna_are_one_line(folder: Path) -> None:
    open_storage("sqlite:///optuna.db")
    with sqlite3.connect(folder / "optuna.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    connection.close()
    with pytest.raises(ValueError, match=r"^the storage '[^\n]*' was made by another Optuna: "):
        open_storage("sqlite:///optuna.db")


# Waiting


class Server:
    """An Optuna storage of which every call fails so often, before it answers or after it did."""

    engine = "an engine"

    def __init__(self, failures: int, *, is_done: bool) -> None:
        self.failures, self.is_done = failures, is_done
        self.storage = optuna.storages.InMemoryStorage()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.storage, name)

        def failing(*args: Any) -> Any:
            if not self.failures:
                return call(*args)
            self.failures -= 1
            if self.is_done:
                call(*args)
            raise away()

        return failing


def away() -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    cause = psycopg.OperationalError("server closed the connection unexpectedly")
    error.__cause__ = sqlalchemy.exc.OperationalError("SELECT 1", {}, cause)
    return error


def ending(server: Server, seconds: float = 5) -> bool:
    """Make a trial, and end it through a storage that retries."""
    failures, server.failures = server.failures, 0
    study = server.create_new_study([optuna.study.StudyDirection.MAXIMIZE])
    trial = server.create_new_trial(study)
    server.failures = failures
    storage: Any = RetryingStorage(server, storage_retries(seconds, bool))  # type: ignore[arg-type]
    done: bool = storage.set_trial_state_values(trial, TrialState.COMPLETE, [1.0])
    assert storage.get_trial(trial).state == TrialState.COMPLETE
    return done


@pytest.mark.parametrize("is_done", [False, True])
def test_a_call_is_repeated_until_the_server_is_back(is_done: bool) -> None:
    assert ending(Server(2 if not is_done else 1, is_done=is_done))


def test_a_server_that_stays_away_is_given_up_in_a_line() -> None:
    start = time.monotonic()
    with pytest.raises(AwayError, match="^the storage doesn't answer: server closed the") as error:
        ending(Server(99, is_done=False), seconds=0.5)
    assert time.monotonic() - start < 5
    assert is_transient(error.value)


def test_what_is_no_absence_is_not_waited_out() -> None:
    server = Server(0, is_done=False)
    storage: Any = RetryingStorage(server, storage_retries(60, bool))  # type: ignore[arg-type]
    assert storage.engine == "an engine"
    with pytest.raises(KeyError):
        storage.get_trial(99)


@pytest.mark.parametrize(
    "text",
    [
        "connection failed: Connection refused\n\tIs the server running?",
        "connection to server on socket failed: No such file or directory",
        "terminating connection due to administrator command",
        "server closed the connection unexpectedly",
        "FATAL:  the database system is starting up",
        "FATAL:  the database system is shutting down",
        "FATAL:  sorry, too many clients already",
        "consuming input failed: server closed the connection",
        "the connection is lost",
        "(2003, \"Can't connect to MySQL server on 'h'\")",
        "(2013, 'Lost connection to MySQL server during query')",
        "Can't reconnect until invalid transaction is rolled back. Please rollback() fully",
    ],
)
def test_a_server_that_is_away_is_known_by_what_it_says(text: str) -> None:
    assert is_database_away(Exception(text))
    assert is_away(MlflowException(text))
    assert is_transient(sqlalchemy.exc.OperationalError("", {}, Exception(text)))


@pytest.mark.parametrize(
    "text",
    [
        'connection failed: FATAL: password authentication failed for user "u"',
        'FATAL: database "x" does not exist',
        "permission denied for table studies",
        "no such table: studies",
        "value too long for type character varying(512)",
    ],
)
def test_a_server_that_refuses_is_not_away(text: str) -> None:
    assert not is_database_away(Exception(text))


def test_who_agrees_when_an_answer_was_lost_has_its_own_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage("sqlite:///optuna.db", storage_retries(5, bool))
    study = optuna.create_study(storage=storage)
    lose_the_answer(monkeypatch, storage)
    assert set_once(study, "colour", "red") == "red"
    assert set_once(study, "colour", "blue") == "red"


def lose_the_answer(monkeypatch: pytest.MonkeyPatch, storage: Any) -> None:
    """Have the next transaction fail once it is committed."""
    begin: Callable[[], Any] = storage._backend.engine.begin
    lost = [away().__cause__]

    class Losing:
        def __init__(self) -> None:
            self.block = begin()

        def __enter__(self) -> Any:
            return self.block.__enter__()

        def __exit__(self, *exc: Any) -> Any:
            result = self.block.__exit__(*exc)
            if lost and exc[0] is None:
                raise lost.pop()  # type: ignore[misc]
            return result

    monkeypatch.setattr(storage._backend.engine, "begin", Losing)


def test_an_error_of_ours_is_not_one_of_the_storage() -> None:
    with pytest.raises(RuntimeError, match="ours"), storage_errors("sqlite:///x"):
        raise RuntimeError("ours")
