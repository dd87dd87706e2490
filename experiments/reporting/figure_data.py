"""The tables behind the figures of a comparison's report; each is also a CSV file."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.comparison.results import Results
from experiments.reporting.search_data import (
    BUDGET_COLUMNS,
    best_so_far,
)
from experiments.study.ranking import best_first

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import FrozenTrial


def best_settings(results: Results) -> pd.DataFrame:
    """Return the row of `results.trials` with each loss' best configuration, if it has one.

    The best is the first complete trial of `best_first`, the one that is confirmed.
    """
    complete = results.trials[results.trials["outcome"] == "complete"]
    ordered = best_first(complete.dropna(subset="val_accuracy"))
    return ordered.drop_duplicates("loss").set_index("loss", drop=False)


def expected_best(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the expected maximum of k = 1, …, n draws, estimated without bias from n of them.

    It is the mean of the maximum over all subsets of k draws (Tang et al. 2020, "Showing Your Work
    Doesn't Always Work"). Dodge et al. 2019 draw with replacement, which gives too low values.

    Args:
        values: (n,) independent draws.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    ranks = np.arange(1, n + 1)
    # The share of the subsets of k whose maximum has rank i is C(i - 1, k - 1) / C(n, k).
    shares = np.full(n, 1 / n) if n else ranks
    expected = np.empty(n)
    for k in range(1, n + 1):
        expected[k - 1] = shares @ ordered
        if k < n:
            shares = shares * (ranks - k) / k * (k + 1) / (n - k)
    return expected


def budget(results: Results) -> pd.DataFrame:
    """Return the best validation accuracy to expect of a number of trials: `BUDGET_COLUMNS`.

    With stages, these are `best_so_far` of the searches. With random configurations, it is the
    `expected_best` of one search; diverged trials count with their last accuracy, failed ones have
    none. There are no rows for a sampler whose draws depend on each other.
    """
    if results.is_staged:
        return best_so_far(results)
    rows = []
    if results.search == "random":
        for loss in results.losses:
            accuracies = results.trials.loc[results.trials["loss"] == loss, "val_accuracy"].dropna()
            rows += [
                (loss, trials, 1, value, np.nan, np.nan)
                for trials, value in enumerate(expected_best(accuracies.to_numpy()), start=1)
            ]
    return pd.DataFrame(rows, columns=BUDGET_COLUMNS)


def learning_curves(results: Results) -> pd.DataFrame:
    """Return means and ranges over the repeats of each loss, epoch by epoch.

    Their `stage` is confirm; without repeats, it is the one training of the loss' best
    configuration in the search. Trainings that ended before the last epoch are left out, so that
    each mean is over the same ones; `trainings` counts them.
    """
    parts: list[pd.DataFrame] = []
    best = best_settings(results)
    for loss in results.losses:
        curves = results.curves[results.curves["loss"] == loss]
        chosen = curves[curves["stage"] == "confirm"]
        if chosen.empty and loss in best.index:
            row = best.loc[loss]
            of_best = (curves["search"] == row["search"]) & (curves["trial"] == row["trial"])
            chosen = curves[(curves["stage"] == "search") & of_best]
        trainings = chosen.groupby(["search", "trial"])
        length = trainings["epoch"].transform("max")
        whole = chosen.assign(training=trainings.ngroup())[length == length.max()]
        epochs = whole.groupby(["stage", "loss", "epoch"], sort=True)
        parts.append(
            epochs.agg(
                trainings=("training", "nunique"),
                train_accuracy=("train_accuracy", "mean"),
                val_accuracy=("val_accuracy", "mean"),
                val_accuracy_low=("val_accuracy", "min"),
                val_accuracy_high=("val_accuracy", "max"),
            ).reset_index()
        )
    return pd.concat(parts, ignore_index=True)


ENOUGH_TRIALS = 20
"""Complete trials; with fewer, PED-ANOVA's importances are mostly chance."""


def complete_trials(study: optuna.Study | None) -> int:
    """Return the number of complete trials of a study."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE,)
    return len(study.get_trials(deepcopy=False, states=states)) if study is not None else 0


def importances(results: Results) -> pd.DataFrame:
    """Return `loss`, `parameter`, `importance` (0 to 1, PED-ANOVA) of losses with `ENOUGH_TRIALS`.

    An importance needs at least two different accuracies, and a parameter that varied.
    """
    rows = [
        (loss, name, share)
        for loss in results.losses
        if complete_trials(results.studies.get(loss)) >= ENOUGH_TRIALS
        for name, share in study_importances(results.studies[loss]).items()
    ]
    return pd.DataFrame(rows, columns=["loss", "parameter", "importance"])


def study_importances(study: optuna.Study) -> dict[str, float]:
    """Return the importance of each parameter that varied; empty if it is unknown."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    varied = varied_parameters(study)
    if len({trial.value for trial in complete}) < 2 or not varied:
        return {}
    with without_warning_of_few_trials():
        return dict(optuna.importance.get_param_importances(study, params=varied))


@contextmanager
def without_warning_of_few_trials() -> Iterator[None]:
    """Hide Optuna's warning that a parameter which does not always apply was in one trial only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
        yield


def varied_parameters(study: optuna.Study) -> list[str]:
    """Return the parameters with more than one value in a study."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    values: dict[str, set[Any]] = {}
    for trial in complete:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return sorted(name for name, tried in values.items() if len(tried) > 1)


def joint_study(results: Results) -> optuna.Study:
    """Return one study of the complete trials of all losses, with the loss as a parameter.

    The names of losses are escaped, because Plotly reads some HTML.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution

    losses = CategoricalDistribution([html.escape(loss) for loss in results.losses])
    joint = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), study_name=results.name, direction="maximize"
    )
    complete = [
        (loss, trial)
        for loss in results.losses
        if loss in results.studies
        for trial in results.studies[loss].get_trials(deepcopy=False)
        if trial.state is optuna.trial.TrialState.COMPLETE
    ]
    choices = _joint_choices(trial for _, trial in complete)
    for loss, trial in complete:
        joint.add_trial(
            optuna.trial.create_trial(
                value=trial.value,
                params=trial.params | {"loss": html.escape(loss)},
                distributions=trial.distributions
                | {name: choices[name] for name in trial.params if name in choices}
                | {"loss": losses},
            )
        )
    return joint


def _joint_choices(trials: Iterable[FrozenTrial]) -> dict[str, CategoricalDistribution]:
    """Return all choices of each parameter that has them; a study allows no change of them."""
    from optuna.distributions import CategoricalDistribution

    found: dict[str, dict[Any, None]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution) and name != "loss":
                found.setdefault(name, {}).update(dict.fromkeys(distribution.choices))
    return {name: CategoricalDistribution(_in_order(values)) for name, values in found.items()}


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Return numbers in ascending order, and other values as they come."""
    every = list(values)
    return sorted(every) if all(isinstance(each, int | float) for each in every) else every


def confusions(results: Results) -> pd.DataFrame:
    """Return `loss`, `true`, `predicted`, `images` and their `share` of the true class.

    Of the K² pairs of classes, those without images are left out.
    """
    parts = []
    classes = np.array(results.classes, dtype=object)
    for loss in results.losses:
        if loss in results.confusions:
            counts = results.confusions[loss]
            true, predicted = np.nonzero(counts)
            images = counts[true, predicted]
            parts.append(
                pd.DataFrame(
                    {
                        "loss": loss,
                        "true": classes[true],
                        "predicted": classes[predicted],
                        "images": images,
                        "share": images / counts.sum(axis=1)[true],
                    }
                )
            )
    if not parts:
        return pd.DataFrame(columns=["loss", "true", "predicted", "images", "share"])
    return pd.concat(parts, ignore_index=True)


def most_confused(counts: npt.NDArray[np.int64], number: int) -> list[tuple[int, int]]:
    """Return the most frequent pairs of a true and another, predicted class."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(true), int(predicted)) for true, predicted in pairs if wrong[true, predicted]]


def speed(results: Results) -> pd.DataFrame:
    """Return the time of trainings, for each loss and batch size: searches and repeats together.

    `trainings` counts all, `reused` those that were found, not made. `seconds` is the mean of a
    training, `seconds_in_all` the sum over those that were made, `images_per_second` the median.
    """
    columns = ["loss", "batch_size", "seconds", "images_per_second", "reused"]
    frames = (results.trials, results.repeats, results.confirmed)
    filled = [frame[columns] for frame in frames if len(frame)]
    if not filled:
        return pd.DataFrame(columns=["loss", "batch_size", "trainings", *columns[2:]])
    found = pd.concat(filled, ignore_index=True).dropna(subset="seconds")
    found["reused"] = found["reused"].eq(True)
    found["made"] = found["seconds"].where(~found["reused"], 0.0)
    order = {loss: position for position, loss in enumerate(results.losses)}
    groups = found.groupby(["loss", "batch_size"]).agg(
        trainings=("seconds", "size"),
        reused=("reused", "sum"),
        seconds=("seconds", "mean"),
        seconds_in_all=("made", "sum"),
        images_per_second=("images_per_second", "median"),
    )
    return groups.reset_index().sort_values(
        ["loss", "batch_size"], key=lambda column: column.map(lambda value: order.get(value, value))
    )
