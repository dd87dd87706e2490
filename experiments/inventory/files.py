"""Checkpoints and decoded images in a data folder, and which of them nothing refers to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnn.cache import look_up, read_meta
from cnn.config import TrainConfig
from experiments.engine.checkpoints import DRAFT, FOLDER, Checkpoints
from experiments.inventory.runs import StoredRun, file_size

_DRAFT_SECONDS = 24 * 3600
"""An older draft is that of a process that was killed."""


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """The decoded images of a data set, at one size."""

    folder: Path
    name: str
    """Of the data set; empty if the entry is damaged or half written."""
    about: str
    size: int
    is_used: bool
    """Whether a start finds it: the index names it, for some state of some source."""


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoints:
    """The checkpoint files of a data folder."""

    used: Mapping[Path, str]
    """Those of unfinished trials, each with its study's id."""
    unused: Sequence[Path]
    """Those that no unfinished trial resumes from."""
    is_certain: bool
    """Whether the files of all unfinished trials are known."""


def checkpoint_files(data_dir: Path) -> list[Path]:
    """Return the checkpoints of a data folder, drafts as well."""
    folder = data_dir / FOLDER
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.suffix in (".pt", DRAFT)]


def match_checkpoints(
    files: Sequence[Path], runs: Iterable[StoredRun], data_dir: Path
) -> StoredCheckpoints:
    """Return which files the unfinished trials among the runs resume from.

    The files have to be listed before the runs: a trial that starts in between has none of them.
    """
    owners: dict[str, str] = {}
    is_certain = True
    for run in runs:
        if (params := run.unfinished) is None or run.is_deleted:
            continue
        if any(":" in params.get(name, "") for name in ("loss", "network")):
            is_certain = False  # the file's name depends on code of the user, which we don't run
            continue
        try:
            checkpoints = Checkpoints(digest=params["dataset_digest"], data_dir=data_dir)
            owners[checkpoints.file(TrainConfig.from_params(params)).stem] = run.study_id
        except (KeyError, ValueError):  # it has just begun, and has no params yet
            is_certain = False
    keys = {file: file.name.partition(".")[0] for file in files}
    return StoredCheckpoints(
        used={file: owners[key] for file, key in keys.items() if key in owners},
        unused=[file for file, key in keys.items() if key not in owners],
        is_certain=is_certain,
    )


def read_cache(data_dir: Path) -> list[CacheEntry]:
    """Return the decoded images in a data folder, those in use first."""
    cache = data_dir / "cache"
    if not cache.is_dir():
        return []
    used = {look_up(cache, file.stem) for file in (cache / "index").glob("*.json")}
    entries = [
        _entry(folder, is_used=folder.name in used)
        for folder in sorted(cache.iterdir())
        if folder.is_dir() and folder.name != "index" and not _is_being_written(folder)
    ]
    return sorted(entries, key=lambda entry: (not entry.is_used, entry.name))


def _is_being_written(folder: Path) -> bool:
    is_draft = folder.name.startswith(".writing-")
    return is_draft and time.time() - folder.stat().st_mtime < _DRAFT_SECONDS


def _entry(folder: Path, *, is_used: bool) -> CacheEntry:
    name, about = "", "damaged or half written"
    try:
        meta = read_meta(folder)
        name = str(meta["name"])
        size = f", {meta['image_size']} pixels" if "image_size" in meta else ""
        about = f"{meta['images']:,} images{size}, from {meta['source']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return CacheEntry(
        folder=folder, name=name, about=about, size=file_size(folder), is_used=is_used
    )
