"""Log to an MLflow run, record a model in it, and close it.

All calls go through one `MlflowClient` with explicit run ids, so there is no global state, and
several runs can be open at once. A call returns after the server has answered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from tracking.models.fetching import read_folder
from tracking.models.recording import save_model
from tracking.retries import RetryingClient

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import Run as MlflowRun
    from torch import nn

MODEL_NAME = "model"

_METRICS_PER_REQUEST = 900  # with 100 tags, MLflow takes no more

OUTCOMES = {
    "complete": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
"""The outcomes of a run, each with its MLflow status."""


@dataclass(frozen=True)
class Run:
    """One MLflow run."""

    client: RetryingClient
    run_id: str
    experiment_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log params. To change a logged value raises `MlflowException`."""
        entities = [Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(self.run_id, params=entities)

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        tags: Mapping[str, str] | None = None,
        model_id: str | None = None,
        data: tuple[str, str] | None = None,
    ) -> None:
        """Log metrics at a step, and tags of the run, in one request.

        Args:
            metrics: values by name; NaN and infinity are kept.
            step: the step of all metrics.
            tags: of the run.
            model_id: a model that gets the metrics as well.
            data: name and digest of the data set that was measured.
        """
        now = int(time.time() * 1000)
        name, digest = data or (None, None)
        entities = [
            Metric(key, value, now, step, model_id, name, digest) for key, value in metrics.items()
        ]
        run_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        self.client.log_batch(self.run_id, metrics=entities, tags=run_tags)

    def log_history(
        self, metric: str, points: Sequence[tuple[int, float]], tags: Mapping[str, str]
    ) -> None:
        """Log values of a metric at several steps, and tags of the run, in one request.

        Of more values than MLflow takes in a request, it takes several.
        """
        now = int(time.time() * 1000)
        entities = [Metric(metric, value, now, step) for step, value in points]
        run_tags = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(entities), _METRICS_PER_REQUEST) or (0,):
            part = entities[start : start + _METRICS_PER_REQUEST]
            self.client.log_batch(self.run_id, metrics=part, tags=run_tags)
            run_tags = []

    def last_step(self, metric: str) -> int:
        """Return the last step of a metric, 0 if it was never logged."""
        history = self.client.get_metric_history(self.run_id, metric)
        return max((entry.step for entry in history), default=0)

    def params(self) -> dict[str, str]:
        """Return the params that were logged."""
        return dict(self.client.get_run(self.run_id).data.params)

    def last_value(self, metric: str) -> float | None:
        """Return the last value of a metric, None if it was never logged."""
        return self.client.get_run(self.run_id).data.metrics.get(metric)  # type: ignore[no-any-return]

    def tags(self) -> dict[str, str]:
        """Return the tags of the run."""
        return dict(self.client.get_run(self.run_id).data.tags)

    def outcome(self) -> str | None:
        """Return the outcome of the run, None if it has not ended."""
        return self.tags().get("outcome")

    def model_id(self) -> str | None:
        """Return the id of the run's last model, None if it has none."""
        outputs = self.client.get_run(self.run_id).outputs
        return outputs.model_outputs[-1].model_id if outputs and outputs.model_outputs else None

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, all in one request."""
        self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def log_text(self, text: str, file: str) -> None:
        """Store a text as an artifact of the run."""
        self.client.log_text(self.run_id, text, file)

    def log_folder(self, folder: Path, path: str) -> None:
        """Store the files of a folder as artifacts of the run, under a path."""
        self.client.log_artifacts(self.run_id, str(folder), path)

    def log_dataset(
        self, *, name: str, digest: str, source: str, profile: Mapping[str, object], context: str
    ) -> None:
        """Log the data set that the run used.

        Args:
            name: its name.
            digest: over all of its bytes, 36 characters at most (MLflow's limit).
            source: its origin, for people.
            profile: its properties, such as the sizes of its splits.
            context: its use, say `training`.
        """
        uri = json.dumps({"uri": source})
        dataset = Dataset(name, digest, "local", uri, profile=json.dumps(profile))
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_model(
        self,
        model: nn.Module,
        *,
        input_example: np.ndarray[Any, Any],
        classes: Sequence[str],
        step: int,
        metadata: Mapping[str, object] | None = None,
    ) -> str:
        """Record a model for prediction, and return its URI `models:/<id>`.

        The model is stored as a graph with its weights (`pt2`), for any batch size. Loading it runs
        no pickle and needs no class of ours.

        A run has one model: a second call returns the first. The run is linked to it last, so that
        a killed process leaves no run with an incomplete model.

        Args:
            model: in `eval()` mode, float32, on the CPU; images (N, H, W, C) uint8 → class
                probabilities (N, K) float32. It is traced once: a later call for the same model may
                have other weights only.
            input_example: images (N, H, W, C) uint8 with N ≥ 2 (one would fix the batch size).
            classes: the K class names, in the order of the probabilities.
            step: the epoch of the weights; the run's metrics of this step become the model's.
            metadata: stored with the class names.
        """
        assert not model.training
        assert len(input_example) >= 2
        about = {"classes": list(classes), **(metadata or {})}
        return self.client.retries.call(lambda: self._log_model(model, input_example, about, step))

    def _log_model(
        self,
        model: nn.Module,
        input_example: np.ndarray[Any, Any],
        metadata: dict[str, Any],
        step: int,
    ) -> str:
        from mlflow.models import Model

        run = self.client.get_run(self.run_id)
        if run.outputs is not None and run.outputs.model_outputs:
            return f"models:/{run.outputs.model_outputs[-1].model_id}"
        # Not by `Model.log`: it links the run before the model is written, and uses the active
        # experiment instead of the run's. First, delete what a killed process left.
        for left in self.client.search_logged_models(
            [self.experiment_id], f"source_run_id = '{self.run_id}'"
        ):
            self.client.delete_logged_model(left.model_id)
        logged = self.client.create_logged_model(
            self.experiment_id, MODEL_NAME, self.run_id, params=run.data.params
        )
        location, model_id = logged.artifact_location, logged.model_id
        about = Model(location, self.run_id, model_uuid=model_id, model_id=model_id)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / MODEL_NAME
            save_model(model, folder, input_example=input_example, metadata=metadata, about=about)
            self.client.log_model_artifacts(model_id, str(folder))
            digests = read_folder(folder).digests()
        self.client.set_logged_model_tags(model_id, digests)
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        data = metadata.get("dataset"), metadata.get("dataset_digest")
        known = data if None not in data else (None, None)  # MLflow takes both or neither
        self._link_metrics(model_id, known, run, step)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])
        return f"models:/{model_id}"

    def _link_metrics(
        self, model_id: str, data: tuple[str | None, str | None], run: MlflowRun, step: int
    ) -> None:
        """Log the run's metrics of a step for the model, with the data set that was measured."""
        # With the same time to the millisecond: else the run would have them twice.
        last = run.data.to_proto().metrics
        linked = [
            Metric(entry.key, entry.value, entry.timestamp, entry.step, model_id, *data)
            for of_name in last
            for entry in (
                [of_name]
                if of_name.step == step
                else self.client.get_metric_history(self.run_id, of_name.key)
            )
            if entry.step == step
        ]
        self.client.log_batch(self.run_id, metrics=linked)

    def reopen(self, *, tags: Mapping[str, str]) -> None:
        """Set a closed run to RUNNING again, delete its outcome, and set these tags."""
        self.client.update_run(self.run_id, status="RUNNING")
        self.set_tags(tags)
        if "outcome" in self.client.get_run(self.run_id).data.tags:
            self.client.delete_tag(self.run_id, "outcome")

    def delete(self) -> None:
        """Delete the run; MLflow can restore it."""
        self.client.delete_run(self.run_id)

    def end(self, outcome: str, *, reason: str | None = None) -> None:
        """Close the run with an outcome of `OUTCOMES`, and a reason if there is one."""
        assert outcome in OUTCOMES, outcome
        self.set_tags({"outcome": outcome} | ({"reason": reason} if reason else {}))
        self.client.set_terminated(self.run_id, status=OUTCOMES[outcome])
