"""The trials of a study, read from Optuna and told to it."""

from __future__ import annotations

import math
from datetime import datetime

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.study.parameters import BY_NAME, searched
from experiments.study.ranking import best_first
from experiments.study.storage import set_attributes

# The table's columns; the searched parameters stand between the second and the third.
TRIALS_COLUMNS = ("trial", "outcome", "epochs", "val_accuracy", "val_loss", "run_id")

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

STATES = {
    "complete": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""Optuna's state for each outcome."""


def trials_table(study: Study) -> pd.DataFrame:
    """Return the finished trials with their parameters and results, the best first."""
    names = list(searched(study.user_attrs.get("settings", {})) or BY_NAME)
    rows = [
        {
            "trial": trial.number,
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            **{name: trial.params.get(name) for name in names},
            "epochs": len(trial.intermediate_values),
            "val_accuracy": _last_value(trial),
            "val_loss": trial.user_attrs.get("val_loss"),
            "run_id": trial.user_attrs.get("run_id"),
        }
        for trial in finished_trials(study)
    ]
    columns = [*TRIALS_COLUMNS[:2], *names, *TRIALS_COLUMNS[2:]]
    return best_first(pd.DataFrame(rows, columns=columns)).reset_index(drop=True)


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that ended, in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def num_finished(study: Study) -> int:
    """Return how many trials have ended."""
    return len(finished_trials(study))


def num_begun(study: Study) -> int:
    """Return how many trials have ended or are running, in all processes."""
    return len(study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))


def best_trial(study: Study) -> tuple[float, int] | None:
    """Return accuracy and number of the best complete trial, None if there is none."""
    complete = trials_table(study).query("outcome == 'complete'")
    return (complete["val_accuracy"].iloc[0], complete["trial"].iloc[0]) if len(complete) else None


def num_without_gain(study: Study, min_delta: float) -> int:
    """Return how many trials ended after the last one that raised the best accuracy by enough."""
    best, count = -math.inf, 0
    for trial in sorted(finished_trials(study), key=_ended_at):
        accuracy = _last_value(trial) if trial.user_attrs.get("outcome") == "complete" else None
        if accuracy is not None and accuracy > best + min_delta:
            best, count = accuracy, 0
        else:
            count += 1
    return count


def best_so_far(study: Study) -> list[tuple[int, float]]:
    """Return each number of trials that had ended, with the best accuracy of complete ones then."""
    points: list[tuple[int, float]] = []
    best = -math.inf
    for number, trial in enumerate(sorted(finished_trials(study), key=_ended_at), 1):
        if trial.user_attrs.get("outcome") == "complete":
            best = max(best, _last_value(trial))
        if best > -math.inf:
            points.append((number, best))
    return points


def _ended_at(trial: FrozenTrial) -> tuple[datetime, int]:
    return trial.datetime_complete or datetime.min, trial.number


def tell(
    study: Study,
    trial: Trial | FrozenTrial,
    outcome: str,
    accuracy: float | None,
    val_loss: float | None,
) -> None:
    """Tell Optuna the outcome of a trial that ended."""
    state = STATES[outcome]
    attributes: dict[str, object] = {"outcome": outcome}
    if outcome == "complete":
        attributes["val_loss"] = val_loss
    set_attributes(study, trial, attributes)
    study.tell(trial.number, accuracy if state == TrialState.COMPLETE else None, state)


def _last_value(trial: FrozenTrial) -> float:
    steps = trial.intermediate_values
    return steps[max(steps)] if steps else math.nan
