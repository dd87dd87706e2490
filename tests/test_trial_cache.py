"""What is read again of a study's trials; Optuna's own cache beside it reads all that may be."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

import experiments.study.trial_cache
from experiments.study.trial_cache import TrialCache


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    optuna.create_study(study_name="study", storage=url, direction="maximize")
    return url


@pytest.fixture
def study(url: str) -> Study:
    return optuna.load_study(study_name="study", storage=TrialCache(RDBStorage(url)))


@pytest.fixture
def theirs(url: str) -> Study:
    """The same study, as another process has it, with Optuna's own cache."""
    return optuna.load_study(study_name="study", storage=url)


def read_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that comes to hold the numbers of the trials that each read was of."""
    storage: Any = study._storage
    reads: list[list[int]] = []
    read = storage._backend._get_trials

    def noting(*args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = read(*args, **kwargs)
        reads.append([trial.number for trial in trials])
        return trials

    monkeypatch.setattr(storage._backend, "_get_trials", noting)
    return reads


@pytest.mark.parametrize("seed", range(5))
def test_it_answers_as_optuna_does_whatever_is_done(study: Study, theirs: Study, seed: int) -> None:
    dice = random.Random(seed)
    running: list[optuna.Trial] = []
    for step in range(60):
        action = dice.choice(["ask", "ask", "suggest", "report", "attribute", "tell", "wait"])
        trial = dice.choice(running) if running else None
        if action == "ask":
            running.append(study.ask())
        elif trial is None:
            continue
        elif action == "suggest":
            trial._suggest("x", FloatDistribution(0, 1))
        elif action == "report":
            trial.report(dice.random(), step)
        elif action == "attribute":
            trial.set_user_attr("step", step)
        elif action == "tell":
            running.remove(trial)
            state = dice.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
            study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state)
        else:
            running.remove(trial)
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        assert study.get_trials() == theirs.get_trials()


def test_of_the_trials_under_way_those_are_read_again_that_were_written_to(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [study.ask() for _ in range(4)]
    study.get_trials()
    reads = read_again(study, monkeypatch)
    study.get_trials()
    trials[2].report(0.5, 1)
    study.get_trials()
    study.get_trials()
    assert reads == [[], [2], []]


def test_a_trial_of_another_process_is_seen_at_once_and_its_progress_in_time(
    study: Study, theirs: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> list[TrialState]:
        return [trial.state for trial in study.get_trials()]

    study.get_trials()
    trial = theirs.ask()
    assert states() == [TrialState.RUNNING]
    theirs.tell(trial, 0.5)
    assert states() == [TrialState.RUNNING]
    monkeypatch.setattr(experiments.study.trial_cache, "REFRESH_SECONDS", 0)
    assert states() == [TrialState.COMPLETE]


def test_a_refresh_reads_what_other_processes_did(study: Study, theirs: Study) -> None:
    trial = theirs.ask()
    study.get_trials()
    theirs.tell(trial, 0.5)
    storage: Any = study._storage
    storage.refresh()
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE]


def test_a_waiting_trial_that_another_process_has_finished_is_not_asked_for(
    study: Study, theirs: Study
) -> None:
    theirs.enqueue_trial({"x": 0.5})
    study.get_trials()
    theirs.tell(theirs.ask(), 0.5)
    assert study.ask().number == 1
