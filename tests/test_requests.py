"""What a trial asks of MLflow's server: with many workers, requests are what a driver does most."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_pool import FakePool, trains
from small_sweep import small_settings

from cnn.data import Dataset
from experiments.study.controller import sweep
from experiments.study.events import TrialEnded
from experiments.study.settings import Settings
from tracking.retries import RetryingClient


@pytest.fixture
def settings(mlflow_store: str, tmp_path: Path) -> Settings:
    return small_settings(
        f"sqlite:///{tmp_path / 'optuna.db'}", losses=("mse",), trials=2, study="asked"
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The calls of MLflow's client, counted; nearly each is a request."""
    counted: Counter[str] = Counter()
    get = RetryingClient.__getattr__

    def counting(client: RetryingClient, name: str) -> Any:
        counted[name] += 1
        return get(client, name)

    monkeypatch.setattr(RetryingClient, "__getattr__", counting)
    return counted


def test_a_new_trial_is_recorded_in_few_requests(
    settings: Settings,
    coloured_noise: Dataset,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experiments.study.parent.INTERVAL_SECONDS", math.inf)
    pool = FakePool(trains(lambda job, _: 0.9 - job / 100))
    events = sweep(settings, coloured_noise, pool)
    first, second = (Counter(calls) for event in events if isinstance(event, TrialEnded))
    assert second - first == {
        "create_run": 1,
        "log_inputs": 1,
        "log_batch": 1 + settings.epochs + 1 + 1,  # params, epochs, the model's metrics, outcome
        "get_run": 1,
        "search_logged_models": 1,
        "create_logged_model": 1,
        "log_model_artifacts": 1,
        "set_logged_model_tags": 1,  # the digests of its files
        "finalize_logged_model": 1,
        "log_outputs": 1,
        "set_terminated": 1,
    }
