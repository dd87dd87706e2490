"""What to remove: chosen by name, without what others still need."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.inventory.files import (
    CacheEntry,
    StoredCheckpoints,
    checkpoint_files,
    match_checkpoints,
    read_cache,
)
from experiments.inventory.runs import (
    StoredRun,
    StoredVersion,
    check_places,
    delete_runs,
    delete_views,
    read_runs,
    read_versions,
)
from experiments.inventory.studies import (
    StoredStudy,
    delete_studies,
    kept_from_running,
    read_studies,
)
from experiments.study.storage import storage_errors
from experiments.study.trial_cache import TrialCache
from tracking.errors import one_line, refusal
from tracking.text import listed
from tracking.wording import counted

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODELS = "models:/"


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All that is stored."""

    studies: Sequence[StoredStudy]
    runs: Sequence[StoredRun]
    versions: Sequence[StoredVersion]
    checkpoints: StoredCheckpoints
    cache: Sequence[CacheEntry]

    def runs_of(self, study: StoredStudy) -> list[StoredRun]:
        """Return the runs that a study made; those that it links are others'."""
        return [run for run in self.runs if run.study_id in study.ids]

    def of_other_storages(self) -> dict[str, list[StoredRun]]:
        """Return the runs whose studies are not in this storage, by the study's name."""
        known = {id_ for study in self.studies for id_ in study.ids}
        found: dict[str, list[StoredRun]] = {}
        for run in self.runs:
            if run.study and run.study_id not in known:
                found.setdefault(run.study, []).append(run)
        return found


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is to be removed."""

    studies: Sequence[StoredStudy]
    elsewhere: Sequence[str]
    """The names of studies that are not in this storage: only their runs are removed."""
    runs: Sequence[StoredRun]
    versions: Sequence[StoredVersion]
    files: Sequence[Path]
    """Checkpoints, and folders of decoded images."""
    kept: Sequence[str]
    """What stays although it belongs to something named, with the reason: a line each."""

    def __bool__(self) -> bool:
        return bool(self.studies or self.runs or self.versions or self.files)


def read_inventory(
    client: MlflowClient, storage: TrialCache | None, url: str, data_dir: Path
) -> Inventory:
    """Return all that is stored; without a storage (it has the address), there are no studies."""
    files = checkpoint_files(data_dir)  # before the runs: see there
    runs = read_runs(client)
    with storage_errors(url):
        studies = read_studies(storage) if storage is not None else []
    return Inventory(
        studies=studies,
        runs=runs,
        versions=read_versions(client),
        checkpoints=match_checkpoints(files, runs, data_dir),
        cache=read_cache(data_dir),
    )


def choose(
    inventory: Inventory, names: Sequence[str], cache: Sequence[str], *, unused: bool
) -> Removal:
    """Return what these names mean.

    Args:
        inventory: all that is stored.
        names: of studies and comparisons, or models:/NAME and models:/NAME/VERSION.
        cache: names of data sets, whose decoded images are removed.
        unused: whether to remove the checkpoints and decoded images that nothing refers to, and the
            runs that were deleted in MLflow.

    Raises:
        ValueError: there is nothing of one of these names.
    """
    studies = {study.name: study for study in inventory.studies}
    elsewhere = inventory.of_other_storages()
    models = {each.model for each in inventory.versions}
    own: list[StoredStudy] = []
    of_others: list[str] = []
    runs: list[StoredRun] = []
    versions: list[StoredVersion] = []
    for name in dict.fromkeys(names):
        if name.startswith(MODELS):
            versions += _versions(inventory.versions, name)
        elif name in studies:
            own.append(studies[name])
            runs += inventory.runs_of(studies[name])
        elif name in elsewhere:
            of_others.append(name)
            runs += elsewhere[name]
        else:
            known = [*studies, *elsewhere, *(MODELS + model for model in sorted(models))]
            raise ValueError(f"there is nothing named {name!r} here{_hint(name, known)}")
    if unused:
        runs += [run for run in inventory.runs if run.is_deleted]
    runs = list({run.run_id: run for run in runs}.values())
    runs, kept = _without_needed(inventory, own, runs, versions)
    return Removal(
        studies=own,
        elsewhere=of_others,
        runs=runs,
        versions=versions,
        files=_files(inventory, own, cache, unused=unused),
        kept=kept,
    )


def _versions(versions: Sequence[StoredVersion], name: str) -> list[StoredVersion]:
    model, _, version = name.removeprefix(MODELS).partition("/")
    found = [each for each in versions if each.model == model and version in ("", each.version)]
    if not found:
        known = [f"{MODELS}{each.model}/{each.version}" for each in versions]
        raise ValueError(f"there is no registered model {name!r}{_hint(name, known)}")
    return found


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2)
    if close:
        return f" (did you mean {' or '.join(close)}?)"
    return f", only {listed(known)}" if known else ""


def _without_needed(
    inventory: Inventory,
    studies: Sequence[StoredStudy],
    runs: Sequence[StoredRun],
    versions: Sequence[StoredVersion],
) -> tuple[list[StoredRun], list[str]]:
    """Return the runs that nothing else needs, and a line for each reason to keep the others."""
    wanted, kept = {run.run_id for run in runs}, []
    needed: set[str] = set()
    for study in inventory.studies:
        if study in studies:
            continue
        linked = (wanted & study.run_ids) - {run.run_id for run in inventory.runs_of(study)}
        if linked:
            kept.append(f"{counted(len(linked), 'run')}, which study {study.name!r} links to")
        needed |= linked
    for each in inventory.versions:
        if each.run_id in wanted and each not in versions:
            name = f"{MODELS}{each.model}/{each.version}"
            kept.append(f"the run of {each}: name {name} to remove it as well")
            needed.add(each.run_id)
    return [run for run in runs if run.run_id not in needed], kept


def _files(
    inventory: Inventory, studies: Sequence[StoredStudy], cache: Sequence[str], *, unused: bool
) -> list[Path]:
    checkpoints = inventory.checkpoints
    ids = {id_ for study in studies for id_ in study.ids}
    files = [file for file, study_id in checkpoints.used.items() if study_id in ids]
    if unused and checkpoints.is_certain:
        files += checkpoints.unused
    names = {entry.name for entry in inventory.cache if entry.name}
    for name in cache:
        if name not in names:
            raise ValueError(f"there are no decoded images of {name!r}{_hint(name, sorted(names))}")
    return files + [
        entry.folder
        for entry in inventory.cache
        if entry.name in cache or (unused and not entry.is_used)
    ]


def remove(removal: Removal, client: MlflowClient, storage: TrialCache | None, url: str) -> bool:
    """Remove it; return whether the runs are gone from the disk: see `delete_runs`.

    Runs go first and studies last. So if it is stopped in between, the same names are still there.

    Raises:
        ValueError: a study is being run, or files are in an odd place; then nothing is removed.
    """
    check_places(removal.runs)
    with ExitStack() as stack:
        if storage is not None:
            with storage_errors(url):
                for study in removal.studies:
                    stack.enter_context(kept_from_running(study, url, storage))
        for version in removal.versions:
            client.delete_model_version(version.model, version.version)
        _delete_empty_models(client, {each.model for each in removal.versions})
        is_erased = delete_runs(client, removal.runs)
        delete_views(client, removal.runs)
        _delete_files(removal.files)
        if storage is not None:
            with storage_errors(url):
                for study in removal.studies:
                    delete_studies(study, storage)
    return is_erased


def _delete_empty_models(client: MlflowClient, models: Iterable[str]) -> None:
    for model in models:
        if not any(each.model == model for each in read_versions(client)):
            client.delete_registered_model(model)


def _delete_files(files: Iterable[Path]) -> None:
    for file in files:
        try:
            if file.is_dir() and not file.is_symlink():
                # A cache's folder disappears at once: a start never finds a part of it.
                aside = file.with_name(f".removing-{file.name}")
                file.rename(aside)
                shutil.rmtree(aside)
            else:
                file.unlink(missing_ok=True)
        except OSError as error:
            line = f"can't remove {str(file)!r}: {error.strerror or one_line(error)}"
            raise refusal(line, error) from error
