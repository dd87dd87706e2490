"""Search MLflow for finished runs: by data set, and with a model that still exists."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.errors import one_line
from tracking.ranking import Entry, best_first
from tracking.store import check_location, none_if_missing, quoted
from tracking.text import listed, printable

if TYPE_CHECKING:
    import mlflow
    from mlflow.entities import Run
    from mlflow.store.entities import PagedList

    from tracking.retries import RetryingClient


# Most sweeps fit on one page, which then gives their number; more runs are not counted.
_PAGE = 100

# Databases sort again for each page, and sorting takes longer than reading.
_NEXT_PAGE = 1000

# A rerun repeats or varies one trial by hand: it is no result of a search.
_FINISHED = "tags.outcome = 'complete' and attributes.status = 'FINISHED' and tags.rerun_of IS NULL"

_REPEATS = ("confirm", "repeat")
"""The tags `stage` of a comparison's repeats on fresh seeds."""

_DATASETS = 20
"""The data sets of an experiment that are searched at most: each costs a request."""

_LEAST = "-1.7976931348623157e308"
"""The lowest number: every metric that exists and is not NaN is at least this."""

_CLAUSES = {
    "dataset": "params.dataset = {}",
    "digest": "params.dataset_digest LIKE {}",
    "study": "tags.study = {}",
    "loss": "params.loss = {}",
}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which runs to choose from. None or "" excludes no run."""

    dataset: str | None = None
    """The name of a data set."""
    digest: str | None = None
    """The first digits of a data set's digest."""
    study: str | None = None
    """The name of an Optuna study."""
    loss: str | None = None
    where: str = ""
    """A condition in MLflow's search syntax, say `params.batch_size = '64'`."""

    def __str__(self) -> str:
        given = [f"{key} {value!r}" for key, value in self._given().items()]
        return " and ".join([*given, self.where] if self.where else given)

    def clause(self, *others: str) -> str:
        """Return the condition for MLflow: a finished run, these filters, and `others`."""
        given = self._given()
        if self.digest:
            given["digest"] += "%"
        parts = [_CLAUSES[key].format(quoted(value)) for key, value in given.items()]
        # MLflow has no `or` and no brackets, so `where` can only exclude more runs.
        return " and ".join([_FINISHED, *parts, *others, *([self.where] if self.where else [])])

    def _given(self) -> dict[str, str]:
        return {key: value for key in _CLAUSES if (value := getattr(self, key))}


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data set and the seed that splits it, None if unknown. Accuracies compare within one."""

    dataset: str | None
    digest: str | None
    seed: str | None

    @classmethod
    def of(cls, run: Run) -> Split:
        """Return the split that a run was validated on."""
        get = run.data.params.get
        return cls(dataset=get("dataset"), digest=get("dataset_digest"), seed=get("seed"))

    def clauses(self) -> list[str]:
        """Return MLflow's conditions for the runs that were validated on it."""
        return [_is("params.dataset_digest", self.digest), _is("params.seed", self.seed)]


@dataclass(frozen=True, kw_only=True)
class Others:
    """Finished runs that are not compared, because they were validated on other images."""

    count: int
    more: bool
    """Whether there are more than `count`."""
    split: Split
    """The split of the newest run."""
    is_same_data: bool
    """Whether only the seed of the split differs."""

    def __str__(self) -> str:
        count = f"more than {self.count}" if self.more else f"{self.count}"
        runs = "run" if count == "1" else "runs"
        data = f"on {self.split.dataset!r}" if self.split.dataset else "that name no data set"
        if self.is_same_data:
            return f"{count} {runs} {data} split by other seeds"
        digest = f" (digest {self.split.digest[:8]})" if self.split.digest else ""
        return f"{count} {runs} {data}{digest}"

    def flag(self, *, other_than: str | None) -> str:
        """Return the flag that chooses these runs instead of those on the data set `other_than`."""
        dataset, digest = self.split.dataset, self.split.digest
        if self.is_same_data:
            return f'--where "{_is("params.seed", self.split.seed)}"'
        if digest is None:
            return f'--where "{_is("params.dataset_digest", None)}"'
        return f"--dataset {shlex.quote(dataset if dataset and dataset != other_than else digest)}"


def dataset_filter(client: mlflow.MlflowClient, experiment_id: str, dataset: str) -> dict[str, str]:
    """Return the field of `Filters` for a data set's name, its folder's path, or its digest."""
    is_path = os.sep in dataset or dataset in (".", "..")
    name = Path(dataset).resolve().name if is_path else dataset
    if re.fullmatch("[0-9a-f]{8,}", name):  # a folder may have such a name too, 20260131
        named = client.search_runs([experiment_id], _is("params.dataset", name), max_results=1)
        return {"dataset": name} if named else {"digest": name}
    return {"dataset": name}


@dataclass(frozen=True)
class FinishedRuns:
    """The finished runs of an experiment that have the metric and pass the filters."""

    client: mlflow.MlflowClient
    experiment_id: str
    metric: str
    filters: Filters

    def of_each_dataset(self) -> list[Run]:
        """Return the newest run of each data set, the newest first."""
        known: list[str] = []
        found = self._newest("params.dataset_digest IS NULL")
        while len(known) < _DATASETS:
            others = [f"params.dataset_digest != {quoted(digest)}" for digest in known]
            newest = self._newest(*(others or ["params.dataset_digest IS NOT NULL"]))
            if not newest:
                break
            found += newest
            known.append(newest[0].data.params["dataset_digest"])
        return sorted(found, key=lambda run: -int(run.info.start_time))

    def split_of_dataset(self, run: Run) -> Split:
        """Return the split of the newest run on a run's data set, repeats left out."""
        same_data = Split.of(run).clauses()[0]
        newest = [
            *self._newest(same_data, "tags.stage IS NULL"),
            *self._newest(same_data, *(f"tags.stage != {quoted(each)}" for each in _REPEATS)),
        ]
        return Split.of(max(newest, key=lambda run: int(run.info.start_time), default=run))

    def ranked(self, split: Split, top: int) -> tuple[list[Run], bool]:
        """Return runs on a split, the best first, and whether there are more.

        Pages are read until the order of the first `top` is certain, and they have models.
        """
        is_there = cache(lambda run_id: _is_there(self.client, run_id))
        read: list[Run] = []
        for page, is_last in self._pages(*split.clauses()):
            read += [run for run in page if _has(run, self.metric) and _models(run)]
            ordered = [read[position] for position in best_first([self._entry(r) for r in read])]
            ranked: list[Run] = []
            for run in ordered:
                # A run still lists a deleted model: ask, but only for the first `top`.
                if len(ranked) >= top or is_there(_models(run)[-1]):
                    ranked.append(run)
            # The next page may have runs that are equal to the last one.
            if is_last or (
                len(ranked) >= top
                and ranked[top - 1].data.metrics[self.metric]
                != page[-1].data.metrics.get(self.metric)
            ):
                break
        return ranked, not is_last

    def others(self, split: Split, datasets: Sequence[Run]) -> Iterator[Others]:
        """Count the runs on other splits of the same data set, and on other data sets."""
        same_data, same_seed = split.clauses()
        if split.seed is not None:
            yield from self._counted([same_data, same_seed.replace(" = ", " != ")], same_data=True)
            yield from self._counted([same_data, "params.seed IS NULL"], same_data=True)
        for run in datasets:
            other = Split.of(run)
            if other.digest != split.digest:
                yield from self._counted([other.clauses()[0]], same_data=False)

    def _counted(self, clauses: Sequence[str], *, same_data: bool) -> Iterator[Others]:
        page = self._search(clauses, _PAGE)
        if page:
            split = Split.of(page[0])
            yield Others(
                count=len(page), more=bool(page.token), split=split, is_same_data=same_data
            )

    def _entry(self, run: Run) -> Entry:
        value = run.data.metrics[self.metric]
        return Entry(
            value=-value if self.metric.endswith("loss") else value,
            loss=run.data.params.get("loss"),
            val_loss=run.data.metrics.get("val/loss"),
            start=run.info.start_time,
        )

    def _newest(self, *clauses: str) -> list[Run]:
        """Return the run that started last among those that meet the conditions, if any."""
        return list(self._search(clauses, 1))

    def _pages(self, *clauses: str) -> Iterator[tuple[list[Run], bool]]:
        """Yield pages of runs, the best first, each with whether it is the last."""
        # Databases put a metric that is NaN or missing last in either direction.
        direction = "ASC" if self.metric.endswith("loss") else "DESC"
        order = [f"metrics.`{self.metric}` {direction}", "attributes.start_time ASC"]
        size, token = _PAGE, None
        while True:
            page = self._search(clauses, size, order, token)
            size, token = _NEXT_PAGE, page.token
            yield list(page), not token

    def _search(
        self,
        clauses: Sequence[str],
        size: int,
        order: Sequence[str] = ("attributes.start_time DESC",),
        token: str | None = None,
    ) -> PagedList[Run]:
        from mlflow.entities import ViewType

        clause = self.filters.clause(f"metrics.`{self.metric}` >= {_LEAST}", *clauses)
        return self.client.search_runs(
            [self.experiment_id], clause, ViewType.ACTIVE_ONLY, size, list(order), token
        )


def _is(key: str, value: str | None) -> str:
    return f"{key} IS NULL" if value is None else f"{key} = {quoted(value)}"


def first_with_model(
    client: mlflow.MlflowClient | RetryingClient, run_ids: Iterable[str | None]
) -> str | None:
    """Return the first of these runs that exists with its model: neither is deleted."""
    for run_id in filter(None, run_ids):
        run = none_if_missing(partial(client.get_run, run_id))
        if run is None or run.info.lifecycle_stage != "active":
            continue
        if (models := _models(run)) and _is_there(client, models[-1]):
            return run_id
    return None


def model_uri(run: Run) -> str:
    """Return the URI `models:/<id>` of the last model that a run recorded, or raise ValueError."""
    models = _models(run)
    if not models:
        outcome = run.data.tags.get("outcome", run.info.status.lower())
        raise ValueError(f"{described(run)} has no model: it is {outcome}")
    return f"models:/{models[-1]}"


def described(run: Run) -> str:
    """Return a run as messages name it: `run <name> (<id>)`."""
    return f"run {printable(run.info.run_name)} ({run.info.run_id})"


def find_experiment(client: mlflow.MlflowClient, name: str) -> str:
    """Return the id of an experiment, or raise ValueError with the names that exist."""
    found = client.get_experiment_by_name(name)
    if found is None:
        experiments = client.search_experiments(max_results=_PAGE)
        others = listed(sorted(experiment.name for experiment in experiments))
        raise ValueError(f"there is no experiment {name!r}, only {others}{_advice(name)}")
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {name!r} is deleted: restore it by `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`, or choose another"
        )
    check_location(name, found.artifact_location)
    return str(found.experiment_id)


def check_where(client: mlflow.MlflowClient, experiment_id: str, where: str) -> None:
    """Raise ValueError, with an example, for a condition that MLflow can't read."""
    from mlflow.exceptions import MlflowException

    if not where:
        return
    try:
        client.search_runs([experiment_id], where, max_results=1)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise ValueError(
            f"MLflow can't search for {where!r} ({one_line(error)}): conditions on params, tags, "
            "attributes and metrics, joined by `and`, look like params.batch_size = '64' and "
            "metrics.`val/accuracy` > 0.9"
        ) from error


def _is_there(client: mlflow.MlflowClient | RetryingClient, model_id: str) -> bool:
    return none_if_missing(lambda: client.get_logged_model(model_id)) is not None


def _models(run: Run) -> list[str]:
    """Return the ids of a run's models, the newest last."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return [output.model_id for output in sorted(outputs, key=lambda output: output.step)]


def _has(run: Run, metric: str) -> bool:
    return not math.isnan(run.data.metrics.get(metric, math.nan))


def why_none(
    client: mlflow.MlflowClient, experiment_id: str, name: str, metric: str, filters: Filters
) -> str:
    """Return in a line why no run can be chosen, and which runs exist."""
    found = client.search_runs([experiment_id], filters.clause(), max_results=_PAGE)
    known = {key for run in found if _models(run) for key in run.data.metrics}
    among = f" with {filters}" if str(filters) else ""
    if known and metric not in known:
        return (
            f"no finished run of experiment {name!r}{among} has the metric {metric!r}: "
            f"choose one of {listed(sorted(known))}"
        )
    if among and not known:
        others = client.search_runs([experiment_id], _FINISHED, max_results=_PAGE)
        if with_model := [run for run in others if _models(run)]:
            return f"no finished run of experiment {name!r}{among}{_what_there_is(with_model)}"
    runs = client.search_runs([experiment_id], max_results=_PAGE)
    outcomes = Counter(run.data.tags.get("outcome", run.info.status.lower()) for run in runs)
    there = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return (
        f"experiment {name!r} has no finished run{among} with a model and a number as {metric} "
        f"(runs: {there or 'none'}){_advice(name)}"
    )


def _what_there_is(runs: Sequence[Run]) -> str:
    """Return the losses, studies and data sets of runs that the filters excluded."""
    values = {
        "losses": {run.data.params.get("loss") for run in runs},
        "studies": {run.data.tags.get("study") for run in runs},
        "data sets": {run.data.params.get("dataset") for run in runs},
    }
    parts = [
        f"{what} {listed(known)}"
        for what, some in values.items()
        if (known := sorted(filter(None, some)))
    ]
    return f" has a model; those that have: {'; '.join(parts) or len(runs)}"


def _advice(experiment: str) -> str:
    return f"; this makes one: python -m experiments.sweep --experiment {shlex.quote(experiment)}"
