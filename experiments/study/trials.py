"""The trials of a study, read from Optuna."""

from __future__ import annotations

import math

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from experiments.study.ranking import best_first

TRIALS_COLUMNS = [
    "trial",
    "outcome",
    "loss",
    "learning_rate",
    "batch_size",
    "epochs",
    "val_accuracy",
    "val_loss",
    "run_id",
]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def trials_table(study: Study) -> pd.DataFrame:
    """Return the finished trials, the best first: what was tried and what came of it."""
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    rows = [
        {
            "trial": trial.number,
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            "loss": trial.params.get("loss"),
            "learning_rate": trial.params.get("learning_rate"),
            "batch_size": trial.params.get("batch_size"),
            "epochs": len(trial.intermediate_values),
            "val_accuracy": _last_value(trial),
            "val_loss": trial.user_attrs.get("val_loss"),
            "run_id": trial.user_attrs.get("run_id"),
        }
        for trial in trials
    ]
    return best_first(pd.DataFrame(rows, columns=TRIALS_COLUMNS)).reset_index(drop=True)


def num_finished(study: Study) -> int:
    """Return how many trials are over."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def num_begun(study: Study) -> int:
    """Return how many trials are over or running, in all processes."""
    return len(study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))


def best_trial(study: Study) -> tuple[float, int] | None:
    """Return accuracy and number of the best complete trial, None if there is none."""
    complete = trials_table(study).query("outcome == 'complete'")
    return (complete["val_accuracy"].iloc[0], complete["trial"].iloc[0]) if len(complete) else None


def _last_value(trial: FrozenTrial) -> float:
    steps = trial.intermediate_values
    return steps[max(steps)] if steps else math.nan
