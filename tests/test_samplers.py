"""What is suggested depends on a study's trials and its seed, and on no process' memory."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from experiments.study.domains import Choices, Range
from experiments.study.samplers import make_sampler
from experiments.study.space import Space

SPACE = Space(
    search={
        "loss": Choices(("l1", "mse", "cross_entropy")),
        "learning_rate": Range(0.001, 1.0, log=True),
        "batch_size": Choices((16, 32)),
    }
)


def suggested(name: str, *, resumed_each_time: bool) -> list[dict[str, Any]]:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, 0))
    for number in range(14):  # TPE's and the Gaussian process' own choices begin after ten
        if resumed_each_time:
            study.sampler = make_sampler(name, 0)
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, trial.params["learning_rate"] + number % 3)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", ["tpe", "random", "qmc", "gp"])
def test_a_sampler_that_lasts_suggests_what_a_new_one_would(name: str) -> None:
    undisturbed = suggested(name, resumed_each_time=False)
    assert undisturbed == suggested(name, resumed_each_time=True)
    assert len({str(params) for params in undisturbed}) == 14
