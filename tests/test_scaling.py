"""The parts of `benchmarks.scaling`: what it measures with, and a small run of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.driver import Measured, Stopwatch
from benchmarks.simulation import SimulatedPool, epoch_of
from cnn.config import TrainConfig
from experiments.engine.base import EpochEnded, Event

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


SMALL = "--history 20 --trials 2 --repeats 1 --epochs 2 --samplers random --no-server"
SMALL += " --workers 4x0.05 --seconds 1"


@pytest.mark.slow
def test_a_small_run_measures_both(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path.cwd()
    scaling.main(SMALL.split())
    assert Path.cwd() == before
    out, _ = capsys.readouterr()
    assert out.count("\n| --- ") == 2
    assert "| `random`, `median` | 20 |" in out
    assert "\n| 4 | 0.05 |" in out


def test_what_a_driver_did_gives_its_efficiency_and_how_many_workers_it_would_feed() -> None:
    row = Measured(
        workers=2,
        epoch_seconds=1,
        seconds=10,
        late_busy_seconds=8,
        fill_seconds=1,
        trials=3,
        epochs=7,
        processor_seconds=4,
        memory=500,
        parts={"wait": [4, 1], "suggest": [2], "log to MLflow": [0.7]},
        requests={},
    )
    assert row.efficiency == 0.8  # 8 of 2 × 5 s
    assert row.would_feed == pytest.approx(3.2)  # 1.6 workers take half of its time
    assert row.milliseconds("log to MLflow") == pytest.approx(100)
    assert row.milliseconds("rest") == pytest.approx(1000 * 2.3 / 3)
    line = scaling.workers_table([row]).splitlines()[-1]
    assert line == "| 2 | 1 | 80.0% | 1 s | 3 | 7 | 50% | 40% | 3 |"


def test_a_study_can_not_be_shorter_than_what_its_copies_are_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--history", "1000", "19"])
    assert "--history must be ≥ 20, not 19" in capsys.readouterr().err
