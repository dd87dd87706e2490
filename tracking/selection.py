"""The best finished run of an experiment, or one clear line on why there is none.

`import tracking.selection` is quick: MLflow is imported by what needs it.
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
from tracking.store import reading

if TYPE_CHECKING:
    from mlflow.entities import Run

DEFAULT_METRIC = "val/accuracy"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best run, and what it was chosen from."""

    ranked: tuple[Run, ...]
    """Finished runs with a model and the metric, as far as they were looked at, the best first."""
    experiment: str
    metric: str
    filters: Filters
    more: bool
    """Whether others were not looked at: they are no better."""
    others: tuple[Others, ...] = ()
    """Those that were validated on other images than these."""

    @property
    def run(self) -> Run:
        """The best run."""
        return self.ranked[0]

    @property
    def candidates(self) -> int:
        """How many runs were looked at."""
        return len(self.ranked)

    def __str__(self) -> str:
        count = f"more than {self.candidates}" if self.more else f"{self.candidates}"
        runs = "run" if count == "1" else "runs"
        among = (
            f" with {filters}"
            if (filters := str(replace(self.filters, dataset=None, digest=None)))
            else ""
        )
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
        """Return what a user should know of it, a line each."""
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
        """Return how a tie was settled, if there was one."""
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
    lowest, *others = [run.data.metrics.get("val/loss", math.nan) for run in runs]
    if math.isnan(lowest) or all(loss == lowest for loss in others):
        return "it was started first"
    text = f"its val/loss, {lowest:.4g}, is the lowest"
    num_lowest = 1 + others.count(lowest)
    return (
        text if num_lowest == 1 else f"{text}, and of {num_lowest} with that, it was started first"
    )


def best_run(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    dataset: str | None = None,
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
) -> Run:
    """Return the best finished run of an experiment, one that has a model: see `choose`.

    It warns where there are runs on other data sets, which it was not compared with.
    """
    choice = choose(experiment, metric=metric, dataset=dataset, study=study, loss=loss, where=where)
    warn_of_others(choice)
    return choice.run


def warn_of_others(choice: Choice) -> None:
    """Warn a caller's caller of runs on other data sets, if there are any."""
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
    """Choose the best finished run of an experiment, among those that have a model.

    Only runs that were validated on the same images are compared, that is, on the same data set
    (`dataset_digest`), split by the same seed. Where the runs asked for are on several, it is
    the data set of the run that was started last, and of its splits that of the run that was
    started last, the repeats of a comparison left out: they are single ones, on other seeds.

    Best is the highest last value of the metric; the lowest, where its name ends in `loss`. Equal
    ones are settled by `best_first`. Runs that were pruned, diverged, failed or are not over are
    never chosen, nor is one whose metric is NaN, or whose model was deleted.

    Args:
        experiment: its name; None is that of `mlflow run` or the environment, else `cnn-sweep`.
        metric: what is best.
        dataset: only runs on the data set of this name (a path's last part), or of the digest that
            begins so, with 8 digits or more.
        prefer: names and digests of data sets. Of the data sets that there are, the first of
            these is chosen rather than the latest.
        study: only runs of the study with this name.
        loss: only runs with this loss.
        where: only runs for which this holds, in MLflow's search syntax, say
            `params.batch_size = '64' and metrics.learning_rate < 0.1`.
        top: how many runs are ranked at least, if there are as many.

    Raises:
        ValueError: the store can't be opened, there is no such experiment, or no such run in it, or
            MLflow can't read `where`.
    """
    from tracking.store import default_experiment

    filters = Filters(study=study, loss=loss, where=(where or "").strip())
    with reading() as client:
        name = default_experiment() if experiment is None else experiment
        experiment_id = find_experiment(client, name)
        check_where(client, experiment_id, filters.where)
        if dataset:
            filters = replace(filters, **dataset_filter(client, experiment_id, dataset))
        runs = FinishedRuns(client, experiment_id, metric, filters)
        datasets = runs.of_each_dataset()
        preferred = _preferred(datasets, prefer)
        if preferred is not None:
            filters = replace(filters, dataset=Split.of(preferred).dataset)
            datasets = [preferred]
        for newest in datasets:
            split = runs.split_of_dataset(newest)
            ranked, more = runs.ranked(split, top)
            if ranked:
                return Choice(
                    ranked=tuple(ranked),
                    experiment=name,
                    metric=metric,
                    filters=filters,
                    more=more,
                    others=tuple(runs.others(split, datasets)),
                )
        raise ValueError(why_none(client, experiment_id, name, metric, filters))


def _preferred(datasets: Sequence[Run], prefer: Sequence[str]) -> Run | None:
    """Return the first run, of one each of all data sets, of the first that is preferred."""
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

    It is of one data set, as only runs on the same images can be compared: without `dataset`, of
    that of the run that was started last. It warns where there are runs on others.
    `metadata["dataset"]` of what is returned says which it is.

    Args:
        experiment: its name; None is that of `mlflow run` or the environment, else `cnn-sweep`.
        metric: what is best.
        dataset: only runs on this data set: its name, or the first 8 digits or more of its digest.
        study: only runs of the study with this name.
        loss: only runs with this loss.
        where: only runs for which this holds: see `tracking.selection.choose`.

    Raises:
        ValueError: there is no such run, the store can't be opened, or the model can't be loaded.
    """
    choice = choose(experiment, metric=metric, dataset=dataset, study=study, loss=loss, where=where)
    warn_of_others(choice)
    return load_model(model_uri(choice.run))


def load_run(run_id: str) -> Predictor:
    """Load the last model of a run. Raises ValueError if there is no such run, or no model."""
    with reading() as client:
        return load_model(model_uri(client.get_run(run_id)))
