"""What the run of a trial records: its configuration, data, code and curve."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cnn.config import TrainConfig
from cnn.images import IMAGE_SIZE
from experiments.study.recorder import EARLIER_NAMES, OPTIONS_FILE
from tracking.run_search import described
from tracking.store import none_if_missing, reading, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROLES = ("trial", "rerun")

_MAX_OPTIONS = 2**20  # bytes of a file of options
_MAX_PARENTS = 5

Curve = Mapping[int, Mapping[str, float]]
"""Metrics by epoch, without times: a machine's load changes those."""


@dataclass(frozen=True, kw_only=True)
class RecordedTrial:
    """A trial, or a rerun of one, as its run records it."""

    run_id: str
    name: str
    experiment: str
    outcome: str
    config: TrainConfig
    dataset: str
    """The data set's name."""
    dataset_digest: str
    image_size: int
    options: Mapping[str, Any]
    """The options of the command that made it, as far as they are recorded."""
    source: str
    """Where the data set was, as text."""
    made_with: Mapping[str, str]
    """Code, versions and arithmetic, as far as they are recorded."""
    curve: Curve


def read_trial(run_id: str) -> RecordedTrial:
    """Return what a trial's run records.

    Raises:
        ValueError: there is no such run, it is no trial's, or it lacks what a training depends on.
    """
    with reading() as client:
        run = none_if_missing(lambda: client.get_run(run_id))
        if run is None:
            raise ValueError(f"there is no run {run_id!r} at {tracking_uri()}")
        if run.info.lifecycle_stage != "active":
            restore = f"mlflow runs restore --run-id {run_id}"
            raise ValueError(f"{described(run)} is deleted: restore it by `{restore}`")
        role = run.data.tags.get("role")
        if role not in ROLES:
            what = f"that of a {role}" if role else "not one of this tool"
            raise ValueError(f"{described(run)} is no trial's run, but {what}: choose a trial's")
        params = run.data.params
        try:
            config = TrainConfig.from_params(params)
            name, digest = params["dataset"], params["dataset_digest"]
            image_size = int(params.get("image_size", IMAGE_SIZE))
        except KeyError as error:
            raise ValueError(f"{described(run)} can't be trained again: no {error}") from None
        except ValueError as error:
            raise ValueError(f"{described(run)} can't be trained again: {error}") from error
        return RecordedTrial(
            run_id=run.info.run_id,
            name=run.info.run_name,
            experiment=client.get_experiment(run.info.experiment_id).name,
            outcome=run.data.tags.get("outcome", run.info.status.lower()),
            config=config,
            dataset=name,
            dataset_digest=digest,
            image_size=image_size,
            options=_options(client, run),
            source=_source(run),
            made_with=_made_with(run),
            curve=_curve(client, run),
        )


def _options(client: MlflowClient, run: Run) -> dict[str, Any]:
    """Return the options in the file of the first run above this one that has it."""
    for parent in _parents(client, run):
        files = {each.path: each.file_size or 0 for each in client.list_artifacts(parent)}
        if files.get(OPTIONS_FILE, math.inf) <= _MAX_OPTIONS:
            with TemporaryDirectory() as scratch:
                file = Path(client.download_artifacts(parent, OPTIONS_FILE, scratch))
                try:
                    return tomllib.loads(file.read_text("utf-8"))
                except (UnicodeDecodeError, tomllib.TOMLDecodeError):
                    return {}  # edited by hand
    return {}


def _parents(client: MlflowClient, run: Run) -> Iterator[str]:
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    for _ in range(_MAX_PARENTS):
        parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        found = none_if_missing(partial(client.get_run, parent)) if parent else None
        if found is None:
            return
        run = found
        yield run.info.run_id


def _source(run: Run) -> str:
    inputs = run.inputs.dataset_inputs if run.inputs else []
    try:
        return str(json.loads(inputs[0].dataset.source)["uri"])
    except (IndexError, KeyError, TypeError, ValueError):
        return ""


def _made_with(run: Run) -> dict[str, str]:
    made: dict[str, str] = {}
    for key, value in run.data.tags.items():
        prefix, _, name = key.partition(".")
        if prefix in ("code", "worker"):
            made[name] = value
    for name in ("network_digest", "training_digest"):
        if name in run.data.params:
            made[name.replace("_", " ")] = run.data.params[name]
    return made


def _curve(client: MlflowClient, run: Run) -> Curve:
    curve: dict[int, dict[str, float]] = {}
    earlier = {before: name for name, before in EARLIER_NAMES.items()}
    for recorded in run.data.metrics:
        name = earlier.get(recorded, recorded)
        if name.startswith(("train/", "val/")):
            for entry in client.get_metric_history(run.info.run_id, recorded):
                curve.setdefault(entry.step, {})[name] = entry.value
    return dict(sorted(curve.items()))


@dataclass(frozen=True, kw_only=True)
class CurveComparison:
    """Two curves, compared in the epochs that the first has."""

    num_epochs: int
    first: int | None
    """The first epoch that differs, None if all are equal bit for bit."""
    largest: Mapping[str, tuple[float, int]]
    """The largest difference of each metric that differs, with its epoch."""

    def __str__(self) -> str:
        if self.first is None:
            epochs = f"all {self.num_epochs} epochs" if self.num_epochs > 1 else "the one epoch"
            return f"equal bit for bit in {epochs} of the trial"
        texts = (
            f"{name} by {value:.3g} at most (epoch {epoch})"
            for name, (value, epoch) in self.largest.items()
        )
        return f"differs from epoch {self.first} of {self.num_epochs} on: {', '.join(texts)}"


def compare_curves(before: Curve, after: Curve) -> CurveComparison:
    """Compare a curve with an earlier one, in all epochs and metrics of the earlier one."""
    largest: dict[str, tuple[float, int]] = {}
    first = None
    for epoch, metrics in before.items():
        for name, value in metrics.items():
            difference = _difference(value, after.get(epoch, {}).get(name))
            if difference > 0:
                first = first or epoch
                largest[name] = max(largest.get(name, (0.0, epoch)), (difference, epoch))
    return CurveComparison(num_epochs=len(before), first=first, largest=largest)


def _difference(one: float, other: float | None) -> float:
    if other is None:
        return math.inf
    one, other = _as_stored(one), _as_stored(other)
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other)
    return math.inf if math.isnan(difference) else difference


def _as_stored(value: float) -> float:
    """Return a metric as MLflow's databases return it: the largest number for infinity."""
    return max(-sys.float_info.max, min(sys.float_info.max, value)) if value == value else value
