"""What a comparison of losses came to: all that its statistics and its report are made of."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import optuna
import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial

from experiments.comparison.testing import CONFUSION_FILE
from experiments.study.storage import open_storage, storage_errors
from experiments.study.trials import finished_trials
from tracking.errors import without_passwords
from tracking.store import reading, sqlite_file

if TYPE_CHECKING:
    import mlflow
    import numpy.typing as npt

TRIAL_COLUMNS = (
    "loss",
    "trial",
    "outcome",
    "learning_rate",
    "batch_size",
    "epochs",
    "val_accuracy",
    "val_loss",
    "seconds",
    "images_per_second",
    "run_id",
)
REPEAT_COLUMNS = (
    "loss",
    "trial",
    "seed",
    "outcome",
    "learning_rate",
    "batch_size",
    "val_accuracy",
    "test_accuracy",
    "test_nll",
    "test_brier",
    "test_ece",
    "test_evaluations",
    "seconds",
    "images_per_second",
    "run_id",
)
CURVE_COLUMNS = (
    "stage",
    "loss",
    "trial",
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """The results of a comparison, as far as it has come."""

    name: str
    plan: Mapping[str, Any]
    """What it was told: dataset, dataset_digest, losses, learning_rate_min, learning_rate_max,
    batch_sizes, trials (of each loss), epochs, repeats, seed, sampler, optimizer, schedule, device,
    precision; and given_test, whether the test split is the same for every seed."""
    classes: tuple[str, ...]
    """The K class names."""
    sizes: Mapping[str, int]
    """Images of each split: train, validation, test."""
    trials: pd.DataFrame
    """A row for each trial of the search that is over: `TRIAL_COLUMNS`. Accuracies are shares, 0 to
    1, of the last epoch; `outcome` is complete, diverged or failed (nothing is pruned); `seconds`
    and `images_per_second` are of training and validation, the mean over its epochs of the
    latter."""
    repeats: pd.DataFrame
    """A row for each repeat of a loss' best setting that is over: `REPEAT_COLUMNS`. Repeats of
    different losses with the same seed are paired: they share the split and the order of images.
    `test_…` is NaN until the test split was looked at, and stays so where there is no model, as the
    training diverged or failed. `test_nll` takes probabilities below 1e-6 as 1e-6."""
    curves: pd.DataFrame
    """A row for each epoch of each of these trainings: `CURVE_COLUMNS`; `stage` is search or
    confirm, and `trial` the number in it (the search counts for each loss anew)."""
    confusions: Mapping[str, npt.NDArray[np.int64]]
    """Of each loss, (K, K) test images over all repeats: rows are true, columns predicted."""
    studies: Mapping[str, Study]
    """The Optuna study of each loss' search."""
    provenance: Mapping[str, str]
    """How it was made, to be shown as it is: commit, versions, hardware, command, run, experiment,
    started, ended (ISO 8601, UTC)."""


def load_results(name: str, storage: str) -> Results:
    """Return what a comparison has come to so far.

    Raises:
        ValueError: there is none of this name in the storage, or it can't be read.
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
        trials = [
            histories.row(trial) for study in studies.values() for trial in finished_trials(study)
        ]
        repeats = [
            histories.row(trial) for trial in (finished_trials(confirmed) if confirmed else [])
        ]
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
            trials=pd.DataFrame(trials, columns=list(TRIAL_COLUMNS)),
            repeats=pd.DataFrame(repeats, columns=list(REPEAT_COLUMNS)),
            curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
            confusions=_confusions(client, repeats, len(classes)),
            studies=studies,
            provenance=_provenance(record),
        )


class _Histories:
    """The metrics of trials' runs, each asked for once."""

    _NAMES: ClassVar = {
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

    def __init__(self, client: mlflow.MlflowClient) -> None:
        self.client = client
        self.of: dict[str, dict[str, dict[int, float]]] = {}

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return what there is to say of a trial that is over."""
        run_id = trial.user_attrs.get("run_id", "")
        metrics = self._read(run_id)
        # What Optuna knows of it, too, is there though somebody has deleted the run.
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
        for name in ("val_accuracy", "val_loss", *(n for n in self._NAMES if n.startswith("test"))):
            known = metrics[name]
            row[name] = known[max(known)] if known else kept.get(name, math.nan)
        return row

    def curve(self, stage: str, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the epochs of a trial whose `row` this is."""
        metrics = self.of[row["run_id"]]
        for epoch in sorted(metrics["val_accuracy"]):
            values = {name: metrics[name].get(epoch, math.nan) for name in CURVE_COLUMNS[4:]}
            yield {
                "stage": stage,
                "loss": row["loss"],
                "trial": row["trial"],
                "epoch": epoch,
                **values,
            }

    def _read(self, run_id: str) -> dict[str, dict[int, float]]:
        from mlflow.exceptions import MlflowException

        there: Container[str] = ()
        with suppress(MlflowException):  # a run that somebody has deleted for good
            there = self.client.get_run(run_id).data.metrics
        self.of[run_id] = {
            short: {
                entry.step: entry.value for entry in self.client.get_metric_history(run_id, key)
            }
            if key in there
            else {}
            for short, key in self._NAMES.items()
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
    """Return how it was made: what each of its processes said, the same things once."""
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
