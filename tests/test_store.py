"""MLflow's store: where it is, whatever the folder is called, and when it is another's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from tracking.selection import choose
from tracking.store import check_location, default_location, default_store, tracking_uri
from tracking.tracker import Tracker

REPOSITORY = Path(__file__).parents[1]
ODD_NAMES = ["100% sure #1", "été", "a%20b", "a?b"]


@pytest.fixture
def database(empty_mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is copied into a folder to make it one with an MLflow database."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return empty_mlflow_database


# Opens an experiment as a command does, stores an artifact, and reads it again; in each folder by a
# process of its own, forked from one that has imported MLflow, which takes seconds.
SCRIPT = """
import os, sys, mlflow
from tracking.cli import Parser, run_command
from tracking.tracker import Tracker

def run(options):
    tracker = Tracker.open("an experiment/with #%")
    run = tracker.start_run("a run")
    run.log_text("kept", "file.txt")
    run.end("complete")
    assert mlflow.artifacts.load_text(f"runs:/{run.run_id}/file.txt") == "kept"

for folder in sys.argv[1:]:
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert status == 0, folder
    else:
        os.chdir(folder)
        sys.exit(run_command(Parser(prog="tool"), run, []))
"""


def in_folders(*folders: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", SCRIPT, *folders],
        capture_output=True,
        cwd=folders[0],
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_folder_may_have_any_name(tmp_path: Path, database: Path) -> None:
    folders = [tmp_path / name for name in ODD_NAMES]
    for folder in folders:
        folder.mkdir()
        shutil.copy(database, folder / "mlflow.db")
    in_folders(*folders)
    assert {each.name for each in tmp_path.iterdir()} == set(ODD_NAMES)
    for folder in folders:
        (kept,) = folder.rglob("file.txt")
        assert kept.is_relative_to(folder / "mlruns")


@pytest.mark.slow
def test_mlflow_makes_its_database_beside_no_folder_of_an_encoded_name(tmp_path: Path) -> None:
    folder = tmp_path / "été, it's (1)"
    folder.mkdir()
    in_folders(folder)
    assert [each.name for each in tmp_path.iterdir()] == [folder.name]


def test_the_default_store_is_named_only_where_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:5000")
    assert default_store() == {}
    assert tracking_uri() == "http://h:5000"


def test_an_ordinary_folder_has_mlflows_own_place_for_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_location("x") is None


def project(folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a project with an experiment that has an artifact, and return its location."""
    folder.mkdir(parents=True)
    shutil.copy(database, folder / "mlflow.db")
    enter(folder, monkeypatch)
    tracker = Tracker.open("tests")
    tracker.start_run("a run").log_text("kept", "file.txt")
    return str(MlflowClient().get_experiment(tracker.experiment_id).artifact_location)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")


def test_a_project_that_was_moved_is_told_both_places_and_what_to_type(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    project(old, database, monkeypatch)
    old.rename(new)
    enter(new, monkeypatch)
    with pytest.raises(ValueError, match="^experiment 'tests' keeps its models in") as error:
        Tracker.open("tests")
    line = str(error.value)
    assert str(old / "mlruns") in line
    assert str(new / "mlruns") in line
    with pytest.raises(ValueError, match="keeps its models in"):
        choose("tests")
    assert not old.exists()
    # What it says to type mends it.
    command = line.partition("lead here: ")[2].partition("; or choose")[0]
    subprocess.run(["bash", "-c", command], check=True)
    tracker = Tracker.open("tests")
    (run,) = MlflowClient().search_runs([tracker.experiment_id])
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/file.txt") == "kept"


def test_a_copy_of_a_project_does_not_write_into_the_first(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    project(first, database, monkeypatch)
    shutil.copytree(first, copy)
    enter(copy, monkeypatch)
    with pytest.raises(ValueError, match="it is a copy; or choose another --experiment"):
        Tracker.open("tests")
    Tracker.open("another")


@pytest.mark.parametrize(
    "location",
    ["s3://bucket/1", "mlflow-artifacts:/1", "/elsewhere/artifacts/1", "file:///else/where/1"],
)
def test_another_place_for_artifacts_is_nobodys_old_one(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    project(tmp_path / "here", database, monkeypatch)
    check_location("tests", location)


def test_a_database_elsewhere_has_its_artifacts_where_it_was_used(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, elsewhere = tmp_path / "used", tmp_path / "elsewhere"
    used.mkdir()
    elsewhere.mkdir()
    shutil.copy(database, elsewhere / "mlflow.db")
    monkeypatch.chdir(used)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'mlflow.db'}")
    tracker = Tracker.open("tests")
    tracker.start_run("a run").log_text("kept", "file.txt")
    assert Tracker.open("tests").experiment_id == tracker.experiment_id
