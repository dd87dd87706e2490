"""The best finished run of an experiment, or one clear line on why there is none.

`python -m tracking.best` prints it with its runners-up. `import tracking.best` is quick: MLflow and
pandas are imported by what needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tracking.cli import Parser, run_command
from tracking.store import one_line, reading

if TYPE_CHECKING:
    import mlflow
    import pandas as pd
    from mlflow.entities import Run

DEFAULT_METRIC = "val/accuracy"

# One page holds all runs of most sweeps, so that their number can be told; more are not counted.
_PAGE = 100
_FINISHED = "tags.outcome = 'complete' and attributes.status = 'FINISHED'"
_NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which runs are chosen from. What is None or empty excludes none."""

    study: str | None = None
    """The name of an Optuna study."""
    loss: str | None = None
    where: str = ""
    """A condition in MLflow's search syntax, say `params.batch_size = '64'`."""

    def __str__(self) -> str:
        given = [f"{key} {value!r}" for key, value in self._given().items()]
        return " and ".join([*given, self.where] if self.where else given)

    def clause(self) -> str:
        """Return what MLflow is asked for, beside what holds for every choice."""
        from tracking.runs import quoted

        keys = {"study": "tags.study", "loss": "params.loss"}
        parts = [f"{keys[key]} = {quoted(value)}" for key, value in self._given().items()]
        # Last, and there is neither `or` nor a bracket: whatever it is, it can only exclude more.
        return " and ".join([_FINISHED, *parts, *([self.where] if self.where else [])])

    def _given(self) -> dict[str, str]:
        values = {"study": self.study, "loss": self.loss}
        return {key: value for key, value in values.items() if value}


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
        among = f" with {self.filters}" if str(self.filters) else ""
        return (
            f"best of {count} finished {runs} of experiment {self.experiment!r}{among} by "
            f"{self.metric} = {self.run.data.metrics[self.metric]:.4g}: {described(self.run)}"
            f"{self._tie()}"
        )

    def _tie(self) -> str:
        """Return how a tie was settled, if there was one."""
        best, *others = self.ranked
        value = best.data.metrics[self.metric]
        equal = [run for run in others if run.data.metrics[self.metric] == value]
        if not equal:
            return ""
        losses = [run.data.metrics.get("val/loss", math.nan) for run in (best, *equal)]
        lower = math.isfinite(losses[0]) and all(
            math.isnan(loss) or loss > losses[0] for loss in losses[1:]
        )
        by = f"its val/loss, {losses[0]:.4g}, is the lowest" if lower else "it was started first"
        return f"; of {len(equal) + 1} equal ones, {by}"


def best_run(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
) -> Run:
    """Return the best finished run of an experiment, one that has a model: see `choose`."""
    return choose(experiment, metric=metric, study=study, loss=loss, where=where).run


def choose(
    experiment: str | None = None,
    *,
    metric: str = DEFAULT_METRIC,
    study: str | None = None,
    loss: str | None = None,
    where: str | None = None,
    top: int = 1,
) -> Choice:
    """Choose the best finished run of an experiment, among those that have a model.

    Best is the highest last value of the metric; the lowest, where its name ends in `loss`. Among
    equals it is the lowest `val/loss`, then the earliest start. Runs that were pruned, diverged,
    failed or are not over are never chosen, nor is one whose metric is NaN, or whose model was
    deleted.

    Args:
        experiment: its name; None is that of `mlflow run` or the environment, else `cnn-sweep`.
        metric: what is best.
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
        ranked: list[Run] = []
        for page, is_last in _pages(client, experiment_id, filters.clause(), _order(metric)):
            for run in page:
                if not _has(run, metric) or not _models(run):
                    continue
                # Asked of no more than it takes: a deleted model is still listed by its run.
                if len(ranked) >= top or _is_there(client, _models(run)[-1]):
                    ranked.append(run)
            if len(ranked) >= top or is_last:
                break
        if not ranked:
            raise ValueError(_why_none(client, experiment_id, name, metric, filters))
        return Choice(
            ranked=tuple(ranked),
            experiment=name,
            metric=metric,
            filters=filters,
            more=not is_last,
        )


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
        raise ValueError(f"there is no experiment {name!r}, only {listed(others)}{_advice(name)}")
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {name!r} is deleted: restore it by `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`, or choose another"
        )
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


def _pages(
    client: mlflow.MlflowClient, experiment_id: str, clause: str, order: list[str]
) -> Iterator[tuple[list[Run], bool]]:
    """Yield the runs found, page by page, each with whether it is the last."""
    from mlflow.entities import ViewType

    token = None
    while True:
        page = client.search_runs(
            [experiment_id], clause, ViewType.ACTIVE_ONLY, _PAGE, order, token
        )
        token = page.token
        yield list(page), not token


def _is_there(client: mlflow.MlflowClient, model_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


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


def _why_none(
    client: mlflow.MlflowClient, experiment_id: str, name: str, metric: str, filters: Filters
) -> str:
    found = client.search_runs([experiment_id], filters.clause(), max_results=_PAGE)
    known = {key for run in found if _models(run) for key in run.data.metrics}
    among = f" with {filters}" if str(filters) else ""
    if known and metric not in known:
        return (
            f"no finished run of experiment {name!r}{among} has the metric {metric!r}: "
            f"choose one of {listed(known)}"
        )
    if among and not known:
        others = client.search_runs([experiment_id], _FINISHED, max_results=_PAGE)
        if with_model := [run for run in others if _models(run)]:
            return f"no finished run of experiment {name!r}{among}{_what_there_is(with_model)}"
    runs = client.search_runs([experiment_id], max_results=_PAGE)
    outcomes = Counter(run.data.tags.get("outcome", run.info.status.lower()) for run in runs)
    there = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return (
        f"experiment {name!r} has no finished run with a model and a number as {metric} "
        f"(runs: {there or 'none'}){_advice(name)}"
    )


def _what_there_is(runs: Sequence[Run]) -> str:
    """Return what the runs are that filters have all excluded."""
    losses = {run.data.params["loss"] for run in runs if "loss" in run.data.params}
    studies = {run.data.tags["study"] for run in runs if "study" in run.data.tags}
    parts = [f"losses {listed(losses)}"] if losses else []
    parts += [f"studies {listed(studies)}"] if studies else []
    return f" has a model; those that have: {'; '.join(parts) or len(runs)}"


def _advice(experiment: str) -> str:
    return f"; this makes one: python -m experiments.sweep --experiment {shlex.quote(experiment)}"


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, as many as a line takes."""
    quoted = [repr(name) for name in sorted(names)]
    more = len(quoted) - _NAMES_SHOWN
    return ", ".join(quoted[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


# The command line


def add_choice_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags that say which runs to choose from: see `choice_filters`."""
    parser.add_argument(
        "--study", metavar="NAME", help="choose among the runs of this Optuna study only"
    )
    parser.add_argument("--loss", metavar="NAME", help="choose among the runs with this loss only")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="choose among the runs for which this holds, in MLflow's search syntax, say "
        "\"params.batch_size = '64' and metrics.`val/loss` < 0.5\"",
    )


def choice_filters(options: argparse.Namespace) -> dict[str, str | None]:
    """Return what those flags say, as `choose` takes it."""
    return {"study": options.study, "loss": options.loss, "where": options.where}


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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    return str(_frame(rows).to_csv(index=False, lineterminator="\n"))


def _as_json(rows: Sequence[dict[str, Any]]) -> str:
    # JSON has no NaN.
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


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
        "them. Ties: the lower val/loss, then the earlier run.",
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
    print(choice, file=sys.stdout if options.format == "table" else sys.stderr)
    print(FORMATS[options.format](table(choice, options.top)), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a command line asks for, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
