"""The parts of `benchmarks.scaling`: what it measures with, and a small run of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_pool import FakePool, epoch, weights
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial
from postgresql import find_programs, server
from small_sweep import small_settings

from benchmarks import scaling
from benchmarks.earlier import lengthen
from benchmarks.scaling import Stopwatch
from benchmarks.simulation import SimulatedPool, epoch_of
from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.engine.base import EpochEnded, Event
from experiments.study.controller import sweep
from experiments.study.settings import Settings

CONFIG = TrainConfig(loss="mse", learning_rate=0.2, batch_size=16, epochs=3)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def events_until_idle(pool: SimulatedPool) -> list[Event]:
    events: list[Event] = []
    while pool.num_idle < pool.num_workers:
        events.extend(pool.wait(0.2))
    return events


def kinds(events: list[Event], job: int) -> list[Any]:
    of_job = [event for event in events if event.job == job]
    return [event.number if isinstance(event, EpochEnded) else "weights" for event in of_job]


def test_simulated_workers_take_the_time_that_training_would(clock: Clock) -> None:
    pool = SimulatedPool(2, epoch_seconds=3)
    for job in (0, 1):
        pool.submit(job, CONFIG)
    assert pool.num_idle == 0
    assert pool.all_busy == 0
    events = events_until_idle(pool)
    assert clock.now == pytest.approx(9, rel=0.1)
    for job in (0, 1):
        assert kinds(events, job) == [1, 2, 3, "weights"]
    assert pool.busy_seconds(0, 100) == pytest.approx(18, rel=0.1)
    assert pool.busy_seconds(2, 4) == pytest.approx(4)


def test_a_simulated_job_that_is_stopped_ends_after_the_epoch_under_way(clock: Clock) -> None:
    pool = SimulatedPool(1, epoch_seconds=3)
    pool.submit(0, CONFIG)
    while not (events := pool.wait(1)):
        pass
    pool.stop(0)
    assert kinds([*events, *events_until_idle(pool)], 0) == [1, 2, "weights"]


def test_simulated_workers_go_on_while_the_driver_does_something_else(clock: Clock) -> None:
    pool = SimulatedPool(1, epoch_seconds=3)
    pool.submit(0, CONFIG)
    clock.sleep(50)
    pool.stop(0)  # too late
    assert kinds(pool.wait(0), 0) == [1, 2, 3, "weights"]
    assert pool.busy_seconds(0, 50) == pytest.approx(9, rel=0.1)


def test_a_simulated_job_learns_and_the_better_the_closer_to_the_best_rate() -> None:
    def accuracy(number: int, learning_rate: float) -> float:
        config = TrainConfig(loss="mse", learning_rate=learning_rate, batch_size=16)
        return epoch_of(0, number, config).metrics["val/accuracy"]

    assert accuracy(20, 0.2) > accuracy(1, 0.2) + 0.3
    assert accuracy(20, 0.2) > accuracy(20, 0.002) + 0.3


def test_a_stopwatch_gives_each_part_its_own_time_without_what_is_within(clock: Clock) -> None:
    watch = Stopwatch()
    request = watch.counted(lambda: clock.sleep(1))
    inner = watch.timed("inner", request)

    def work() -> None:
        clock.sleep(2)
        inner()
        inner()

    watch.timed("outer", work)()
    assert watch.seconds == {"inner": [1, 1], "outer": [2]}
    assert watch.requests == {"inner": 2}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def databases(request: pytest.FixtureRequest, mlflow_store: str, tmp_path: Path) -> Iterator[str]:
    """Optuna's database, and MLflow's tables in another of the same kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'optuna.db'}"
        return
    pytest.importorskip("psycopg")
    if find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with server() as url:
        yield url
        gc.collect()  # connections that were let go, within this test and not in another


def settings(storage: str, trials: int) -> Settings:
    return small_settings(storage, losses=("mse",), trials=trials, pruner="one_epoch", study="long")


def worse_each_time(job: int, config: TrainConfig) -> Iterable[Event]:
    """The first is complete, and the others are pruned."""
    for number in range(1, config.epochs + 1):
        yield epoch(job, number, 0.9 - 0.1 * job + 0.01 * number)
    yield weights(job)


def in_optuna(trial: FrozenTrial) -> dict[str, Any]:
    attributes = {k: v for k, v in trial.user_attrs.items() if k != "run_id"}
    return {
        "state": trial.state,
        "values": trial.values,
        "params": trial.params,
        "distributions": trial.distributions,
        "epochs": trial.intermediate_values,
        "attributes": attributes,
        "ended": trial.datetime_complete,
    }


def in_mlflow(run: Run) -> dict[str, Any]:
    client = MlflowClient()
    histories = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    models = [client.get_logged_model(m.model_id) for m in run.outputs.model_outputs]
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k not in ("trial", "key")},
        "metrics": histories,
        "data": [given.dataset.digest for given in run.inputs.dataset_inputs],
        "models": [(m.params, sorted((v.key, v.value) for v in m.metrics)) for m in models],
    }


# Of a study's connections, which are let go with it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lengthened_study_has_copies_of_its_first_trials(
    databases: str, mlflow_store: str, coloured_noise: Dataset
) -> None:
    list(sweep(settings(databases, 3), coloured_noise, FakePool(worse_each_time)))
    lengthen(databases, mlflow_store, "long", 8, num_originals=3)
    lengthen(databases, mlflow_store, "long", 11, num_originals=3)
    study = optuna.load_study(study_name="long", storage=databases)
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(11))
    assert {trial.user_attrs["outcome"] for trial in trials} == {"complete", "pruned"}
    runs = [MlflowClient().get_run(trial.user_attrs["run_id"]) for trial in trials]
    assert len({run.info.run_id for run in runs}) == 11
    models = {model.model_id for run in runs for model in run.outputs.model_outputs}
    assert len(models) == sum(trial.user_attrs["outcome"] == "complete" for trial in trials)
    originals = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]
    for trial, run, original in zip(trials, runs, originals, strict=True):
        assert in_optuna(trial) == in_optuna(trials[original])
        assert in_mlflow(run) == in_mlflow(runs[original])
        assert run.data.tags["trial"] == str(trial.number)
    # The sweep goes on after them.
    list(sweep(settings(databases, 12), coloured_noise, FakePool(worse_each_time)))
    assert len(study.get_trials()) == 12


SMALL = "--history 3 --originals 2 --trials 2 --repeats 1 --epochs 3 --epoch-seconds 0.05"


@pytest.mark.slow
def test_a_small_run_measures_all_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SMALL.split(), "--server", "none", "--samplers", "random"]
    command += ["--workers", "1", "2", "--seconds", "1", "--limits", "4x0.05"]
    command += ["--limit-seconds", "1", "--figure", str(tmp_path / "figure.png")]
    before = Path.cwd()
    scaling.main(command)
    assert Path.cwd() == before
    out, _ = capsys.readouterr()
    assert out.count("\n| --- ") == 3
    assert "| `random`, `median` | 3 |" in out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_what_several_drivers_did_is_added_up() -> None:
    def driver(busy_seconds: float, waited: float) -> scaling.Measured:
        return scaling.Measured(
            workers=2,
            epoch_seconds=1,
            seconds=10,
            busy_seconds=busy_seconds,
            late_busy_seconds=busy_seconds / 2,
            fill_seconds=1,
            trials=3,
            epochs=7,
            processor_seconds=4,
            parts={"wait": [waited]},
            requests={},
            closing_seconds=0,
        )

    table = scaling.drivers_table({2: [driver(20, 5), driver(10, 0)]})
    # Full: 2 workers that take half of its time. Half idle: 1 worker takes all of it.
    assert table.splitlines()[-1] == "| 2 | 2 | 75.0% | 6 | 14 | 100% | 80% | 5 |"


def test_several_drivers_need_a_storage_that_can_be_shared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--parts", "drivers"])
    assert "several drivers share a study on --storage postgresql" in capsys.readouterr().err
