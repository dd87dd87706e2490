"""The tables of a comparison's searches; each is also a CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.comparison.ranges import open_ends
from experiments.comparison.results import Results
from experiments.study.parameters import searched

REFINED = ("explore", "refine")
"""The stages of a search whose trainings are of different configurations."""

BUDGET_COLUMNS = [
    *("loss", "trials", "searches", "val_accuracy", "val_accuracy_low", "val_accuracy_high"),
]
RANGE_COLUMNS = ["loss", "low", "high", "tried_low", "tried_high"]


def planned_trainings(results: Results) -> int:
    """Return the number of trainings of all searches of a loss."""
    plan = results.plan
    return int(plan["trials"]) * (int(plan["searches"]) if results.is_staged else 1)


def planned_repeats(results: Results) -> int:
    """Return the number of repeats of a loss."""
    return int(results.plan["searches" if results.is_staged else "repeats"])


def parameters_of(results: Results) -> list[str]:
    """Return the parameters that are searched, but for the loss."""
    return [name for name in searched(results.plan) if name != "loss"]


def ranges(results: Results) -> pd.DataFrame:
    """Return the range of learning rates in which each loss' searches began, and what they tried.

    `low` and `high` are the ends of the range, `tried_low` and `tried_high` the lowest and highest
    learning rate of a training.
    """
    rows = []
    for loss in results.losses:
        rates = results.trials.loc[results.trials["loss"] == loss, "learning_rate"]
        low, high = results.ranges.get(loss, (np.nan, np.nan))
        rows.append((loss, low, high, rates.min(), rates.max()))
    return pd.DataFrame(rows, columns=RANGE_COLUMNS)


def searches(results: Results) -> pd.DataFrame:
    """Return what each search has chosen, how its ranges ended, and the repeat of its choice.

    The row of a repeat, with `tried_low` and `tried_high`, the lowest and highest learning rate of
    the search, and how the ranges of learning rates and batch sizes ended (`rate_ended`,
    `batch_ended`): closed, or open below or above, as `open_ends` says. There are no rows without
    stages.
    """
    made = results.repeats if results.is_staged else results.repeats.iloc[:0]
    rows = []
    for row in made.sort_values(["search", "seed"]).to_dict("records"):
        is_own = (results.trials["loss"] == row["loss"]) & (
            results.trials["search"] == row["search"]
        )
        tried = results.trials.loc[is_own]
        rates, open_at = tried["learning_rate"], open_ends(results, row)
        rows.append(
            {
                **{name: row[name] for name in ("loss", "search", "seed", *parameters_of(results))},
                "tried_low": rates.min(),
                "tried_high": rates.max(),
                "rate_ended": _ended("learning_rate", tried, open_at),
                "batch_ended": _ended("batch_size", tried, open_at),
                **{name: row[name] for name in ("outcome", "val_accuracy", "test_accuracy")},
                "run_id": row["run_id"],
            }
        )
    columns = [
        *("loss", "search", "seed", *parameters_of(results), "tried_low", "tried_high"),
        *("rate_ended", "batch_ended", "outcome", "val_accuracy", "test_accuracy", "run_id"),
    ]
    table = pd.DataFrame(rows, columns=columns)
    order = {loss: position for position, loss in enumerate(results.losses)}
    by_loss = table["loss"].map(order).argsort(kind="stable")
    return table.iloc[by_loss].reset_index(drop=True)


_BEYOND = {"lower": "below", "upper": "above"}


def _ended(parameter: str, tried: pd.DataFrame, open_at: Sequence[tuple[str, str]]) -> str:
    """Return how the range of a parameter ended, from the trials and the ends that are open."""
    if tried[parameter].nunique() < 2:
        return "not varied"
    ends = [_BEYOND[end] for name, end in open_at if name == parameter]
    return f"open {' and '.join(ends)}" if ends else "closed"


def best_so_far(results: Results) -> pd.DataFrame:
    """Return the best validation accuracy of each search' first t trainings: `BUDGET_COLUMNS`.

    `val_accuracy` is the mean over the `searches`, `val_accuracy_low` and `…_high` the lowest and
    the highest. Only trainings of `REFINED` count; t ends with the shortest search. A training that
    diverged counts with its last accuracy, one without an accuracy with 0.
    """
    rows = []
    trials = results.trials[results.trials["stage"].isin(REFINED)].sort_values("trial")
    for loss in results.losses:
        of_loss = trials[trials["loss"] == loss].groupby("search")["val_accuracy"]
        each = [accuracies.fillna(0.0).cummax().to_numpy(float) for _, accuracies in of_loss]
        shortest = min(map(len, each), default=0)
        best = np.array([accuracies[:shortest] for accuracies in each])
        rows += [
            (loss, number + 1, len(each), at.mean(), at.min(), at.max())
            for number, at in enumerate(best.T)
        ]
    return pd.DataFrame(rows, columns=BUDGET_COLUMNS)


def chosen_trainings(results: Results) -> pd.DataFrame:
    """Return the row of `results.trials` with the best training of each search's choice."""
    keys = ["loss", "search", *parameters_of(results)]
    chosen = results.repeats[keys].drop_duplicates()
    of_chosen = results.trials.merge(chosen, on=keys)
    best = of_chosen.sort_values("val_accuracy", ascending=False, kind="stable")
    return best.drop_duplicates(["loss", "search"]).sort_values(["loss", "search"])
