"""The runs of this tool in MLflow, with their models, and the registered models made of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from tracking.errors import without_passwords
from tracking.store import none_if_missing
from tracking.views import PREFIX, experiment_note, view_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run of a sweep, a comparison, a trial or a rerun."""

    run_id: str
    role: str
    study: str
    """The name of its study or comparison; empty for a rerun."""
    study_id: str
    is_deleted: bool
    """Whether it was deleted in MLflow, where it can still be restored."""
    models: tuple[str, ...]
    folders: tuple[str, ...]
    """The addresses of its artifacts, and of those of its models."""
    unfinished: Mapping[str, str] | None
    """The params of a trial that has not ended; None for other runs."""


@dataclass(frozen=True, kw_only=True)
class StoredVersion:
    """A version of a registered model."""

    model: str
    version: str
    run_id: str
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        aliases = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.model} version {self.version}{aliases}"


def read_runs(client: MlflowClient) -> list[StoredRun]:
    """Return all runs of this tool, deleted ones as well."""
    from mlflow.entities import ViewType

    found: list[StoredRun] = []
    for experiment in _pages(client.search_experiments, view_type=ViewType.ALL, max_results=_PAGE):
        pages = _pages(
            client.search_runs,
            experiment_ids=[experiment.experiment_id],
            filter_string="tags.role LIKE '%'",
            run_view_type=ViewType.ALL,
            max_results=_PAGE,
        )
        found += [_stored(run, f"{experiment.artifact_location}/models") for run in pages]
    return found


def _stored(run: Any, models_folder: str) -> StoredRun:
    tags = run.data.tags
    outputs = run.outputs.model_outputs if run.outputs else []
    models = tuple(dict.fromkeys(output.model_id for output in outputs))
    is_unfinished = tags["role"] == "trial" and tags.get("outcome", "interrupted") == "interrupted"
    return StoredRun(
        run_id=run.info.run_id,
        role=tags["role"],
        study=tags.get("comparison") or tags.get("study", ""),
        study_id=tags.get("study_id") or tags.get("comparison_id", ""),
        is_deleted=run.info.lifecycle_stage != "active",
        models=models,
        folders=(run.info.artifact_uri, *(f"{models_folder}/{each}" for each in models)),
        unfinished=dict(run.data.params) if is_unfinished else None,
    )


def read_versions(client: MlflowClient) -> list[StoredVersion]:
    """Return the versions of all registered models."""
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in _pages(client.search_registered_models):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, str(version)), []).append(alias)
    return [
        StoredVersion(
            model=each.name,
            version=str(each.version),
            run_id=each.run_id or "",
            aliases=tuple(sorted(aliases.get((each.name, str(each.version)), ()))),
        )
        for each in _pages(client.search_model_versions)
    ]


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**options, page_token=token)
        yield from page
        if not (token := page.token):
            return


def size_of(runs: Iterable[StoredRun]) -> int | None:
    """Return the size of the runs' artifacts in bytes; None if they are on a server."""
    folders = [local_path(folder) for run in runs for folder in run.folders]
    if None in folders:
        return None
    return sum(file_size(folder) for folder in folders if folder is not None)


def check_places(runs: Iterable[StoredRun]) -> None:
    """Raise ValueError if files of a run are not where MLflow puts them: they may be others'.

    An address in the database may name any folder, and it would be deleted as a whole.
    """
    for run in runs:
        own, *_ = run.folders
        odd_models = [each for each in run.models if not re.fullmatch(r"m-[0-9a-f]{32}", each)]
        if run.run_id not in own.split("/") or odd_models:
            where = odd_models[0] if odd_models else without_passwords(own)
            raise ValueError(
                f"nothing was removed: run {run.run_id} has its files at {where!r}, not in a "
                "folder of its own; delete this run in MLflow's pages"
            )


def delete_runs(client: MlflowClient, runs: Sequence[StoredRun]) -> bool:
    """Delete runs with their models and files; return whether they are gone from the disk.

    A tracking server only marks runs as deleted. Whoever runs it frees the disk, by `mlflow gc`.
    """
    store = _own_store()
    for run in runs:
        for model in run.models:
            none_if_missing(partial(client.delete_logged_model, model))
        if not run.is_deleted:
            none_if_missing(partial(client.delete_run, run.run_id))
        if store is not None:
            _erase(store, run)
    return store is not None


def delete_views(client: MlflowClient, runs: Iterable[StoredRun]) -> None:
    """Delete the views of the studies whose own runs these are, with the links to them."""
    roles = ("sweep", "comparison")
    tags = {view_tag(run.study_id) for run in runs if run.role in roles and run.study_id}
    for experiment in _pages(client.search_experiments, max_results=_PAGE):
        note = experiment.tags.get("mlflow.note.content", "")
        for tag in tags & set(experiment.tags):
            client.delete_experiment_tag(experiment.experiment_id, tag)
            if f"viewStateShareKey={tag.removeprefix(PREFIX)})" in note:
                text = experiment_note(None, experiment.experiment_id, note)
                client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", text)


def _own_store() -> SqlAlchemyStore | None:
    """Return MLflow's store if it is a database, None if it is a server."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking import _get_store

    store = _get_store()  # type: ignore[no-untyped-call]
    return store if isinstance(store, SqlAlchemyStore) else None


def _erase(store: SqlAlchemyStore, run: StoredRun) -> None:
    """Delete what `mlflow gc` deletes of a run: its files first, so that nothing loses them.

    That command would also delete all that others have marked as deleted.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for folder in run.folders:
        get_artifact_repository(folder).delete_artifacts()  # type: ignore[no-untyped-call]
    for model in run.models:
        none_if_missing(partial(store._hard_delete_logged_model, model))
    none_if_missing(partial(store._hard_delete_run, run.run_id))


def local_path(address: str) -> Path | None:
    """Return the folder of an artifact address; None if it is not on this machine."""
    parsed = urlparse(address)
    if parsed.scheme not in ("", "file"):
        return None
    return Path(unquote(parsed.path) if parsed.scheme else address)


def file_size(file: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes; 0 if there is none."""
    if not file.is_dir() or file.is_symlink():
        return file.lstat().st_size if file.exists() else 0
    total = 0
    for parent, _, names in os.walk(file):
        for name in names:
            with suppress(OSError):  # it is gone by now
                total += (Path(parent) / name).lstat().st_size
    return total
