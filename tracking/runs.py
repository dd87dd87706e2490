"""Open an MLflow run, log to it, record a model in it, close it.

Everything goes through one `MlflowClient` with explicit run ids: there is no active run, no global
state, and several runs can be open at a time. Every call has reached the server when it returns.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlflow
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
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
)

from tracking.fetching import DESCRIPTION, read_folder
from tracking.retries import Patience, PatientClient
from tracking.safety import harmless
from tracking.store import check_location, default_location, opening

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import Run as MlflowRun
    from mlflow.models import Model
    from torch import Tensor, nn
    from torch.export import ExportedProgram

DEFAULT_EXPERIMENT = "cnn-sweep"
MODEL_NAME = "model"

OUTCOMES = {
    "complete": "FINISHED",
    "diverged": "FINISHED",
    "pruned": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
"""What can become of a run, and the MLflow status that goes with it."""


def default_experiment() -> str:
    """Return the name of the experiment that is meant where none is named.

    That is the one which `mlflow run` or the user's environment has chosen, else `cnn-sweep`.
    """
    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return str(_client().get_experiment(experiment_id).name)
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """An experiment on a tracking server, in which runs are opened."""

    client: PatientClient
    experiment_id: str
    experiment: str
    context_tags: Mapping[str, str]
    """Who, from which source and commit: the same for all runs of a process, and slow to find."""

    @classmethod
    def open(cls, experiment: str | None = None, *, patience: Patience | None = None) -> Tracker:
        """Open the experiment named, which is made where there is none.

        Under `mlflow run`, runs have to be in the experiment of the run that it opened.

        Args:
            experiment: its name; None is `default_experiment()`.
            patience: with a server that goes away later.

        Raises:
            ValueError: the tracking store can't be opened, or the experiment can't be used.
        """
        _quieten()
        with opening() as client:
            adopted = os.environ.get("MLFLOW_RUN_ID")
            if adopted:
                try:
                    run = client.get_run(adopted).info
                except MlflowException as error:
                    if error.error_code not in (
                        "RESOURCE_DOES_NOT_EXIST",
                        "INVALID_PARAMETER_VALUE",
                    ):
                        raise
                    # MLflow's words say nothing of the variable, which a shell may have kept.
                    raise ValueError(
                        f"there is no run {adopted!r}, of MLFLOW_RUN_ID: unset that"
                    ) from error
                if run.lifecycle_stage != "active":
                    raise ValueError(f"run {adopted}, of MLFLOW_RUN_ID, is deleted: unset that")
                found = client.get_experiment(run.experiment_id)
                if experiment is not None and experiment != found.name:
                    raise ValueError(
                        f"experiment {experiment!r} is not that of the run which `mlflow run` "
                        f"opened, {found.name!r}: choose it by `mlflow run --experiment-name "
                        f"{experiment}`"
                    )
            else:
                name = experiment or default_experiment()
                found = client.get_experiment_by_name(name) or client.get_experiment(
                    client.create_experiment(name, default_location(name))
                )
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"experiment {found.name!r} is deleted: restore it by `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or choose another --experiment"
            )
        check_location(found.name, found.artifact_location)
        host = {"host": platform.node(), "pid": str(os.getpid())}
        return cls(
            client=PatientClient(client, patience or Patience()),
            experiment_id=found.experiment_id,
            experiment=found.name,
            context_tags=resolve_tags() | host,
        )

    @property
    def process_tags(self) -> dict[str, str]:
        """Which process works on a run, and where."""
        return {key: self.context_tags[key] for key in ("host", "pid")}

    def parent_run(
        self,
        name: str,
        *,
        tags: Mapping[str, str],
        earlier: str | None,
        under: str | None = None,
    ) -> Run:
        """Return the run that a sweep's trials hang under.

        Under `mlflow run` it is the run that this opened; else the one that an earlier start of the
        same sweep made, by its id or, where none was noted, its tags, if it is still there; else a
        new one. One that is itself `under` another, by the id of that, is never the first.
        """
        adopted = os.environ.get("MLFLOW_RUN_ID")
        if adopted and under is None:
            run = Run(self.client, adopted, self.experiment_id)
            run.set_tags({MLFLOW_RUN_NAME: name, **tags, **self.process_tags})
            return run
        # Its process may have died before it could note the id.
        run_before = self.find_run(earlier) if earlier else self.find_tagged(tags)
        if run_before is not None:
            run_before.reopen(tags=self.process_tags)
            return run_before
        parent = None if under is None else Run(self.client, under, self.experiment_id)
        return self.start_run(name, tags=tags, parent=parent)

    def is_active(self) -> bool:
        """Return whether the experiment is still there, and nobody has deleted it."""
        try:
            return bool(self.client.get_experiment(self.experiment_id).lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def find_run(self, run_id: str) -> Run | None:
        """Return the run with this id in this experiment, unless it is not there or deleted."""
        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        here = info.experiment_id == self.experiment_id and info.lifecycle_stage == "active"
        return Run(self.client, run_id, self.experiment_id) if here else None

    def find_tagged(self, tags: Mapping[str, str]) -> Run | None:
        """Return a run of this experiment with all of these tags, unless there is none."""
        wanted = " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())
        found = self.client.search_runs([self.experiment_id], wanted, max_results=1)
        return Run(self.client, found[0].info.run_id, self.experiment_id) if found else None

    def start_run(
        self,
        name: str,
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Run | None = None,
    ) -> Run:
        """Open a new run, under `parent` if there is one, with its params and tags."""
        all_tags = dict(self.context_tags) | dict(tags or {})
        if parent is not None:
            all_tags[MLFLOW_PARENT_RUN_ID] = parent.run_id
        mark = {"key": uuid.uuid4().hex}
        tries = 0

        def create() -> Run:
            nonlocal tries
            tries += 1
            # A run that was made, though the answer was lost, is found by its mark.
            made = self.find_tagged(mark) if tries > 1 else None
            if made is not None:
                return made
            info = self.client.create_run(
                self.experiment_id, tags=all_tags | mark, run_name=name
            ).info
            return Run(self.client, info.run_id, self.experiment_id)

        run = self.client.patience.insist(create)
        if params:
            run.log_params(params)
        return run


@dataclass(frozen=True)
class Run:
    """One MLflow run."""

    client: PatientClient
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
        return self.client.patience.insist(
            lambda: self._log_model(model, input_example, about, step)
        )

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


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    input_example: np.ndarray[Any, Any],
    metadata: Mapping[str, Any],
    about: Model | None = None,
) -> None:
    """Write a model to a folder, as `Run.log_model` records it.

    The first call of a process takes seconds, to import PyTorch's compiler.

    Args:
        model: as `Run.log_model` takes it, and `input_example` as well.
        folder: which is made.
        metadata: what to store beside it, with the names of its K `classes`.
        about: what is known of it already, say its run.

    Raises:
        ValueError: it is not on the CPU, or its graph is none that `tracking.predict` would load.
    """
    import numpy as np
    from mlflow import pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    _check_device(model)
    about = about or Model()
    images = TensorSpec(np.dtype(np.uint8), (-1, *input_example.shape[1:]))
    probabilities = TensorSpec(np.dtype(np.float32), (-1, len(metadata["classes"])))
    with _frugal_export():
        pytorch.save_model(
            model,
            folder,
            mlflow_model=about,
            serialization_format="pt2",
            signature=ModelSignature(Schema([images]), Schema([probabilities])),
            input_example=input_example,
            metadata=dict(metadata),
            # Inferring them would load the model in a process of its own: 12 s a model.
            pip_requirements=_requirements(),
        )
    # Else MLflow takes a GPU where there is one, which this graph is not for, and raises.
    about.flavors["python_function"]["config"] = {"device": "cpu"}
    about.save(str(folder / DESCRIPTION))


def _check_device(model: nn.Module) -> None:
    """Raise ValueError for a model that isn't on the CPU: no other machine might load its graph."""
    for name, weight in model.state_dict().items():
        if weight.device.type != "cpu":
            raise ValueError(
                f"a model is recorded from the CPU, for machines without a GPU: its {name} is on "
                f"{weight.device} (model.cpu() moves it)"
            )


_PROGRAMS: WeakKeyDictionary[nn.Module, ExportedProgram] = WeakKeyDictionary()


@contextmanager
def _frugal_export() -> Iterator[None]:
    """Have PyTorch trace a model once, and Python write the files of what it has traced.

    Each tracing takes 0.1 s and 0.2 MB that PyTorch never gives back. On a full disk, PyTorch's
    own writer ends the process; Python raises an OSError. And the files are without what PyTorch
    notes of each step: lines of source, and paths, of this machine.
    """
    import torch

    from tracking.cost import check_cost

    package: Any = torch.export
    export, save = package.export, package.save

    def export_once(
        model: nn.Module, example: tuple[Tensor, ...], **options: object
    ) -> ExportedProgram:
        program = _PROGRAMS.get(model)
        if program is None or not _is_of(program, model, example):
            program = export(model, example, **options)
            with _recordable():
                check_cost(program.module(check_guards=False), example[0].shape[1:])
            _PROGRAMS[model] = program
        return program

    def save_by_python(program: ExportedProgram, file: str) -> None:
        content = io.BytesIO()
        save(program, content)
        with _recordable():
            archive = harmless(content.getvalue())
        Path(file).write_bytes(archive)

    package.export, package.save = export_once, save_by_python
    try:
        yield
    finally:
        package.export, package.save = export, save


@contextmanager
def _recordable() -> Iterator[None]:
    """Say of what `tracking.predict` would not load that it can't be recorded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"this model can't be recorded: {error}") from error


def _is_of(program: ExportedProgram, model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    """Return whether a program has a model's tensors themselves, and was made with this example."""
    import torch

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made_with: tuple[Tensor, ...] = program.example_inputs[0] if program.example_inputs else ()
    return (
        all(tensor is tensors.get(name) for name, tensor in program.state_dict.items())
        and len(made_with) == len(example)
        and all(map(torch.equal, made_with, example))
    )


def _client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


def _requirements() -> list[str]:
    """Return what loading the model takes: MLflow, PyTorch and NumPy, in the versions at hand."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "numpy")]


def quoted(value: str) -> str:
    """Return a value as MLflow's search language takes it: it knows two quotes, and no escape."""
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise ValueError(f"{value!r} holds both kinds of quotes: MLflow can't search for it")


def _quieten() -> None:
    """Keep out of what users read what we tell them ourselves, in a line.

    The making of tables, the traceback that MLflow prints of each error that it raises as well, and
    that a version is waited for.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
