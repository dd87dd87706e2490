"""The best finished run of an experiment, or one clear line on why there is none.

`python -m tracking.best` prints it with its runners-up. `import tracking.best` is quick: MLflow and
pandas are imported by what needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.cli import Parser, add_choice_flags, choice_filters, run_command
from tracking.errors import one_line
from tracking.store import check_location, reading
from tracking.text import escape_formula, listed, printable

if TYPE_CHECKING:
    import mlflow
    import pandas as pd
    from mlflow.entities import Run
    from mlflow.store.entities import PagedList

    from tracking.retries import PatientClient

DEFAULT_METRIC = "val/accuracy"

# One page holds all runs of most sweeps, so that their number can be told; more are not counted.
_PAGE = 100
# Databases sort anew for each page, which takes longer than to read it.
_NEXT_PAGE = 1000
_FINISHED = "tags.outcome = 'complete' and attributes.status = 'FINISHED'"
_REPEATS = "confirm"
"""The tag `stage` of a comparison's repeats."""
_DATASETS = 20
"""So many data sets of an experiment are known at most: each costs a search."""
_LEAST = "-1.7976931348623157e308"
"""Below it is no number: a condition that every metric fulfils which is there and not NaN."""


# The order


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the order of runs, or of an Optuna study's trials, is made of."""

    value: float
    """What is best: the higher the better."""
    loss: str | None
    """The name of the loss."""
    val_loss: float | None
    start: int
    """When it was started, or the trial's number."""


def best_first(entries: Sequence[Entry]) -> list[int]:
    """Return the positions of entries, the best first. This is the one order of runs and trials.

    Equal values are settled by `val/loss` only among runs of the same loss, as those of different
    losses are in different units. So of the losses that came to the same value, the one whose run
    was started first is first, with all its runs: the lowest `val/loss`, then the earliest start.
    Thus the order of the runs of one loss is the same whether other losses are beside it or not.
    """
    first: dict[tuple[float, str | None], int] = {}
    for entry in entries:
        key = entry.value, entry.loss
        first[key] = min(first.get(key, entry.start), entry.start)

    def rank(position: int) -> tuple[object, ...]:
        entry = entries[position]
        value = (1, 0.0) if math.isnan(entry.value) else (0, -entry.value)
        loss = (1, 0.0) if _is_no_number(entry.val_loss) else (0, entry.val_loss)
        of_loss = first[entry.value, entry.loss], entry.loss or ""
        return value, of_loss, loss, entry.start

    return sorted(range(len(entries)), key=rank)


def _is_no_number(value: float | None) -> bool:
    return value is None or math.isnan(value)


# The choice


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which runs are chosen from. What is None or empty excludes none."""

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
        """Return what MLflow is asked for: what holds for every choice, these, and `others`."""
        from tracking.runs import quoted

        keys = {
            "dataset": "params.dataset = {}",
            "digest": "params.dataset_digest LIKE {}",
            "study": "tags.study = {}",
            "loss": "params.loss = {}",
        }
        given = self._given()
        if self.digest:
            given["digest"] += "%"
        parts = [keys[key].format(quoted(value)) for key, value in given.items()]
        # Last, and there is neither `or` nor a bracket: whatever it is, it can only exclude more.
        return " and ".join([_FINISHED, *parts, *others, *([self.where] if self.where else [])])

    def _given(self) -> dict[str, str]:
        values = {
            "dataset": self.dataset,
            "digest": self.digest,
            "study": self.study,
            "loss": self.loss,
        }
        return {key: value for key, value in values.items() if value}


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data set, and the seed that splits it. Only accuracies of the same can be compared.

    None is what a run does not say.
    """

    dataset: str | None
    digest: str | None
    seed: str | None

    @classmethod
    def of(cls, run: Run) -> Split:
        """Return the one that a run was validated on."""
        params = run.data.params
        return cls(
            dataset=params.get("dataset"),
            digest=params.get("dataset_digest"),
            seed=params.get("seed"),
        )

    def clauses(self) -> list[str]:
        """Return what MLflow is asked for to find the runs that were validated on it."""
        return [_is("params.dataset_digest", self.digest), _is("params.seed", self.seed)]


@dataclass(frozen=True, kw_only=True)
class Others:
    """Finished runs that were passed over, as they were validated on other images."""

    count: int
    """How many there are, or were counted."""
    more: bool
    """Whether there are more."""
    split: Split
    """That of the newest one."""
    is_same_data: bool
    """Whether only the seed of the split is another."""

    def __str__(self) -> str:
        count = f"more than {self.count}" if self.more else f"{self.count}"
        runs = "run" if count == "1" else "runs"
        data = f"on {self.split.dataset!r}" if self.split.dataset else "that name no data set"
        if self.is_same_data:
            return f"{count} {runs} {data} split by other seeds"
        digest = f" (digest {self.split.digest[:8]})" if self.split.digest else ""
        return f"{count} {runs} {data}{digest}"

    def flag(self, *, other_than: str | None) -> str:
        """Return what to type for the newest of these, not on a data set of that name."""
        dataset, digest = self.split.dataset, self.split.digest
        if self.is_same_data:
            return f'--where "{_is("params.seed", self.split.seed)}"'
        if digest is None:
            return f'--where "{_is("params.dataset_digest", None)}"'
        return f"--dataset {shlex.quote(dataset if dataset and dataset != other_than else digest)}"


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
    from tracking.runs import default_experiment

    filters = Filters(study=study, loss=loss, where=(where or "").strip())
    with reading() as client:
        name = default_experiment() if experiment is None else experiment
        experiment_id = _find_experiment(client, name)
        _check_where(client, experiment_id, filters.where)
        if dataset:
            filters = replace(filters, **_dataset_filter(client, experiment_id, dataset))
        runs = _Runs(client, experiment_id, metric, filters)
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
        raise ValueError(_why_none(client, experiment_id, name, metric, filters))


def _dataset_filter(
    client: mlflow.MlflowClient, experiment_id: str, dataset: str
) -> dict[str, str]:
    """Return which of `Filters` is meant by a data set's name, its folder's path, or its digest."""
    is_path = os.sep in dataset or dataset in (".", "..")
    name = Path(dataset).resolve().name if is_path else dataset
    if re.fullmatch("[0-9a-f]{8,}", name):  # a folder can be called so, too: 20260131
        named = client.search_runs([experiment_id], _is("params.dataset", name), max_results=1)
        return {"dataset": name} if named else {"digest": name}
    return {"dataset": name}


def _preferred(datasets: Sequence[Run], prefer: Sequence[str]) -> Run | None:
    """Return the first run, of one each of all data sets, of the first that is preferred."""
    for wanted in prefer:
        for run in datasets:
            if wanted in (Split.of(run).digest, Split.of(run).dataset):
                return run
    return None


@dataclass(frozen=True)
class _Runs:
    """The finished runs of an experiment that have the metric, and are not excluded."""

    client: mlflow.MlflowClient
    experiment_id: str
    metric: str
    filters: Filters

    def of_each_dataset(self) -> list[Run]:
        """Return the newest run of each data set, the newest first."""
        known: list[str] = []
        found = self._newest("params.dataset_digest IS NULL")
        while len(known) < _DATASETS:
            others = [f"params.dataset_digest != {_quoted(digest)}" for digest in known]
            newest = self._newest(*(others or ["params.dataset_digest IS NOT NULL"]))
            if not newest:
                break
            found += newest
            known.append(newest[0].data.params["dataset_digest"])
        return sorted(found, key=lambda run: -int(run.info.start_time))

    def split_of_dataset(self, run: Run) -> Split:
        """Return the split of a run's data set that the newest run is on which is no repeat."""
        same_data = Split.of(run).clauses()[0]
        newest = [
            *self._newest(same_data, "tags.stage IS NULL"),
            *self._newest(same_data, f"tags.stage != {_quoted(_REPEATS)}"),
        ]
        return Split.of(max(newest, key=lambda run: int(run.info.start_time), default=run))

    def ranked(self, split: Split, top: int) -> tuple[list[Run], bool]:
        """Return runs on a split, the best first, and whether others were not looked at.

        As many as are on a page, or as it takes for the first `top` to be in their order and to
        have a model that is there.
        """
        is_there = cache(lambda run_id: _is_there(self.client, run_id))
        read: list[Run] = []
        for page, is_last in self._pages(*split.clauses()):
            read += [run for run in page if _has(run, self.metric) and _models(run)]
            ordered = [read[position] for position in best_first([self._entry(r) for r in read])]
            ranked: list[Run] = []
            for run in ordered:
                # Asked of no more than it takes: a deleted model is still listed by its run.
                if len(ranked) >= top or is_there(_models(run)[-1]):
                    ranked.append(run)
            # Those that are equal to the last one may go on on the next page.
            if is_last or (len(ranked) >= top and not self._equal(ranked[top - 1], page[-1])):
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
            yield Others(
                count=len(page),
                more=bool(page.token),
                split=Split.of(page[0]),
                is_same_data=same_data,
            )

    def _entry(self, run: Run) -> Entry:
        value = run.data.metrics[self.metric]
        return Entry(
            value=-value if self.metric.endswith("loss") else value,
            loss=run.data.params.get("loss"),
            val_loss=run.data.metrics.get("val/loss"),
            start=run.info.start_time,
        )

    def _equal(self, run: Run, other: Run) -> bool:
        return bool(run.data.metrics[self.metric] == other.data.metrics.get(self.metric))

    def _newest(self, *clauses: str) -> list[Run]:
        """Return the run that was started last for which these hold, if there is one."""
        return list(self._search(clauses, 1))

    def _pages(self, *clauses: str) -> Iterator[tuple[list[Run], bool]]:
        """Yield the runs, the best first, page by page, each with whether it is the last."""
        # A run whose metric is NaN, or that has none, comes last in either direction.
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
    return f"{key} IS NULL" if value is None else f"{key} = {_quoted(value)}"


def _quoted(text: str) -> str:
    from tracking.runs import quoted

    return quoted(text)


def first_with_model(
    client: mlflow.MlflowClient | PatientClient, run_ids: Iterable[str | None]
) -> str | None:
    """Return the first of these runs that is there with its model: neither of them was deleted."""
    from mlflow.exceptions import MlflowException

    for run_id in filter(None, run_ids):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                continue
            raise
        models = _models(run)
        if run.info.lifecycle_stage == "active" and models and _is_there(client, models[-1]):
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
    """Return how people are told of a run: `run <name> (<id>)`."""
    return f"run {printable(run.info.run_name)} ({run.info.run_id})"


def _find_experiment(client: mlflow.MlflowClient, name: str) -> str:
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


def _check_where(client: mlflow.MlflowClient, experiment_id: str, where: str) -> None:
    """Raise ValueError for a condition that MLflow can't read, and say what one looks like."""
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


def _is_there(client: mlflow.MlflowClient | PatientClient, model_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _models(run: Run) -> list[str]:
    """Return the ids of a run's models, the last one last."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return [output.model_id for output in sorted(outputs, key=lambda output: output.step)]


def _has(run: Run, metric: str) -> bool:
    return not math.isnan(run.data.metrics.get(metric, math.nan))


def _why_none(
    client: mlflow.MlflowClient, experiment_id: str, name: str, metric: str, filters: Filters
) -> str:
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
    """Return what the runs are that filters have all excluded."""
    losses = {run.data.params["loss"] for run in runs if "loss" in run.data.params}
    studies = {run.data.tags["study"] for run in runs if "study" in run.data.tags}
    datasets = {run.data.params["dataset"] for run in runs if "dataset" in run.data.params}
    parts = [f"losses {listed(sorted(losses))}"] if losses else []
    parts += [f"studies {listed(sorted(studies))}"] if studies else []
    parts += [f"data sets {listed(sorted(datasets))}"] if datasets else []
    return f" has a model; those that have: {'; '.join(parts) or len(runs)}"


def _advice(experiment: str) -> str:
    return f"; this makes one: python -m experiments.sweep --experiment {shlex.quote(experiment)}"


# The command line


def table(choice: Choice, top: int) -> list[dict[str, Any]]:
    """Return the best runs, the best first: a row each, with all that tells them apart."""
    return [_row(rank, run, choice.metric) for rank, run in enumerate(choice.ranked[:top], 1)]


def _row(rank: int, run: Run, metric: str) -> dict[str, Any]:
    tags, params = run.data.tags, run.data.params
    keys = dict.fromkeys([metric, DEFAULT_METRIC, "val/loss"])
    return {
        "rank": rank,
        "run": run.info.run_name,
        "run_id": run.info.run_id,
        "study": tags.get("study"),
        "trial": _number(tags.get("trial")),
        "loss": params.get("loss"),
        "learning_rate": _number(params.get("learning_rate")),
        "batch_size": _number(params.get("batch_size")),
        **{key: run.data.metrics.get(key) for key in keys},
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(),
        "model": model_uri(run),
    }


def _number(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            pass
    return text


def _as_table(rows: Sequence[dict[str, Any]]) -> str:
    hidden = {"started", "model"}  # follow from the run's id, and make lines too long to read
    shown = [{key: _shown(row[key]) for key in row if key not in hidden} for row in rows]
    return _frame(shown).to_string(index=False) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    # Names are whatever somebody has typed: neither a terminal nor a spreadsheet is to obey them.
    harmless = [
        {
            key: escape_formula(printable(value)) if isinstance(value, str) else value
            for key, value in row.items()
        }
        for row in rows
    ]
    return str(_frame(harmless).to_csv(index=False, lineterminator="\n"))


def _as_json(rows: Sequence[dict[str, Any]]) -> str:
    # JSON has no NaN.
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    # JSON lets some control characters through that a terminal obeys, U+009B say.
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    # Objects, because a column of integers with a gap would become one of floats.
    return pd.DataFrame(list(rows), dtype=object)


FORMATS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "table": _as_table,
    "csv": _as_csv,
    "json": _as_json,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m tracking.best",
        description="Print the best finished run of an MLflow experiment, why it is the best, and "
        "its runners-up. Pruned, diverged and failed runs, and runs without a model, are not among "
        "them, nor are runs on other data sets, or on other splits of the same, as accuracies on "
        "other images can't be compared; those are counted. Ties: the loss that was started first, "
        "then its lower val/loss, then the earlier run.",
        epilog="exit codes: 0 done; 1 a disk is full, a database locked or read-only; 2 bad input, "
        "or no such run",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="the MLflow experiment (default: that of `mlflow run` or MLFLOW_EXPERIMENT_NAME, else "
        "cnn-sweep)",
    )
    parser.add_argument(
        "--metric",
        default=DEFAULT_METRIC,
        metavar="NAME",
        help="what is best: the run with the highest last value of this metric, the lowest if the "
        "name ends in loss (default: %(default)s)",
    )
    add_choice_flags(parser)
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        metavar="N",
        help="rows to print: the best run and the N - 1 after it (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="table",
        help="csv and json have all digits, the time of the start and the model's URI as well; the "
        "line that says why goes to standard error then (default: %(default)s)",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise ValueError(f"--top must be ≥ 1, not {options.top}")
    choice = choose(
        options.experiment or None,
        metric=options.metric,
        top=options.top,
        **choice_filters(options),
    )
    about = sys.stdout if options.format == "table" else sys.stderr
    print(choice, *choice.notes(), sep="\nnote: ", file=about)
    print(FORMATS[options.format](table(choice, options.top)), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a command line asks for, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
