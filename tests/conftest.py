"""Fixtures that several test modules share."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import torch
from hypothesis import settings
from sqlalchemy.event import listens_for

from cnn.config import TrainConfig
from cnn.data import Dataset, Split


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("tests", max_examples=60 if config.getoption("--slow") else 10)
    settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: add --slow to run it")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread, here and in the processes that tests start.

    Several that wait for each other crawl where others work too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_job_runners() -> Iterator[None]:
    """Have MLflow's servers start without their job runners, ten processes that nobody needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        yield


@pytest.fixture
def hangup_ends() -> Iterator[None]:
    """Have SIGHUP do what it does by default: under nohup it is ignored, by children, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all its tables: to make them takes two seconds, to copy them none."""
    from tracking_helpers import empty_database

    return empty_database(tmp_path_factory.getbasetemp())


@listens_for(sqlalchemy.Engine, "connect")
def do_not_wait_for_the_disk(connection: object, _: object) -> None:
    """Have SQLite leave it to the system when the disk is written: no test cuts the power."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


_ENGINES: set[sqlalchemy.Engine] = set()


@listens_for(sqlalchemy.Engine, "engine_connect")
def note_engine(connection: sqlalchemy.Connection) -> None:
    _ENGINES.add(connection.engine)


@pytest.fixture(autouse=True)
def no_connection_stays_open() -> Iterator[None]:
    """Close what Optuna and MLflow keep open, to use it again: they do until their process ends.

    An engine that is used again, by a fixture of a whole module, connects again.
    """
    yield
    while _ENGINES:
        _ENGINES.pop().dispose()


@pytest.fixture(scope="module")
def quiet_optuna() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Have the sweeps of all tests share the models that they record, and so their graphs.

    In use, a process has one sweep or a few, and tracing is a small part. In tests it was a third.
    """
    from cnn.networks import Classifier
    from experiments.study.models import Models

    classifier = Models._classifier
    of_data: dict[tuple[Any, ...], dict[tuple[str, str], Classifier]] = {}

    def shared(models: Models, config: TrainConfig) -> Classifier:
        models._classifiers = of_data.setdefault((models.data.classes, models.data.image_size), {})
        return classifier(models, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Models, "_classifier", shared)
        yield


@pytest.fixture
def mlflow_store(
    empty_mlflow_database: Path,
    traced_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Give the test an MLflow store of its own, in its own working folder; return its URI."""
    shutil.copy(empty_mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def coloured_noise() -> Dataset:
    """200 images of noise, reddish, greenish or bluish: a few epochs learn which.

    130 are for training, so that no even batch size divides them.
    """
    generator = torch.Generator().manual_seed(0)
    tints = torch.tensor([[150, 110, 110], [110, 150, 110], [110, 110, 150]])
    labels = torch.arange(200) % 3
    noise = 60 * torch.randn(200, 32, 32, 3, generator=generator)
    images = (tints[labels][:, None, None, :] + noise).clamp(0, 255).to(torch.uint8)
    train, validation, test = (
        Split(all_images=images, all_labels=labels, rows=rows)
        for rows in torch.randperm(200, generator=generator).split([130, 40, 30])
    )
    return Dataset(
        name="coloured noise",
        classes=("red", "green", "blue"),
        train=train,
        validation=validation,
        test=test,
        digest="0" * 32,
        source="tests/conftest.py",
    )


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that the decoded digits are in already."""
    from cnn.data import load

    folder = tmp_path_factory.mktemp("data")
    load("digits", data_dir=folder, seed=0)
    return folder
