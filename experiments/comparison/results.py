"""The results of a comparison of losses, which its statistics and its report read."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial

from experiments.comparison.testing import CONFUSION_FILE
from experiments.study.parameters import searched
from experiments.study.storage import open_storage, storage_errors
from experiments.study.trials import finished_trials
from tracking.errors import without_passwords
from tracking.store import reading, sqlite_file

if TYPE_CHECKING:
    import mlflow
    import numpy.typing as npt

TRIAL_COLUMNS = (
    *("loss", "search", "stage", "trial", "seed", "outcome", "learning_rate", "batch_size"),
    *("epochs", "val_accuracy", "val_loss", "seconds", "images_per_second", "run_id", "reused"),
)
REPEAT_COLUMNS = (
    *("loss", "search", "trial", "seed", "outcome", "learning_rate", "batch_size", "val_accuracy"),
    *("test_accuracy", "test_nll", "test_brier", "test_ece", "test_evaluations"),
    *("seconds", "images_per_second", "run_id", "reused"),
)
CURVE_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
CURVE_COLUMNS = ("stage", "loss", "search", "trial", "epoch", *CURVE_METRICS)
METRICS = {
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "val_loss": "val/loss",
    "val_accuracy": "val/accuracy",
    "seconds": "time/epoch_seconds",
    "images_per_second": "time/images_per_second",
    "test_accuracy": "test/accuracy",
    "test_nll": "test/nll",
    "test_brier": "test/brier",
    "test_ece": "test/ece",
}
"""The metrics of a trial's run, by their names here."""


def with_searched(columns: Sequence[str], plan: Mapping[str, Any]) -> list[str]:
    """Return columns of trials, with those of parameters that only some studies search."""
    others = [name for name in searched(plan) if name not in columns]
    at = columns.index("batch_size") + 1
    return [*columns[:at], *others, *columns[at:]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The results of a comparison, finished or not."""

    name: str
    plan: Mapping[str, Any]
    """Its settings: search (staged, random or tpe), dataset, dataset_digest, losses, searches (of
    each loss), trials (of each search), learning_rate_min, learning_rate_max, batch_sizes, epochs,
    repeats, seed, optimizer, schedule, device, precision; and given_test, whether the test split is
    the same for every seed."""
    classes: tuple[str, ...]
    """The K class names."""
    sizes: Mapping[str, int]
    """Images of each split: train, validation, test."""
    trials: pd.DataFrame
    """A row for each finished training of the searches: `TRIAL_COLUMNS`. Accuracies are shares, 0
    to 1, of the last epoch. `outcome` is complete, diverged or failed; nothing is pruned. `search`
    counts the searches of a loss from 1, `trial` the trainings of a search from 0, and `stage` is
    explore, refine or choose; random and tpe have one search and one stage, search. `seconds` is
    the time of training and validation, `images_per_second` the mean over the epochs. `reused`: the
    training was found, not made."""
    repeats: pd.DataFrame
    """A row for each finished repeat: `REPEAT_COLUMNS`. A repeat is the training, on a fresh seed,
    of the configuration that a search has chosen. With random and tpe there is one search, and its
    configuration has a repeat for each of several seeds. Repeats of different losses with the same
    seed are paired: their searches and they share the split and the order of images. `test_…` is
    NaN before the test, and where the training diverged or failed and left no model. `test_nll`
    takes probabilities below 1e-6 as 1e-6."""
    confirmed: pd.DataFrame
    """A row for each finished training of the configuration to use, on fresh seeds:
    `REPEAT_COLUMNS`. It was chosen from all searches of the winner together. Empty for random and
    tpe, where `repeats` confirm it."""
    hits: Mapping[str, npt.NDArray[np.bool_]]
    """Of each loss, (n, N): whether each of the N test images was predicted correctly, in each of
    its n tested repeats, ordered by seed. Empty unless the test split is given."""
    ranges: Mapping[str, tuple[float, float]]
    """Of each loss, the range of learning rates in which its searches began."""
    test_rounds: int
    """How often models were shown the test split; each model was shown it once."""
    curves: pd.DataFrame
    """A row for each epoch of each training in `trials` and `repeats`: `CURVE_COLUMNS`. `stage` is
    search or confirm; `search` and `trial` are those of the training's row."""
    confusions: Mapping[str, npt.NDArray[np.int64]]
    """Of each loss, (K, K) counts of test images over all repeats: rows true, columns predicted."""
    studies: Mapping[str, Study]
    """The Optuna study of each loss' search."""
    provenance: Mapping[str, str]
    """Texts: commit, versions, hardware, command, run, experiment, started and ended (in UTC)."""


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
        studies = {
            loss: study
            for loss in plan["losses"]
            if (study := _study(f"{name}/search/{loss}", opened)) is not None
        }
        confirmed = _study(f"{name}/confirm", opened)
        histories = _Histories(client)
        trials = [histories.row(each) for of in studies.values() for each in finished_trials(of)]
        confirmed_trials = finished_trials(confirmed) if confirmed else []
        repeats = [histories.row(each) for each in confirmed_trials]
        curves = [
            *(curve for row in trials for curve in histories.curve("search", row)),
            *(curve for row in repeats for curve in histories.curve("confirm", row)),
        ]
        about = record.user_attrs["data"]
        classes = tuple(about["classes"])
        repeated = {"repeats": record.user_attrs.get("repeats", 0)}
        return Results(
            name=name,
            plan=plan | repeated | {"given_test": about["given_test"]},
            classes=classes,
            sizes=about["sizes"],
            trials=pd.DataFrame(trials, columns=with_searched(TRIAL_COLUMNS, plan)),
            repeats=pd.DataFrame(repeats, columns=with_searched(REPEAT_COLUMNS, plan)),
            curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
            confusions=_confusions(client, repeats, len(classes)),
            studies=studies,
            provenance=_provenance(record),
        )


class _Histories:
    """The metrics of trials' runs; each run is read once."""

    def __init__(self, client: mlflow.MlflowClient) -> None:
        self.client = client
        self.of: dict[str, dict[str, dict[int, float]]] = {}

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the row of a finished trial."""
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
            "trial": trial.number,
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            **trial.params,
            "epochs": len(metrics["val_accuracy"]),
            "seconds": sum(seconds.values()),
            "images_per_second": float(np.mean(list(rates.values()))) if rates else math.nan,
            "test_evaluations": len(metrics["test_accuracy"]),
            "run_id": run_id,
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
            identity = {"stage": stage, "loss": row["loss"], "trial": row["trial"]}
            yield {**identity, "epoch": epoch, **values}

    def _read(self, run_id: str) -> dict[str, dict[int, float]]:
        from mlflow.exceptions import MlflowException

        recorded: Container[str] = ()
        with suppress(MlflowException):  # the run was deleted permanently
            recorded = self.client.get_run(run_id).data.metrics
        self.of[run_id] = {
            short: {
                entry.step: entry.value for entry in self.client.get_metric_history(run_id, key)
            }
            if key in recorded
            else {}
            for short, key in METRICS.items()
        }
        return self.of[run_id]


def _confusions(
    client: mlflow.MlflowClient, repeats: Iterable[Mapping[str, Any]], num_classes: int
) -> dict[str, npt.NDArray[np.int64]]:
    from mlflow.artifacts import load_dict

    found: dict[str, npt.NDArray[np.int64]] = {}
    for row in repeats:
        if row["test_evaluations"]:
            location = client.get_run(row["run_id"]).info.artifact_uri
            images = np.array(load_dict(f"{location}/{CONFUSION_FILE}")["images"], np.int64)
            nothing = np.zeros((num_classes, num_classes), np.int64)
            found[row["loss"]] = found.get(row["loss"], nothing) + images
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
