"""Open an MLflow run, log to it, record a model in it, close it.

Everything goes through one `MlflowClient` with explicit run ids: there is no active run, no global
state, and several runs can be open at a time. Every call has reached the server when it returns.
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

OUTCOMES = {
    "complete": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
"""What can become of a run, and the MLflow status that goes with it."""


@dataclass(frozen=True)
class Run:
    """One MLflow run."""

    client: RetryingClient
    run_id: str
    experiment_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log params; one that is there already with another value raises `MlflowException`."""
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
        """Log metrics at a step, and tags, all in one request.

        NaN and infinity are kept as such.

        Args:
            metrics: values by name.
            step: of all of them.
            tags: of the run.
            model_id: the model that they are of as well.
            data: name and digest of the data set that they are measured on.
        """
        now = int(time.time() * 1000)
        name, digest = data or (None, None)
        entities = [
            Metric(key, value, now, step, model_id, name, digest) for key, value in metrics.items()
        ]
        run_tags = [RunTag(key, value) for key, value in (tags or {}).items()]
        self.client.log_batch(self.run_id, metrics=entities, tags=run_tags)

    def last_step(self, metric: str) -> int:
        """Return the last step at which a metric was logged, 0 if it never was."""
        history = self.client.get_metric_history(self.run_id, metric)
        return max((entry.step for entry in history), default=0)

    def params(self) -> dict[str, str]:
        """Return the params that were logged."""
        return dict(self.client.get_run(self.run_id).data.params)

    def last_value(self, metric: str) -> float | None:
        """Return the last value of a metric, None if it was never logged."""
        value: float | None = self.client.get_run(self.run_id).data.metrics.get(metric)
        return value

    def outcome(self) -> str | None:
        """Return what became of the run, None if it isn't over."""
        outcome: str | None = self.client.get_run(self.run_id).data.tags.get("outcome")
        return outcome

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
        """Store all that is in a folder as artifacts of the run, under a path."""
        self.client.log_artifacts(self.run_id, str(folder), path)

    def log_dataset(
        self, *, name: str, digest: str, source: str, profile: Mapping[str, object], context: str
    ) -> None:
        """Log the data set that the run used.

        Args:
            name: what the data set is called.
            digest: over all of its bytes, 36 characters at most (MLflow's limit).
            source: where it came from, for people.
            profile: what to know of it, say the sizes of its splits.
            context: what it was used for, say `training`.
        """
        dataset = Dataset(
            name=name,
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
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
        """Record a model that labels images, and return its URI `models:/<id>`.

        The model is stored as a graph with its weights (`pt2`): loading it runs no pickle and needs
        no class of ours. Its batch size is free.

        A run has one model: if it has it already, that is the answer. The run is linked to it last,
        so that a process that dies meanwhile leaves no run with half a model.

        Args:
            model: in `eval()` mode, float32, on the CPU; images (N, H, W, C) uint8 → class
                probabilities (N, K) float32. Its graph is traced once: of a model that was
                recorded before, only the weights may have changed.
            input_example: images (N, H, W, C) uint8 with N ≥ 2 (one would freeze the batch size).
            classes: the K class names, in the order of the probabilities.
            step: the epoch that the weights are of; the run's metrics of this step become the
                model's.
            metadata: what else to store beside the class names.
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
        # Step by step rather than by `Model.log`: that links the run to a model which is still to
        # be written, and puts it into the active experiment instead of the run's.
        self._delete_unlinked_models()
        logged = self.client.create_logged_model(
            self.experiment_id, MODEL_NAME, self.run_id, params=run.data.params
        )
        about = Model(
            artifact_path=logged.artifact_location,
            run_id=self.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / MODEL_NAME
            save_model(model, folder, input_example=input_example, metadata=metadata, about=about)
            self.client.log_model_artifacts(logged.model_id, str(folder))
            digests = read_folder(folder).digests()
        self.client.set_logged_model_tags(logged.model_id, digests)
        self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        data = metadata.get("dataset"), metadata.get("dataset_digest")
        known = data if None not in data else (None, None)  # MLflow takes both or neither
        self._link_metrics(logged.model_id, known, run, step)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step)])
        return f"models:/{logged.model_id}"

    def _delete_unlinked_models(self) -> None:
        """Delete what a process that died while recording a model of this run left of it."""
        for left in self.client.search_logged_models(
            [self.experiment_id], f"source_run_id = '{self.run_id}'"
        ):
            self.client.delete_logged_model(left.model_id)

    def _link_metrics(
        self, model_id: str, data: tuple[str | None, str | None], run: MlflowRun, step: int
    ) -> None:
        """Have the model show the run's metrics of a step, and which data they were measured on."""
        # The same ones to the millisecond: else the run would have them twice.
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
        """Set a run that was closed to RUNNING again, without an outcome, but with these tags."""
        self.client.update_run(self.run_id, status="RUNNING")
        self.set_tags(tags)
        if "outcome" in self.client.get_run(self.run_id).data.tags:
            self.client.delete_tag(self.run_id, "outcome")

    def delete(self) -> None:
        """Delete the run, as far as MLflow does: it can be restored."""
        self.client.delete_run(self.run_id)

    def end(self, outcome: str, *, reason: str | None = None) -> None:
        """Close the run with an outcome of `OUTCOMES`, and say why if there is something to say."""
        assert outcome in OUTCOMES, outcome
        tags = {"outcome": outcome}
        if reason:
            tags["reason"] = reason
        self.set_tags(tags)
        self.client.set_terminated(self.run_id, status=OUTCOMES[outcome])
