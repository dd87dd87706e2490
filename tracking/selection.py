"""Choose the best finished run of an experiment, or say in one line why there is none.

`import tracking.selection` is quick: functions import MLflow when called.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracking.models.predictor import Predictor, load_model
from tracking.run_search import (
    Filters,
    FinishedRuns,
    Others,
    Split,
    check_where,
    dataset_filter,
    described,
    find_experiment,
    model_uri,
    why_none,
)
from tracking.store import DEFAULT_METRIC, default_experiment, reading

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best run, and the runs that it was compared with."""

    ranked: tuple[Run, ...]
    """Finished runs with a model and the metric, the best first."""
    experiment: str
    metric: str
    filters: Filters
    more: bool
    """Whether there are more runs, which are not better."""
    others: tuple[Others, ...] = ()
    """Runs that were validated on other images."""

    @property
    def run(self) -> Run:
        """The best run."""
        return self.ranked[0]

    def __str__(self) -> str:
        count = f"{'more than ' if self.more else ''}{len(self.ranked)}"
        runs = "run" if count == "1" else "runs"
        filters = str(replace(self.filters, dataset=None, digest=None))
        among = f" with {filters}" if filters else ""
        split = Split.of(self.run)
        data = f" on {split.dataset!r}" if split.dataset else ""
        if data and any(others.is_same_data for others in self.others):
            data += f", split by seed {split.seed},"
        return (
            f"best of {count} finished {runs} of experiment {self.experiment!r}{among}{data} by "
            f"{self.metric} = {self.run.data.metrics[self.metric]:.4g}: {described(self.run)}"
            f"{self._tie()}"
        )

    def notes(self) -> list[str]:
        """Return what a user should know about the choice, in one line each."""
        notes = []
        if self.others:
            name = Split.of(self.run).dataset
            flags = dict.fromkeys(others.flag(other_than=name) for others in self.others)
            notes.append(
                f"not among them: {', '.join(map(str, self.others))}: accuracies on other images "
                f"can't be compared; {' or '.join(flags)} chooses those"
            )
        losses = {run.data.params.get("loss") for run in self.ranked}
        if self.metric.endswith("loss") and len(losses) > 1:
            notes.append(
                f"{self.metric} of different losses can't be compared: --loss NAME chooses one"
            )
        return notes

    def _tie(self) -> str:
        """Return why this run is before equal ones, "" if there are none."""
        value = self.run.data.metrics[self.metric]
        equal = [run for run in self.ranked if run.data.metrics[self.metric] == value]
        loss = self.run.data.params.get("loss")
        of_loss = [run for run in equal if run.data.params.get("loss") == loss]
        if len(equal) == 1:
            return ""
        if len(of_loss) == len(equal):
            return f"; of {len(equal)} equal ones, {_settled(of_loss)}"
        if len(of_loss) == 1:
            return f"; of {len(equal)} equal ones, it was started first"
        return (
            f"; of {len(equal)} equal ones, one of loss {loss!r} was started first, and of the "
            f"{len(of_loss)} with that loss, {_settled(of_loss)}"
        )


def _settled(runs: Sequence[Run]) -> str:
    """Return why the first of equal runs with the same loss is before the others."""
    losses = [run.data.metrics.get("val/loss", math.nan) for run in runs]
    lowest, num_lowest = losses[0], losses.count(losses[0])
    if math.isnan(lowest) or num_lowest == len(losses):
        return "it was started first"
    text = f"its val/loss, {lowest:.4g}, is the lowest"
    if num_lowest > 1:
        text += f", and of {num_lowest} with that, it was started first"
    return text


def best_run(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    dataset: str | None = None,
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
) -> Run:
    """Return the best finished run of an experiment that has a model: see `choose`.

    It warns if there are runs on other data sets, which can't be compared with this one.
    """
    choice = choose(experiment, metric=metric, dataset=dataset, study=study, loss=loss, where=where)
    _warn_of_others(choice)
    return choice.run


def _warn_of_others(choice: Choice) -> None:
    """Warn the user of `best_run` or `load_best` if there are runs on other data sets."""
    others = [str(others) for others in choice.others if not others.is_same_data]
    if others:
        warnings.warn(
            f"this run is on {Split.of(choice.run).dataset!r}; not among those it was chosen from: "
            f"{', '.join(others)}; dataset= chooses",
            stacklevel=3,
        )


def choose(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    dataset: str | None = None,
    prefer: Sequence[str] = (),
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
    top: int = 1,
) -> Choice:
    """Choose the best finished run of an experiment that has a model.

    Only runs validated on the same images are compared: the same data set (`dataset_digest`), split
    by the same seed. If there are several data sets, it takes that of the run that started last.
    If this data set has several splits, it takes that of the last run that is no repeat of a
    comparison: each repeat has a seed of its own.

    Best is the highest last value of the metric, the lowest if its name ends in `loss`.
    `best_first` orders equal values. Runs that were pruned, diverged, failed or still run are never
    chosen, nor runs whose metric is NaN or whose model was deleted.

    Args:
        experiment: its name; None is that of `mlflow run` or the environment, else `cnn-sweep`.
        metric: the metric to compare.
        dataset: only runs on this data set: its name, its folder, or 8 digits of its digest.
        prefer: names and digests of data sets: the first with runs precedes the latest data set.
        study: only runs of the study with this name.
        loss: only runs with this loss.
        where: only runs that meet this condition in MLflow's search syntax.
        top: the number of runs to rank at least, if there are as many.

    Raises:
        ValueError: the store can't be opened, the experiment or such a run does not exist, or
            MLflow can't read `where`.
    """
    filters = Filters(study=study, loss=loss, where=(where or "").strip())
    with reading() as client:
        name = default_experiment() if experiment is None else experiment
        experiment_id = find_experiment(client, name)
        check_where(client, experiment_id, filters.where)
        if dataset:
            filters = replace(filters, **dataset_filter(client, experiment_id, dataset))
        runs = FinishedRuns(client, experiment_id, metric, filters)
        datasets = runs.of_each_dataset()
        if preferred := _preferred(datasets, prefer):
            filters = replace(filters, dataset=Split.of(preferred).dataset)
            datasets = [preferred]
        for newest in datasets:
            split = runs.split_of_dataset(newest)
            ranked, more = runs.ranked(split, top)
            if ranked:
                others = tuple(runs.others(split, datasets))
                return Choice(
                    ranked=tuple(ranked), experiment=name, metric=metric, filters=filters,
                    more=more, others=others,
                )  # fmt: skip
        raise ValueError(why_none(client, experiment_id, name, metric, filters))


def _preferred(datasets: Sequence[Run], prefer: Sequence[str]) -> Run | None:
    """Return the run on the first preferred data set, from one run of each data set."""
    for wanted in prefer:
        for run in datasets:
            if wanted in (Split.of(run).digest, Split.of(run).dataset):
                return run
    return None


def load_best(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    dataset: str | None = None,
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
) -> Predictor:
    """Load the model of the best finished run of an experiment.

    Only runs on the same images can be compared. So the model is of one data set: of `dataset`,
    else of that of the run that started last. The result's `metadata["dataset"]` names it. It
    warns if there are runs on other data sets.

    The arguments are those of `tracking.selection.choose`.

    Raises:
        ValueError: there is no such run, the store can't be opened, or the model can't be loaded.
    """
    choice = choose(experiment, metric=metric, dataset=dataset, study=study, loss=loss, where=where)
    _warn_of_others(choice)
    return load_model(model_uri(choice.run))


def load_run(run_id: str) -> Predictor:
    """Load the last model of a run, or raise ValueError."""
    with reading() as client:
        return load_model(model_uri(client.get_run(run_id)))
