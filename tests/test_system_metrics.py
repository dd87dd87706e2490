from __future__ import annotations

import pytest
from mlflow import MlflowClient

from tracking import system_metrics
from tracking.runs import Run
from tracking.system_metrics import SystemMetrics
from tracking.tracker import Tracker


@pytest.fixture
def run(mlflow_store: str) -> Run:
    return Tracker.open("tests").start_run("a run")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test can set."""
    now = [0.0]
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: now[0])
    return now


def steps(run: Run, metric: str) -> list[int]:
    history = MlflowClient().get_metric_history(run.run_id, metric)
    return [entry.step for entry in history]


def test_a_sample_is_logged_every_ten_seconds(run: Run, clock: list[float]) -> None:
    load = SystemMetrics(run)
    for clock[0] in range(25):
        load.log_if_due()
    assert steps(run, "system/cpu_utilization_percentage") == [1, 2]
    metrics = MlflowClient().get_run(run.run_id).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100


def test_a_run_that_is_resumed_goes_on_with_the_next_step(run: Run, clock: list[float]) -> None:
    for _ in range(2):
        load = SystemMetrics(run)
        clock[0] += 11
        load.log_if_due()
    assert steps(run, "system/cpu_utilization_percentage") == [1, 2]


def test_what_a_machine_can_not_tell_is_left_out(
    run: Run, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise OSError("Permission denied")

    monkeypatch.setattr("psutil.net_io_counters", lambda: None)  # where there is no device
    monkeypatch.setattr("psutil.disk_usage", broken)
    load = SystemMetrics(run)
    clock[0] = 11
    load.log_if_due()
    metrics = MlflowClient().get_run(run.run_id).data.metrics
    assert "system/cpu_utilization_percentage" in metrics
    assert not [name for name in metrics if "disk" in name or "network" in name]
