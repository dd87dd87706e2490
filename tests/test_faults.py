"""Kills, full disks and servers that stop lose nothing: short versions of `benchmarks.faults`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import optuna
import pytest
from fake_pool import FakePool, script_of_ten
from mlflow import MlflowClient

import experiments.engine.processes
from benchmarks import faults, processes, recorded
from cnn.losses import PROBABILITIES
from cnn.networks import CNN, Classifier
from experiments.engine.base import Event
from experiments.sweep import main
from tracking.errors import is_transient
from tracking.models.recording import save_model
from tracking.store import make_whole

REPOSITORY = Path(__file__).parents[1]

# Processes that make MLflow's tables are forked from one that has imported it: that takes seconds.
KILLED_MAKERS = """
import os, sys, time
from pathlib import Path
from tracking.tracker import Tracker

def forked():
    child = os.fork()
    if not child:
        try:
            Tracker.open("tests")
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child

for size in map(int, sys.argv[1:]):
    folder = Path(str(size)).absolute()
    folder.mkdir()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    child = forked()
    made = [folder / "mlflow.db", folder / "mlflow.db.draft"]  # whichever it is
    while sum(os.stat(file).st_size for file in made if os.path.exists(file)) < size:
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    _, status = os.waitpid(forked(), 0)
    print(size, "is refused" if status else "is whole", flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_made_mlflows_tables_leaves_nothing_that_is_refused(
    tmp_path: Path,
) -> None:
    sizes = ["150000", "225000", "300000"]
    made = subprocess.run(
        [sys.executable, "-c", KILLED_MAKERS, *sizes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [f"{size} is whole" for size in sizes]


def table(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        database.execute("CREATE TABLE whole (x)")


def test_a_database_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "there.db"
    file.write_text("something")
    make_whole(f"sqlite:///{file}", table)
    assert file.read_text() == "something"


def test_of_several_that_make_a_database_one_does_and_the_others_wait(tmp_path: Path) -> None:
    makers: list[int] = []

    def slowly(url: str) -> None:
        makers.append(threading.get_ident())
        time.sleep(0.2)
        table(url)

    url = f"sqlite:///{tmp_path}/one.db"
    threads = [threading.Thread(target=make_whole, args=(url, slowly)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["one.db"]


def test_what_fails_to_make_a_database_leaves_none(tmp_path: Path) -> None:
    def failing(url: str) -> None:
        table(url)
        raise RuntimeError("no luck")

    url = f"sqlite:///{tmp_path}/one.db"
    with pytest.raises(RuntimeError, match="no luck"):
        make_whole(url, failing)
    assert not (tmp_path / "one.db").exists()
    make_whole(url, table)
    assert [file.name for file in tmp_path.iterdir()] == ["one.db"]


# The command line, with workers that do as a script says


class DisturbedPool(FakePool):
    """The pool that the command line opens; in the last epoch, something happens."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__(script_of_ten)
        self.happens = happens

    def wait(self, timeout: float) -> list[Event]:
        events = super().wait(timeout)
        if any((event.job, getattr(event, "number", 0)) == (1, 2) for event in events):
            self.happens()
        return events


def nothing() -> None:
    pass


def sweep(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object] = nothing) -> int:
    """Run the command line for two trials of two epochs, and return its exit code."""
    monkeypatch.setattr(
        experiments.engine.processes, "ProcessPool", lambda *_, **__: DisturbedPool(happens)
    )
    command = ["--trials", "2", "--epochs", "2", "--workers", "1", "--study", "faults"]
    command += ["--tracking-timeout", "0", "--pruner", "none", "--data-dir", os.environ["DATA"]]
    return main([*command, "--storage", "sqlite:///optuna.db?timeout=0.1"])


def stopped(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on standard error of a sweep that was stopped."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: ")
    assert line.endswith("; the same command continues the study")
    return line


def assert_nothing_is_lost(folder: Path) -> None:
    study = optuna.load_study(study_name="faults", storage=f"sqlite:///{folder}/optuna.db")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("cnn-sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [trial.value for trial in study.get_trials()] == [0.9, 0.89]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("trial", "of all") for run in runs) == ["0", "1", "of all"]
    for run in runs:
        if run.data.tags["role"] == "trial":
            history = client.get_metric_history(run.info.run_id, "val/accuracy")
            assert [entry.step for entry in history] == [1, 2]
            assert len(run.outputs.model_outputs) == 1


@pytest.fixture
def world(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> Path:
    """Give the test a working folder of its own, with MLflow's tables."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DATA", str(digits_cache))
    return Path.cwd()


@pytest.fixture
def disk(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a working folder that is a small file system."""
    folder = world / "disk"
    folder.mkdir()
    mounted = faults.small_disk(folder, megabytes=8)
    try:
        mounted.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"can't mount a file system: {error}")
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(world)
    mounted.__exit__(None, None, None)


def test_a_full_disk_is_told_from_bad_input_in_all_its_messages() -> None:
    for text in (
        "(sqlite3.OperationalError) database or disk is full",
        "[Errno 28] No space left on device: 'data'",
        "5520384 requested and 8064 written",
    ):
        assert is_transient(ValueError(f"can't use the data folder 'data': {text}"))
    assert not is_transient(ValueError("unknown loss 'mes'"))


@pytest.mark.parametrize("spare", [pytest.param(0, marks=pytest.mark.slow), 20_000])
def test_a_full_disk_stops_a_sweep_in_a_line_and_the_same_command_continues_it(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], spare: int
) -> None:
    assert sweep(monkeypatch, lambda: faults.fill(disk, spare=spare)) == 1
    assert "database or disk is full" in stopped(capfd)
    assert sweep(monkeypatch) == 1  # it is still
    assert re.search("database or disk is full|No space left", stopped(capfd))
    (disk / "ballast").unlink()
    assert sweep(monkeypatch) == 0
    assert_nothing_is_lost(disk)


@pytest.mark.parametrize("spare", [pytest.param(0, marks=pytest.mark.slow), 100_000])
def test_a_disk_that_is_full_from_the_first_start_on_is_one_line(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], spare: int
) -> None:
    ballast = faults.fill(disk, spare=spare)
    assert sweep(monkeypatch) == 1
    assert re.search("full|No space left", stopped(capfd))
    ballast.unlink()
    assert sweep(monkeypatch) == 0
    assert_nothing_is_lost(disk)


def test_a_locked_study_stops_a_sweep_in_a_line_and_the_same_command_continues_it(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = sqlite3.connect(world / "optuna.db", isolation_level=None)
    with closing(other):
        assert sweep(monkeypatch, lambda: other.execute("BEGIN EXCLUSIVE")) == 1
        assert "database is locked" in stopped(capfd)
        assert sweep(monkeypatch) == 1  # it is still
        assert "database is locked" in stopped(capfd)
        other.execute("ROLLBACK")
        assert sweep(monkeypatch) == 0
    assert_nothing_is_lost(world)


HOLDING = """
import sys, time
from experiments.study.storage import study_lock
with study_lock("sqlite:///optuna.db", "faults"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_sweep_of_a_study_is_refused_in_a_line_until_the_first_is_dead(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HOLDING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        assert sweep(monkeypatch) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"study 'faults' is being run by process {first.pid}: wait for it" in line
        first.kill()
    assert sweep(monkeypatch) == 0
    assert_nothing_is_lost(world)


def test_a_read_only_disk_is_one_line(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep(monkeypatch, lambda: faults.fill(disk, spare=0))  # so that something is left to do
    (disk / "ballast").unlink()
    capfd.readouterr()
    mount = ["mount", "--bind", str(disk), str(disk)]
    subprocess.run(mount, check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
        monkeypatch.chdir(disk)
        assert sweep(monkeypatch) == 1
        assert "Read-only file system" in stopped(capfd)
    finally:
        monkeypatch.chdir(disk.parent)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    monkeypatch.chdir(disk)
    assert sweep(monkeypatch) == 0
    assert_nothing_is_lost(disk)


def test_a_run_that_is_resumed_names_the_process_that_works_on_it_now(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(world / "optuna.db", isolation_level=None)) as other:
        sweep(monkeypatch, lambda: other.execute("BEGIN EXCLUSIVE"))
        other.execute("ROLLBACK")
    client = MlflowClient(f"sqlite:///{world}/mlflow.db")
    before = [run for run in client.search_runs(["1"]) if run.info.status != "FINISHED"]
    assert len(before) == 2  # the sweep's own, and that of the trial that was cut off
    for run in before:
        client.set_tag(run.info.run_id, "pid", "1")
        client.set_tag(run.info.run_id, "host", "elsewhere")
    sweep(monkeypatch)
    for run in before:
        tags = client.get_run(run.info.run_id).data.tags
        assert (tags["host"], tags["pid"]) == (platform.node(), str(os.getpid()))


def test_a_model_that_a_full_disk_does_not_take_raises_and_ends_no_process(disk: Path) -> None:
    faults.fill(disk, spare=300_000)
    model = Classifier(CNN(3), PROBABILITIES["softmax"]).eval()
    images = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, disk / "model", input_example=images, metadata={"classes": ["a", "b"]})


# Real sweeps

SMALL = faults.sweep_command(2, 2)
if taskset := shutil.which("taskset"):
    # One core and so one thread: two that wait for each other are slow on a busy machine.
    SMALL = (taskset, "--cpu-list", str(min(os.sched_getaffinity(0))), *SMALL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the records of the sweep that is disturbed below."""
    calm = faults.Sweep(folder=tmp_path_factory.mktemp("faults") / "calm", command=SMALL)
    faults.run_undisturbed(calm)
    return recorded.read(calm.folder)


@pytest.fixture
def disturbed(tmp_path: Path) -> faults.Sweep:
    (tmp_path / "sweep").mkdir()
    return faults.Sweep(folder=tmp_path / "sweep", command=SMALL)


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_as_the_undisturbed_one(
    undisturbed: dict[str, Any], disturbed: faults.Sweep
) -> None:
    process = disturbed.start()

    def wait_for(happened: Callable[[], object]) -> None:
        while not happened():
            assert not processes.ended(process, 0.01), disturbed.printed()

    try:
        # Not by time: machines differ. First while the tables are made.
        wait_for((disturbed.folder / "mlflow.db.draft").exists)
        process.kill()
        process.wait()
        process = disturbed.start()
        wait_for(lambda: disturbed.num_epochs() >= 1)
        os.kill(processes.children(process.pid)[0], signal.SIGKILL)
        wait_for(lambda: disturbed.num_epochs() >= 3)
        process.kill()
        process.wait()
        process = disturbed.start()
        assert process.wait() == 0, disturbed.printed()
    finally:
        process.kill()
        process.wait()
    assert recorded.compare(undisturbed, recorded.read(disturbed.folder)) == []


@pytest.mark.slow
def test_a_sweep_whose_server_stops_ends_as_the_undisturbed_one(
    undisturbed: dict[str, Any], disturbed: faults.Sweep
) -> None:
    at_once = faults.Faults(number=1, start_up=0.01, work=0, rng=Random(0))  # after an epoch
    with faults.without_server(disturbed, at_once) as sweep:
        assert not at_once.problems
        assert recorded.compare(undisturbed, recorded.read(sweep.folder, sweep.uri)) == []
    assert at_once.done.total() == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda found: found["trials"].pop(1), "there are 1 trials, not 2"),
        (lambda found: found["runs"].clear(), "trial 0 has 0 runs"),
        (lambda found: found["models"].add("another"), "model another belongs to no run"),
        (lambda found: found["probabilities"].update({"0": b""}), "trial 0: probabilities b''"),
        (lambda found: found["registered"].clear(), "registered is {}"),
    ],
)
@pytest.mark.slow
def test_what_a_sweep_lost_is_a_difference(
    undisturbed: dict[str, Any], change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    found = {name: copy(records) for name, records in undisturbed.items()}
    change(found)
    assert any(line.startswith(problem) for line in recorded.compare(undisturbed, found))
