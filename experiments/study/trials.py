"""The trials of a study, read from Optuna."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from experiments.study.parameters import BY_NAME, searched
from experiments.study.ranking import best_first

if TYPE_CHECKING:
    import pandas as pd
    from optuna import Study

# What is shown, with the parameters that are searched between the second and the third.
TRIALS_COLUMNS = ("trial", "outcome", "epochs", "val_accuracy", "val_loss", "run_id")

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def trials_table(study: Study) -> pd.DataFrame:
    """Return the finished trials, the best first: what was tried and what came of it."""
    trials = study.get_trials(deepcopy=False, states=FINISHED)
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
        for trial in trials
    ]
    columns = [*TRIALS_COLUMNS[:2], *names, *TRIALS_COLUMNS[2:]]
    return best_first(pd.DataFrame(rows, columns=columns)).reset_index(drop=True)


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


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that are over, by their numbers."""
    return study.get_trials(deepcopy=False, states=FINISHED)
