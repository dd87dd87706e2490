"""Several sweeps at a time on one study, in a real PostgreSQL."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from fake_pool import FakePool, fails, trains
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState
from postgresql import find_programs, server, start, stop
from small_sweep import small_settings

import experiments.engine.processes
import experiments.study.heartbeat
from cnn.data import Dataset
from experiments.engine.base import Event
from experiments.study.controller import sweep
from experiments.study.events import SweepEnded, TrialEnded, TrialProgressed, TrialStarted
from experiments.study.heartbeat import Heartbeat
from experiments.study.opening import open_study
from experiments.study.settings import Settings
from experiments.study.storage import open_storage, set_once
from experiments.sweep import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_programs() is None, reason="PostgreSQL is not installed"),
    # Of a study's connections, which are let go with it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    pytest.importorskip("psycopg")
    with server() as url:
        yield url


@pytest.fixture
def storage(postgresql: str) -> Iterator[str]:
    """Give the test a database of its own."""
    name = f"test{time.monotonic_ns()}"
    admin = sqlalchemy.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    yield sqlalchemy.make_url(postgresql).set(database=name).render_as_string(hide_password=False)
    gc.collect()  # connections that were let go, within this test and not in another


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat, "is_due", lambda self: True)
    monkeypatch.setattr(experiments.study.heartbeat, "GRACE_SECONDS", 1)


@pytest.fixture
def settings(mlflow_store: str, storage: str) -> Settings:
    return small_settings(storage, trials=6, epochs=2, study="shared")


def begin(settings: Settings, data: Dataset) -> Any:
    """Begin a sweep as another process would: it goes on as it is iterated."""
    return sweep(settings, data, FakePool(trains(lambda job, _: 0.9 - job / 100)))  # type: ignore[arg-type]


def runs() -> list[Run]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def assert_each_trial_was_trained_once(settings: Settings, data: Dataset) -> None:
    assert states(settings, data) == [TrialState.COMPLETE] * settings.trials
    by_trial = sorted(run.data.tags.get("trial", "parent") for run in runs())
    assert by_trial == [*map(str, range(settings.trials)), "parent"]
    assert {run.info.status for run in runs()} == {"FINISHED"}
    for run in runs():
        if run.data.tags["role"] == "trial":
            history = MlflowClient().get_metric_history(run.info.run_id, "val/accuracy")
            assert [entry.step for entry in history] == [1, 2]
            assert len(run.outputs.model_outputs) == 1


def alternate(*sweeps: Any) -> list[list[Any]]:
    """Have each sweep go on to its next event in turn, until all are through."""
    seen: list[list[Any]] = [[] for _ in sweeps]
    left = dict(enumerate(sweeps))
    while left:
        for number, events in list(left.items()):
            try:
                seen[number].append(next(events))
            except StopIteration:
                del left[number]
    return seen


def test_sweeps_of_one_study_share_its_trials(settings: Settings, coloured_noise: Dataset) -> None:
    settings = replace(settings, trials=2)
    first, second = alternate(*(begin(settings, coloured_noise) for _ in range(2)))
    for events in (first, second):
        assert sum(isinstance(event, TrialEnded) for event in events) == 1
        assert events[-1] == SweepEnded(outcome="complete", reason="")
    assert_each_trial_was_trained_once(settings, coloured_noise)


def test_a_trial_too_many_is_given_back_for_a_larger_total(
    settings: Settings, coloured_noise: Dataset
) -> None:
    settings = replace(settings, trials=1)
    first, second = begin(settings, coloured_noise), begin(settings, coloured_noise)
    next(first)
    with pytest.MonkeyPatch.context() as same_time:
        # What the second saw when the first had not asked yet.
        same_time.setattr("experiments.study.dispatch.num_begun", answers(0, 1))
        next(second)
    assert states(settings, coloured_noise) == [TrialState.RUNNING, TrialState.WAITING]
    for events in (first, second):
        list(events)
    assert states(settings, coloured_noise) == [TrialState.COMPLETE, TrialState.WAITING]
    list(begin(replace(settings, trials=2), coloured_noise))
    assert_each_trial_was_trained_once(replace(settings, trials=2), coloured_noise)


def states(settings: Settings, data: Dataset) -> list[TrialState]:
    return [trial.state for trial in open_study(settings, data).get_trials()]


def answers(*numbers: int) -> Callable[[object], int]:
    """Return a function that gives these answers, and then the last one again and again."""
    left = list(numbers)
    return lambda study: left.pop(0) if left[1:] else left[0]


def test_what_a_dead_process_left_is_resumed_while_another_runs(
    settings: Settings, coloured_noise: Dataset, short_grace: None
) -> None:
    settings = replace(settings, trials=3, timeout=60)  # without a look, it would wait for ever
    alive, dead = begin(settings, coloured_noise), begin(settings, coloured_noise)
    for events in (alive, dead):
        while not isinstance(next(events), TrialStarted):
            pass
    # From here on the second does nothing, as a process that was killed.
    assert {event.trial for event in alive if isinstance(event, TrialEnded)} == {0, 1, 2}
    assert_each_trial_was_trained_once(settings, coloured_noise)
    # It was only suspended: what it had is no longer its own, and it notices.
    *_, lost, ended = dead
    assert lost.reason == "another process has resumed it"
    assert ended == SweepEnded(outcome="complete", reason="")
    assert_each_trial_was_trained_once(settings, coloured_noise)


def test_what_a_dead_process_left_is_looked_for_though_signs_are_due_during_waits(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    class Waiting(FakePool):
        def wait(self, timeout: float) -> list[Event]:
            waited.append(timeout)
            return super().wait(timeout)

    def is_due(heartbeat: Heartbeat) -> bool:
        return bool(waited) and not waited.clear()  # type: ignore[func-returns-value]

    monkeypatch.setattr(Heartbeat, "is_due", is_due)
    monkeypatch.setattr(experiments.study.heartbeat, "GRACE_SECONDS", 1)
    settings = replace(settings, trials=2, timeout=60)
    dead = begin(settings, coloured_noise)
    while not isinstance(next(dead), TrialStarted):
        pass
    alive = sweep(settings, coloured_noise, Waiting(trains(lambda job, _: 0.9)))  # type: ignore[arg-type]
    assert {event.trial for event in alive if isinstance(event, TrialEnded)} == {0, 1}
    dead.close()


def test_an_interrupted_sweep_leaves_its_trials_to_the_others_at_once(
    settings: Settings, coloured_noise: Dataset
) -> None:
    settings = replace(settings, trials=2, timeout=60)  # less than the time of grace
    first = begin(settings, coloured_noise)
    while not isinstance(next(first), TrialStarted):
        pass
    first.close()
    events = list(begin(settings, coloured_noise))
    assert {event.trial for event in events if isinstance(event, TrialEnded)} == {0, 1}
    assert_each_trial_was_trained_once(settings, coloured_noise)


def test_of_two_that_want_an_orphaned_trial_one_gets_it(
    settings: Settings, coloured_noise: Dataset, short_grace: None
) -> None:
    dead, first, second = (
        Heartbeat(open_study(settings, coloured_noise), is_shared=True) for _ in range(3)
    )
    trial = dead.ask()
    time.sleep(1.1)
    for each in (first, second):
        assert [found.number for found in each.orphaned()] == [trial.number]
    (orphaned,) = second.orphaned()
    assert first.claim(orphaned)
    assert not second.claim(orphaned)
    assert second.orphaned() == []
    assert dead.record([trial]) == [trial]  # it is lost


def test_of_many_trials_those_lost_are_told_and_the_others_kept_alive(
    settings: Settings, coloured_noise: Dataset, short_grace: None
) -> None:
    slow, other = (Heartbeat(open_study(settings, coloured_noise), is_shared=True) for _ in "12")
    trials = [slow.ask() for _ in range(4)]
    time.sleep(1.1)
    orphaned = {trial.number: trial for trial in other.orphaned()}
    assert other.claim(orphaned[1])
    assert slow.record(trials) == [trials[1]]
    assert other.orphaned() == []
    assert slow.record([trials[0], *trials[2:]]) == []  # they are still its own


def test_a_process_that_died_before_its_first_heartbeat_is_noticed(
    settings: Settings, coloured_noise: Dataset, short_grace: None
) -> None:
    study = open_study(settings, coloured_noise)
    study._storage.create_new_trial(study._study_id)
    heartbeat = Heartbeat(study, is_shared=True)
    assert heartbeat.orphaned() == []
    time.sleep(1.1)
    assert [trial.number for trial in heartbeat.orphaned()] == [0]


def test_the_first_to_set_an_attribute_decides(settings: Settings, coloured_noise: Dataset) -> None:
    first, second = (open_study(settings, coloured_noise) for _ in range(2))
    assert set_once(first, "colour", "red") == "red"
    assert set_once(second, "colour", "blue") == "red"


MAKING = """
import sys, optuna
from experiments.study.storage import open_storage
print("ready", flush=True)
sys.stdin.readline()
study = optuna.create_study(study_name="x", storage=open_storage(sys.argv[1]), load_if_exists=True)
print(study.study_name)
"""


def test_processes_that_make_the_tables_at_the_same_time_all_get_them(storage: str) -> None:
    command = [sys.executable, "-W", "error", "-c", MAKING, storage]
    makers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(4)
    ]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    assert [maker.communicate(timeout=120)[0] for maker in makers] == ["x\n"] * 4
    assert optuna.get_all_study_names(open_storage(storage)) == ["x"]


def test_the_password_of_a_storage_is_written_nowhere(
    mlflow_store: str,
    storage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # The server asks for none, and takes any.
    url = sqlalchemy.make_url(storage).set(username="postgres", password="Secret/word")
    given = url.render_as_string(hide_password=False)
    assert "Secret" in given
    monkeypatch.setattr(
        experiments.engine.processes, "ProcessPool", lambda *_, **__: FakePool(fails)
    )
    command = ["--trials", "2", "--epochs", "2", "--workers", "1", "--storage", given]
    assert main([*command, "--study", "ours"]) == 1
    optuna.create_study(study_name="theirs", storage=given).ask()
    assert main([*command, "--study", "theirs"]) == 2
    assert main([*command[:-1], given.replace("psycopg", "nothing")]) == 2
    assert main([*command[:-1], str(url.set(host="/nowhere", query={}))]) == 1
    out, err = capfd.readouterr()
    assert "study 'theirs' in postgresql+psycopg://postgres:***@" in err
    assert "Traceback" not in err
    assert "Secret" not in out + err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "traceback.txt" for file in files)
    assert [file for file in files if b"Secret" in file.read_bytes()] == []
    study = optuna.load_study(study_name="ours", storage=given)
    assert "Secret" not in repr((study.user_attrs, study.get_trials()))


# A server that goes away


def away_for(url: str, seconds: float) -> threading.Thread:
    """Stop the server of a URL, and start it again after so long."""
    folder = Path(sqlalchemy.make_url(url).query["host"])
    stop(folder)

    def come_back() -> None:
        time.sleep(seconds)
        start(folder)

    thread = threading.Thread(target=come_back)
    thread.start()
    return thread


@pytest.mark.parametrize("when", [TrialStarted, TrialProgressed, TrialEnded])
def test_a_storage_that_restarts_is_waited_for(
    storage: str, mlflow_store: str, coloured_noise: Dataset, when: type
) -> None:
    settings = small_settings(storage, tracking_timeout=60)
    seen: list[Any] = []
    for event in sweep(settings, coloured_noise, FakePool(trains(lambda job, _: 0.9))):
        if isinstance(event, when) and not any(isinstance(each, when) for each in seen):
            away_for(storage, 1)
        seen.append(event)
    assert seen[-1] == SweepEnded(outcome="complete", reason="")
    assert len(seen[-1].trials) == 3
    study = open_study(settings, coloured_noise)
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 3
    assert {run.info.status for run in all_runs()} == {"FINISHED"}


def test_a_storage_that_stays_away_ends_a_sweep_in_a_line(
    storage: str, mlflow_store: str, coloured_noise: Dataset
) -> None:
    settings = small_settings(storage, tracking_timeout=0.5)
    folder = Path(sqlalchemy.make_url(storage).query["host"])
    seen: list[Any] = []
    try:
        for event in sweep(settings, coloured_noise, FakePool(trains(lambda job, _: 0.9))):
            if isinstance(event, TrialProgressed) and not any(type(e) is type(event) for e in seen):
                stop(folder)
            seen.append(event)
    finally:
        start(folder)
    ended = seen[-1]
    assert isinstance(ended, SweepEnded)
    assert ended.outcome == "interrupted"
    assert ended.reason.startswith("the storage doesn't answer: ")
    assert ended.trials is None
    # What could be closed is: MLflow was there all the time.
    assert {run.info.status for run in all_runs()} == {"KILLED"}
    *_, ended = sweep(settings, coloured_noise, FakePool(trains(lambda job, _: 0.9)))
    assert ended == SweepEnded(outcome="complete", reason="")


def all_runs() -> list[Run]:
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    return list(client.search_runs([experiment.experiment_id]))
