"""An experiment of a tracking server, in which runs are opened.

Everything goes through one `MlflowClient` with explicit run ids: there is no active run, no global
state, and several runs can be open at a time.
"""

from __future__ import annotations

import logging
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from tracking.retries import RetryingClient, RetryPolicy
from tracking.runs import Run
from tracking.store import check_location, default_experiment, default_location, opening, quoted


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """An experiment on a tracking server, in which runs are opened."""

    client: RetryingClient
    experiment_id: str
    experiment: str
    context_tags: Mapping[str, str]
    """Who, from which source and commit: the same for all runs of a process, and slow to find."""

    @classmethod
    def open(cls, experiment: str | None = None, *, retries: RetryPolicy | None = None) -> Tracker:
        """Open the experiment named, which is made where there is none.

        Under `mlflow run`, runs have to be in the experiment of the run that it opened.

        Args:
            experiment: its name; None is `default_experiment()`.
            retries: how long to wait for a server that goes away later.

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
            client=RetryingClient(client, retries or RetryPolicy()),
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

        run = self.client.retries.call(create)
        if params:
            run.log_params(params)
        return run


def _quieten() -> None:
    """Keep out of what users read what we tell them ourselves, in a line.

    The making of tables, the traceback that MLflow prints of each error that it raises as well, and
    that a version is waited for.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("mlflow.store.model_registry.abstract_store").setLevel(logging.WARNING)
