"""Fetch the two files of a stored model, MLmodel and the graph, and check their digests.

No other file of its folder is read or copied. `import tracking.models.fetching` is quick: functions
import MLflow when called.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tracking.errors import one_line, refusal, without_passwords
from tracking.models.description import MAX_BYTES
from tracking.models.safety import MAX_ARCHIVE
from tracking.store import environment, reading

if TYPE_CHECKING:
    import mlflow

    from tracking.retries import RetryingClient

    Client = mlflow.MlflowClient | RetryingClient

DESCRIPTION, GRAPH = "MLmodel", "data/model.pt2"
_PICKLE = "data/model.pth"
_BOUNDS = {DESCRIPTION: MAX_BYTES, GRAPH: MAX_ARCHIVE}

DIGEST_TAG = "sha256/"
"""Prefix of the tags with the SHA-256 of a file, on a model in MLflow and on its versions."""

_ARTIFACTS = "/mlflow-artifacts/artifacts"
_SHOWN = 120  # characters of a URI
_FETCHING = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The files of a stored model."""

    description: bytes
    graph: bytes

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file, as tags."""
        files = {DESCRIPTION: self.description, GRAPH: self.graph}
        return {f"{DIGEST_TAG}{name}": sha256(files[name]).hexdigest() for name in files}


def digest_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that are digests of a model's files."""
    return {key: value for key, value in tags.items() if key.startswith(DIGEST_TAG)}


def read_folder(folder: Path) -> Stored:
    """Return the files of a model in a folder on this machine.

    Raises ValueError if one is missing, too large, or a link out of the folder.
    """
    for name in _BOUNDS:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"its {name} is a link that leads out of its folder")
    _check_names({name for name in (*_BOUNDS, _PICKLE) if _is_file(folder / name)})
    return Stored(description=_read(folder, DESCRIPTION), graph=_read(folder, GRAPH))


def fetch(uri: str) -> Stored:
    """Return the files of the model that a URI or a path names.

    Raises ValueError if there is none, or its files are too large or changed since the recording.
    """
    folder = Path(uri.removeprefix("file://"))
    if _is_file(folder / DESCRIPTION):
        return _fetched(str(folder), {}, uri)
    if ":/" not in uri:
        raise ValueError(
            f"there is no model {shown_uri(uri)!r}: give a URI, or a folder with a file MLmodel"
        )
    with reading() as client:
        return _fetched(*_located(client, uri), uri)


def check_stored(client: Client, uri: str) -> None:
    """Raise ValueError if the files of a model differ from their recorded digests, if any."""
    location, digests = _located(client, uri)
    if digests:
        _fetched(location, digests, uri)


def shown_uri(uri: str) -> str:
    """Return a URI for a message: without passwords, and with 120 characters at most."""
    uri = without_passwords(uri)
    return uri if len(uri) <= _SHOWN else f"{uri[:_SHOWN]} …"


def _located(client: Client, uri: str) -> tuple[str, dict[str, str]]:
    """Return where the files of a model are, and the digests that MLflow has of them."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if uri.startswith("models:/"):
        match get_model_name_and_version(client, uri):  # type: ignore[no-untyped-call]
            case (model_id,):
                return _of_logged(client, model_id)
            case name, number:
                version = client.get_model_version(name, number)
                location = client.get_model_version_download_uri(name, number)
                digests = digest_tags(version.tags)
                source = version.source or ""
                if not digests and source.startswith("models:/"):  # registered by hand
                    return _located(client, source)
                return location, digests
    if uri.startswith("runs:/"):
        run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
        run = client.get_run(run_id)
        for output in reversed(run.outputs.model_outputs if run.outputs else []):
            if client.get_logged_model(output.model_id).name == path:
                return _of_logged(client, output.model_id)
        return f"{run.info.artifact_uri}/{path}", {}  # MLflow 2 stores models there
    return uri, {}


def _of_logged(client: Client, model_id: str) -> tuple[str, dict[str, str]]:
    model = client.get_logged_model(model_id)
    return model.artifact_location, digest_tags(model.tags)


def _fetched(location: str, digests: Mapping[str, str], uri: str) -> Stored:
    """Return the files at a location, and check their digests; the URI is for messages."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import get_local_path_or_none

    try:
        # In place: a copy takes time, and MLflow's own way without a copy writes into the folder.
        folder = get_local_path_or_none(location)  # type: ignore[no-untyped-call]
        stored = read_folder(Path(folder)) if folder is not None else _downloaded(location)
        _check_digests(stored, digests)
    except ValueError as error:
        line = f"{shown_uri(uri)} can't be used as a model: {one_line(error)}"
        raise ValueError(line) from error
    except MlflowException:
        raise
    except Exception as error:  # each artifact store has errors of its own
        line = f"can't fetch the model {shown_uri(uri)}: {one_line(error)}"
        raise refusal(line, error) from error
    return stored


def _downloaded(location: str) -> Stored:
    """Return the files at a remote location. Names that the server lists are not trusted."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if location.startswith(("http:", "https:")) and _ARTIFACTS not in location:
        raise ValueError(f"its address is not MLflow's, which has {_ARTIFACTS} in it")
    repository = get_artifact_repository(location)
    listed = {
        f"{folder}{PurePosixPath(file.path).name}": file.file_size or 0
        for folder, path in {"": None, "data/": "data"}.items()
        for file in repository.list_artifacts(path)
        if not file.is_dir
    }
    _check_names(listed)
    for name in _BOUNDS:
        _check_size(name, listed[name])
    with environment(_FETCHING), TemporaryDirectory() as scratch:
        Path(scratch, GRAPH).parent.mkdir()
        for name in _BOUNDS:
            repository._download_file(name, str(Path(scratch, name)))  # type: ignore[no-untyped-call]
        return read_folder(Path(scratch))


def _check_names(names: Collection[str]) -> None:
    if DESCRIPTION not in names:
        raise ValueError(f"it has no file {DESCRIPTION}")
    # For a model.pth, MLflow imports a module that a file beside it names, before it refuses.
    if GRAPH not in names or _PICKLE in names:
        raise ValueError(
            "it is not stored as a graph (pt2), and pickle, which can run any code, is refused"
        )


def _check_size(name: str, size: int) -> None:
    if size > _BOUNDS[name]:
        raise ValueError(
            f"its {name} has {size:,} bytes, more than the {_BOUNDS[name]:,} that are loaded"
        )


def _check_digests(stored: Stored, recorded: Mapping[str, str]) -> None:
    found = stored.digests()
    for tag in found.keys() & recorded.keys():
        if found[tag] != recorded[tag]:
            raise ValueError(
                f"its {tag.removeprefix(DIGEST_TAG)} was changed since it was recorded: its "
                f"SHA-256 is {found[tag][:12]}…, not {recorded[tag][:12]}…"
            )


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 -- Path.is_file raises for a name that is too long


def _read(folder: Path, name: str) -> bytes:
    with (folder / name).open("rb") as stream:
        _check_size(name, os.fstat(stream.fileno()).st_size)
        return stream.read(_BOUNDS[name])
