"""Results of a comparison, read from Optuna and MLflow."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, create_trial

from experiments.comparison.plan import (
    SEEDS_A_SEARCH,
    Block,
    current,
    losses_in,
    read_blocks,
)
from experiments.comparison.results import (
    CURVE_COLUMNS,
    CURVE_METRICS,
    IRRELEVANT,
    REPEAT_COLUMNS,
    TRIAL_COLUMNS,
    Results,
    with_searched,
)
from experiments.comparison.search_rule import steps
from experiments.comparison.testing import CONFUSION_FILE, EXAMPLES_FILE
from experiments.study.parameters import searched
from experiments.study.recorder import EARLIER_NAMES
from experiments.study.storage import open_storage, storage_errors
from experiments.study.trials import finished_trials
from tracking.errors import without_passwords
from tracking.store import reading, sqlite_file

if TYPE_CHECKING:
    import mlflow
    import numpy.typing as npt

    from tracking.examples import Examples

METRICS = {
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "seconds": "worker/epoch_seconds",
    "images_per_second": "worker/images_per_second",
    "test_accuracy": "test/accuracy",
    "test_nll": "test/nll",
    "test_brier": "test/brier",
    "test_ece": "test/ece",
}
"""The metrics of a trial's run, by their names here."""


def load_results(name: str, storage: str) -> Results:
    """Return the results of a comparison, finished or not.

    Raises:
        ValueError: the storage has no comparison of this name, or can't be read.
    """
    file = sqlite_file(storage)
    if file is not None and not file.exists():
        raise ValueError(f"there is no comparison here: the storage {storage!r} does not exist")
    with storage_errors(storage), reading() as client:
        opened = open_storage(storage)
        try:
            record = optuna.load_study(study_name=name, storage=opened)
            plan = record.user_attrs["plan"]
        except KeyError:
            known = _known_comparisons(opened)
            raise ValueError(
                f"there is no comparison {name!r} in {without_passwords(storage)}, only "
                f"{', '.join(known) or 'none'}"
            ) from None
        read = _read_staged if plan.get("search") == "staged" else _read_sampled
        return _results(read(record, opened), record, client)


@dataclass(frozen=True)
class Found:
    """A finished trial, and the columns that say where it stands."""

    trial: FrozenTrial
    place: Mapping[str, Any]


@dataclass(kw_only=True)
class _Read:
    """The trials of a comparison."""

    plan: dict[str, Any]
    """What the plan has grown to."""
    trials: list[Found] = field(default_factory=list)
    repeats: list[Found] = field(default_factory=list)
    confirmed: list[Found] = field(default_factory=list)
    studies: dict[str, Study] = field(default_factory=dict)


def _read_sampled(record: Study, storage: Any) -> _Read:
    """Read a comparison with a search and a study for each loss."""
    name, plan = record.study_name, record.user_attrs["plan"]
    read = _Read(plan={"search": plan["sampler"], "searches": 1})
    for loss in plan["losses"]:
        study = _study(f"{name}/search/{loss}", storage)
        if study is not None:
            read.studies[loss] = study
            place = {"search": 1, "stage": "search", "seed": plan["seed"]}
            read.trials += [
                Found(each, {"loss": loss, "trial": each.number, **place})
                for each in finished_trials(study)
            ]
    confirmed = _study(f"{name}/confirm", storage)
    read.repeats = [
        Found(each, {"search": 1, "trial": each.number})
        for each in (finished_trials(confirmed) if confirmed else ())
    ]
    return read


def _read_staged(record: Study, storage: Any) -> _Read:
    """Read a comparison whose searches are repeated, in blocks of studies."""
    name, plan = record.study_name, record.user_attrs["plan"]
    blocks = current(read_blocks(record.user_attrs))
    read = _Read(
        plan={
            "losses": losses_in(blocks),
            "searches": max((search for each in blocks for _, search in each.pairs), default=0),
            "trials": max((each.trials for each in blocks), default=0),
        }
    )
    num_parameters = len(searched(plan))
    for block in blocks:
        read.trials += _trials_of(block, name, num_parameters, storage)
        final = _study(block.study(name, "repeats"), storage)
        read.repeats += [
            Found(each, dict.fromkeys(("search", "trial"), _search_of(each, plan)))
            for each in (finished_trials(final) if final else ())
        ]
    if blocks and (confirm := _study(blocks[-1].study(name, "confirm"), storage)):
        read.confirmed = [
            Found(each, {"search": 0, "trial": each.number}) for each in finished_trials(confirm)
        ]
    order = {loss: number for number, loss in enumerate(read.plan["losses"])}
    read.trials.sort(key=lambda each: (order[each.place["loss"]], each.place["search"]))
    for loss in read.plan["losses"]:
        read.studies[loss] = _in_memory(
            f"{name}/{loss}", [each for each in read.trials if each.place["loss"] == loss]
        )
    return read


def _search_of(trial: FrozenTrial, plan: Mapping[str, Any]) -> int:
    return int(trial.params["seed"] - plan["seed"]) // SEEDS_A_SEARCH


def _trials_of(block: Block, name: str, num_parameters: int, storage: Any) -> Iterator[Found]:
    """Yield the trainings of a block's searches, step by step."""
    before = 0
    for step in steps(block.trials, num_parameters):
        study = _study(block.study(name, step.name), storage)
        for trial in finished_trials(study) if study else ():
            pair, number = divmod(trial.number, step.trainings)
            loss, search = block.pairs[pair]
            place = {"loss": loss, "search": search, "stage": step.stage, "trial": before + number}
            yield Found(trial, place)
        before += step.trainings


def _in_memory(name: str, found: Sequence[Found]) -> Study:
    """Return a study of all trainings of a loss, for Optuna's figures."""
    study = optuna.create_study(study_name=name, direction="maximize")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        study.set_metric_names(["validation accuracy"])
    tried: dict[str, list[Any]] = {}
    for each in found:
        for name, value in each.trial.params.items():
            if name not in ("loss", "seed"):
                tried.setdefault(name, []).append(value)
    domains = {name: _distribution(values) for name, values in tried.items()}
    for each in found:
        trial = each.trial
        params = {name: value for name, value in trial.params.items() if name in domains}
        study.add_trial(
            create_trial(
                state=trial.state,
                value=trial.value,
                params=params,
                distributions={name: domains[name] for name in params},
                user_attrs={**trial.user_attrs, **each.place},
                intermediate_values=trial.intermediate_values,
            )
        )
    return study


def _distribution(values: Sequence[Any]) -> optuna.distributions.BaseDistribution:
    """Return the distribution that holds all of these values."""
    if all(isinstance(each, float) for each in values):
        low, high = min(values), max(values)
        return optuna.distributions.FloatDistribution(low, high, log=low > 0)
    return optuna.distributions.CategoricalDistribution(sorted(set(values)))


def _results(read: _Read, record: Study, client: mlflow.MlflowClient) -> Results:
    histories = _Histories(client)
    trials, repeats, confirmed = (
        [histories.row(each) for each in rows]
        for rows in (read.trials, read.repeats, read.confirmed)
    )
    curves = [
        *(curve for row in trials for curve in histories.curve("search", row)),
        *(curve for row in repeats for curve in histories.curve("confirm", row)),
    ]
    about = record.user_attrs["data"]
    plan = {
        **record.user_attrs["plan"],
        "repeats": record.user_attrs.get("repeats", 0),
        "min_effect": record.user_attrs.get("min_effect", IRRELEVANT),
        **read.plan,
        "given_test": about["given_test"],
    }
    confusions, hits = _predictions(client, repeats, len(about["classes"]))
    return Results(
        name=record.study_name,
        plan=plan,
        classes=tuple(about["classes"]),
        sizes=about["sizes"],
        trials=pd.DataFrame(trials, columns=with_searched(TRIAL_COLUMNS, plan)),
        repeats=pd.DataFrame(repeats, columns=with_searched(REPEAT_COLUMNS, plan)),
        confirmed=pd.DataFrame(confirmed, columns=with_searched(REPEAT_COLUMNS, plan)),
        curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
        confusions=confusions,
        hits=hits if about["given_test"] else {},
        ranges=dict.fromkeys(
            plan["losses"], (plan["learning_rate_min"], plan["learning_rate_max"])
        ),
        test_rounds=len(record.user_attrs.get("test_rounds", [])),
        examples=_examples(client, confirmed or repeats),
        studies=read.studies,
        provenance=_provenance(record),
    )


class _Histories:
    """The metrics of trials' runs; each run is read once."""

    def __init__(self, client: mlflow.MlflowClient) -> None:
        self.client = client
        self.of: dict[str, dict[str, dict[int, float]]] = {}

    def row(self, found: Found) -> dict[str, Any]:
        """Return the row of a finished trial."""
        trial = found.trial
        run_id = trial.user_attrs.get("run_id", "")
        metrics = self._read(run_id)
        # Optuna still has these if the user has deleted the run.
        values = trial.intermediate_values
        kept = {
            "val_accuracy": values[max(values)] if values else math.nan,
            "val_loss": trial.user_attrs.get("val_loss", math.nan),
        }
        seconds, rates = metrics["seconds"], metrics["images_per_second"]
        row = {
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            **trial.params,
            **found.place,
            "epochs": len(metrics["val_accuracy"]),
            "seconds": sum(seconds.values()),
            "images_per_second": float(np.mean(list(rates.values()))) if rates else math.nan,
            "test_evaluations": len(metrics["test_accuracy"]),
            "run_id": run_id,
            "reused": bool(trial.user_attrs.get("reused")),
        }
        for name in ("val_accuracy", "val_loss", *(n for n in METRICS if n.startswith("test"))):
            known = metrics[name]
            row[name] = known[max(known)] if known else kept.get(name, math.nan)
        return row

    def curve(self, stage: str, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a trial's epochs."""
        metrics = self.of[row["run_id"]]
        for epoch in sorted(metrics["val_accuracy"]):
            values = {name: metrics[name].get(epoch, math.nan) for name in CURVE_METRICS}
            identity = {key: row[key] for key in ("loss", "search", "trial")} | {"stage": stage}
            yield {**identity, "epoch": epoch, **values}

    def _read(self, run_id: str) -> dict[str, dict[int, float]]:
        from mlflow.exceptions import MlflowException

        recorded: Container[str] = ()
        with suppress(MlflowException):  # the run was deleted permanently
            recorded = self.client.get_run(run_id).data.metrics
        self.of[run_id] = {
            short: {
                entry.step: entry.value
                for name in (EARLIER_NAMES.get(key, ""), key)
                if name in recorded
                for entry in self.client.get_metric_history(run_id, name)
            }
            for short, key in METRICS.items()
        }
        return self.of[run_id]


def _predictions(
    client: mlflow.MlflowClient, repeats: Sequence[Mapping[str, Any]], num_classes: int
) -> tuple[dict[str, npt.NDArray[np.int64]], dict[str, npt.NDArray[np.bool_]]]:
    """Return the confusion matrix of each loss, and its hits: see `Results`."""
    from mlflow.artifacts import load_dict

    confusions: dict[str, npt.NDArray[np.int64]] = {}
    hits: dict[str, list[npt.NDArray[np.bool_] | None]] = {}
    for row in sorted(repeats, key=lambda each: int(each["seed"])):
        if not row["test_evaluations"]:
            continue
        location = client.get_run(row["run_id"]).info.artifact_uri
        counts = load_dict(f"{location}/{CONFUSION_FILE}")
        nothing = np.zeros((num_classes, num_classes), np.int64)
        images = np.array(counts["images"], np.int64)
        confusions[row["loss"]] = confusions.get(row["loss"], nothing) + images
        right = None  # older comparisons don't have it
        if "predicted" in counts:
            right = np.array(counts["predicted"]) == np.array(counts["true"])
        hits.setdefault(row["loss"], []).append(right)
    complete = {
        loss: [each for each in of_loss if each is not None] for loss, of_loss in hits.items()
    }
    return confusions, {
        loss: np.stack(each) for loss, each in complete.items() if len(each) == len(hits[loss])
    }


def _examples(
    client: mlflow.MlflowClient, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Examples]:
    """Return the examples of each loss' first tested run: see `Results`.

    A damaged file is left out: it is for a picture, and the results do not need it.
    """
    from mlflow.artifacts import load_text

    from tracking.examples import Examples

    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda each: int(each["seed"])):
        if row["outcome"] == "complete" and row["test_evaluations"]:
            first.setdefault(row["loss"], row["run_id"])
    found = {}
    for run_id in first.values():
        files = client.list_artifacts(run_id, str(PurePosixPath(EXAMPLES_FILE).parent))
        if EXAMPLES_FILE in {file.path for file in files}:  # older comparisons don't have it
            location = client.get_run(run_id).info.artifact_uri
            with suppress(ValueError, RecursionError):
                recorded = json.loads(load_text(f"{location}/{EXAMPLES_FILE}"))
                found[run_id] = Examples.from_dict(recorded)
    return found


def _provenance(record: Study) -> dict[str, str]:
    """Return what the comparison's processes recorded about themselves, without repetition."""
    starts: list[dict[str, str]] = record.user_attrs.get("starts", [])
    keys = ("command", "commit", "versions", "hardware", "experiment")
    made = {key: "; ".join(dict.fromkeys(start[key] for start in starts)) for key in keys}
    rounds = record.user_attrs.get("test_rounds", [])
    ends = [each["ended"] for each in rounds if "ended" in each]
    return {
        **made,
        "run": record.user_attrs.get("parent_run_id", ""),
        "started": starts[0]["started"] if starts else "",
        "ended": ends[-1] if ends else "",
        "test split looked at": f"{len(rounds)} times" if len(rounds) != 1 else "once",
    }


def _known_comparisons(storage: Any) -> list[str]:
    return [
        summary.study_name
        for summary in optuna.get_all_study_summaries(storage)
        if "plan" in summary.user_attrs
    ]


def _study(name: str, storage: Any) -> Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None
