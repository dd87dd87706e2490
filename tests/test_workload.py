from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_sweep import changed, small_settings

from cnn.data import Dataset
from experiments.comparison.plan import Planned
from experiments.comparison.workload import Workload, measure_rate

PLANNED = Planned(trainings={"mse": 12, "l1": 12}, others=2, epochs=5, images=1000)


def test_the_work_is_said_loss_by_loss_and_in_all() -> None:
    lines = list(Workload(PLANNED).lines(None))
    assert [re.sub(" +", " ", line) for line in lines] == [
        "mse 12 trainings 60 epochs",
        "l1 12 trainings 60 epochs",
        "to use 2 trainings 10 epochs",
        "in all 26 trainings 130 epochs",
    ]


def test_the_time_is_said_where_the_rate_is_known() -> None:
    work = Workload(PLANNED)
    seconds = work.expected_seconds(1300)
    assert list(work.lines(seconds))[-1] == "takes about 1:40, if no training is known already"
    assert work.expected_seconds(0) is None


def test_one_training_is_no_plural() -> None:
    small = replace(PLANNED, trainings={"mse": 1}, others=0, epochs=1)
    assert list(Workload(small).lines(None)) == [
        "mse     1 training  1 epoch",
        "in all  1 training  1 epoch",
    ]


def test_the_time_left_is_that_of_trainings_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    work = Workload(PLANNED)
    work.begin(5)
    assert work.place() == "5 of 26"
    work.count(reused=True)
    assert work.place() == "6 of 26"
    now[0] = 20.0
    work.count()
    work.count()
    assert work.place() == "8 of 26, 3:00 left"


def test_a_rate_is_measured_on_the_cpu(coloured_noise: Dataset, tmp_path: Path) -> None:
    settings = small_settings(f"sqlite:///{tmp_path / 'optuna.db'}")
    assert measure_rate(settings, coloured_noise) > 0


def test_the_rate_of_another_machine_is_unknown(coloured_noise: Dataset, tmp_path: Path) -> None:
    settings = small_settings(f"sqlite:///{tmp_path / 'optuna.db'}")
    elsewhere = changed(settings, worker_device="cpu")
    assert measure_rate(elsewhere, coloured_noise) == 0
