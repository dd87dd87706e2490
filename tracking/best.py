"""The best finished run of an experiment, or one clear line on why there is none.

`import tracking.best` is quick: MLflow is imported by what asks it.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracking.store import reading

if TYPE_CHECKING:
    import mlflow
    from mlflow.entities import Run

DEFAULT_METRIC = "val/accuracy"

# One page holds all runs of most sweeps, so that their number can be told; more are not counted.
_PAGE = 100
_FINISHED = "tags.outcome = 'complete' and attributes.status = 'FINISHED'"
_NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best run, and what it was chosen from."""

    run: Run
    experiment: str
    metric: str
    candidates: int
    """Finished runs with a model and the metric, as far as they were looked at."""
    more: bool
    """Whether others were not looked at: they are no better."""

    def __str__(self) -> str:
        count = f"more than {self.candidates}" if self.more else f"{self.candidates}"
        runs = "run" if count == "1" else "runs"
        return (
            f"best of {count} finished {runs} of experiment {self.experiment!r} by {self.metric} = "
            f"{self.run.data.metrics[self.metric]:.4g}: {described(self.run)}"
        )


def best_run(experiment: str | None = None, *, metric: str = DEFAULT_METRIC) -> Run:
    """Return the best finished run of an experiment, one that has a model: see `choose`."""
    return choose(experiment, metric=metric).run


def choose(experiment: str | None = None, *, metric: str = DEFAULT_METRIC) -> Choice:
    """Choose the best finished run of an experiment, among those that have a model.

    Best is the highest last value of the metric; the lowest, where its name ends in `loss`. Among
    equals it is the lowest `val/loss`, then the earliest start. Runs that were pruned, diverged,
    failed or are not over are never chosen, nor is one whose metric is NaN.

    Raises:
        ValueError: the store can't be opened, there is no such experiment, or no such run in it.
    """
    from mlflow.entities import ViewType

    from tracking.runs import default_experiment

    with reading() as client:
        name = default_experiment() if experiment is None else experiment
        experiment_id = _find_experiment(client, name)
        order, token = _order(metric), None
        while True:
            page = client.search_runs(
                [experiment_id], _FINISHED, ViewType.ACTIVE_ONLY, _PAGE, order, token
            )
            candidates = [run for run in page if _models(run) and _has(run, metric)]
            if candidates:
                return Choice(
                    run=candidates[0],
                    experiment=name,
                    metric=metric,
                    candidates=len(candidates),
                    more=bool(page.token),
                )
            token = page.token
            if not token:
                raise ValueError(_why_none(client, experiment_id, name, metric))


def model_uri(run: Run) -> str:
    """Return the URI `models:/<id>` of the last model that a run recorded, or raise ValueError."""
    models = _models(run)
    if not models:
        outcome = run.data.tags.get("outcome", run.info.status.lower())
        raise ValueError(f"{described(run)} has no model: it is {outcome}")
    return f"models:/{models[-1]}"


def described(run: Run) -> str:
    """Return how people are told of a run: `run <name> (<id>)`."""
    return f"run {run.info.run_name} ({run.info.run_id})"


def _find_experiment(client: mlflow.MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        others = [experiment.name for experiment in client.search_experiments(max_results=_PAGE)]
        raise ValueError(f"there is no experiment {name!r}, only {_listed(others)}{_advice(name)}")
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {name!r} is deleted: restore it by `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`, or choose another"
        )
    return str(found.experiment_id)


def _order(metric: str) -> list[str]:
    # A run whose metric is NaN, or that has none, comes last in either direction.
    direction = "ASC" if metric.endswith("loss") else "DESC"
    ranks = {metric: direction} if metric == "val/loss" else {metric: direction, "val/loss": "ASC"}
    return [f"metrics.`{key}` {way}" for key, way in ranks.items()] + ["attributes.start_time ASC"]


def _models(run: Run) -> list[str]:
    """Return the ids of a run's models, the last one last."""
    outputs = run.outputs.model_outputs if run.outputs else []
    return [output.model_id for output in sorted(outputs, key=lambda output: output.step)]


def _has(run: Run, metric: str) -> bool:
    return not math.isnan(run.data.metrics.get(metric, math.nan))


def _why_none(client: mlflow.MlflowClient, experiment_id: str, name: str, metric: str) -> str:
    finished = client.search_runs([experiment_id], _FINISHED, max_results=_PAGE)
    known = {key for run in finished if _models(run) for key in run.data.metrics}
    if known and metric not in known:
        return (
            f"no finished run of experiment {name!r} has the metric {metric!r}: "
            f"choose one of {_listed(known)}"
        )
    runs = client.search_runs([experiment_id], max_results=_PAGE)
    outcomes = Counter(run.data.tags.get("outcome", run.info.status.lower()) for run in runs)
    found = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return (
        f"experiment {name!r} has no finished run with a model and a number as {metric} "
        f"(runs: {found or 'none'}){_advice(name)}"
    )


def _advice(experiment: str) -> str:
    return f"; this makes one: python -m experiments.sweep --experiment {shlex.quote(experiment)}"


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in sorted(names)]
    more = len(quoted) - _NAMES_SHOWN
    return ", ".join(quoted[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
