"""Open an MLflow experiment, and open runs in it."""

from __future__ import annotations

import logging
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from tracking.errors import is_transient, one_line
from tracking.retries import RetryingClient, RetryPolicy
from tracking.runs import Run
from tracking.store import (
    check_location,
    default_experiment,
    default_location,
    none_if_missing,
    opening,
    quoted,
)
from tracking.views import View, experiment_note, runs_link

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """An experiment on a tracking server, in which runs are opened."""

    client: RetryingClient
    experiment_id: str
    experiment: str
    context_tags: Mapping[str, str]
    """User, source and commit: the same for all runs of a process, and slow to find."""
    experiment_tags: Mapping[str, str]
    """Tags of the experiment, as they were when it was opened."""

    @classmethod
    def open(cls, experiment: str | None = None, *, retries: RetryPolicy | None = None) -> Tracker:
        """Open an experiment (None: the default one), and create it if it does not exist.

        Raises ValueError if the tracking store can't be opened, or the experiment can't be used.
        """
        _quieten()
        with opening() as client:
            if run_id := os.environ.get("MLFLOW_RUN_ID"):
                found = _experiment_of_mlflow_run(client, run_id, experiment)
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
            client=RetryingClient(client, retries or RetryPolicy()),
            experiment_id=found.experiment_id,
            experiment=found.name,
            context_tags=resolve_tags() | host,
            experiment_tags=found.tags,
        )

    @property
    def process_tags(self) -> dict[str, str]:
        """The host and the process id, as tags."""
        return {key: self.context_tags[key] for key in ("host", "pid")}

    def parent_run(
        self, name: str, *, tags: Mapping[str, str], earlier: str | None, under: str | None = None
    ) -> Run:
        """Return the parent run of a sweep's trials.

        Under `mlflow run` it is the run that this opened, unless `under` names the id of another
        parent. Else it is the run of an earlier start of the same sweep, found by its id or, if
        that was not noted, by its tags. Else it is a new run.
        """
        opened = os.environ.get("MLFLOW_RUN_ID")
        if opened and under is None:
            run = Run(self.client, opened, self.experiment_id)
            run.set_tags({MLFLOW_RUN_NAME: name, **tags, **self.process_tags})
            return run
        # Its process may have died before it noted the id.
        run_before = self.find_run(earlier) if earlier else self.find_tagged(tags)
        if run_before is not None:
            run_before.reopen(tags=self.process_tags)
            return run_before
        parent = None if under is None else Run(self.client, under, self.experiment_id)
        return self.start_run(name, tags=tags, parent=parent)

    def show(self, view: View) -> tuple[str, str]:
        """Store a view of runs, and name it in the experiment's description.

        Returns:
            The view's link, and an empty text; or the link to all runs, and why there is no view.
        """
        before = self.experiment_tags
        note = before.get(MLFLOW_RUN_NOTE, "")
        tags = {
            view.tag: view.value(before.get(view.tag, "")),
            MLFLOW_RUN_NOTE: experiment_note(view, self.experiment_id, note),
        }
        try:
            for key, value in tags.items():
                if before.get(key) != value:
                    self.client.set_experiment_tag(self.experiment_id, key, value)
        except MlflowException as error:
            if is_transient(error):
                raise
            return runs_link(self.experiment_id), one_line(error)
        return view.link(self.experiment_id), ""

    def is_active(self) -> bool:
        """Return whether the experiment exists and is not deleted."""
        found = none_if_missing(lambda: self.client.get_experiment(self.experiment_id))
        return found is not None and found.lifecycle_stage == "active"

    def find_run(self, run_id: str) -> Run | None:
        """Return the run with this id in this experiment, None if it is missing or deleted."""
        found = none_if_missing(lambda: self.client.get_run(run_id).info)
        if found is None or found.experiment_id != self.experiment_id:
            return None
        is_active = found.lifecycle_stage == "active"
        return Run(self.client, run_id, self.experiment_id) if is_active else None

    def find_tagged(self, tags: Mapping[str, str]) -> Run | None:
        """Return a run of this experiment with all of these tags, None if there is none."""
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
            # The first try may have created the run, with its answer lost: the mark finds it.
            if tries > 1 and (made := self.find_tagged(mark)):
                return made
            tags = all_tags | mark
            info = self.client.create_run(self.experiment_id, tags=tags, run_name=name).info
            return Run(self.client, info.run_id, self.experiment_id)

        run = self.client.retries.call(create)
        if params:
            run.log_params(params)
        return run


def _experiment_of_mlflow_run(
    client: MlflowClient, run_id: str, experiment: str | None
) -> Experiment:
    """Return the experiment of the run that `mlflow run` opened, or raise ValueError."""
    try:
        run = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        # MLflow's message does not name the variable, which a shell may have kept.
        raise ValueError(f"there is no run {run_id!r}: unset MLFLOW_RUN_ID") from error
    if run.lifecycle_stage != "active":
        raise ValueError(f"run {run_id} is deleted: unset MLFLOW_RUN_ID")
    found = client.get_experiment(run.experiment_id)
    if experiment is not None and experiment != found.name:
        raise ValueError(
            f"experiment {experiment!r} is not that of the run which `mlflow run` opened, "
            f"{found.name!r}: choose it by `mlflow run --experiment-name {experiment}`"
        )
    return found


def _quieten() -> None:
    """Hide log lines of MLflow: our own messages say the same in one line.

    They tell of the creation of tables, of errors that are raised as well (as tracebacks), and of
    waiting for a version.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
