"""Checkpoints: what a training that was cut off goes on from, once it is known to be whole.

A checkpoint says which training and which code it is of, and has a digest over all of its bytes. It
is read without running code of it. One that does not fit is none: the training begins again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

import cnn

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.training import Checkpoint

DRAFT = ".draft"
"""The suffix of a checkpoint that is being written."""
MAX_BYTES = 2 * 2**30
"""Of a file that is read as a checkpoint."""

_MARK = b"checkpoint 1"
_OURS = re.compile(r"collections OrderedDict|torch._utils _rebuild_tensor_v2|torch \w+Storage")
"""What a pickle of ours names. PyTorch's `weights_only` lets others through, of any size."""


class CheckpointError(ValueError):
    """A checkpoint can't be used; in one line."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where the checkpoints of trainings on a data set are kept.

    Each under a digest of all that the training depends on: whoever trains the same goes on from
    it, and ends with the same.
    """

    digest: str
    """Of the data set."""
    data_dir: Path

    def file(self, config: TrainConfig) -> Path:
        """Return where that of a training is."""
        return self.data_dir / "checkpoints" / f"{key_of(self.digest, config)}.pt"

    def read(self, config: TrainConfig) -> bytes | None:
        """Return that of a training, if there is one: empty, if it can't be read."""
        # What stands there may be a link or a pipe, which would not answer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(self.file(config), flags), "rb") as stream:
                status = os.fstat(stream.fileno())
                fits = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES
                return stream.read() if fits else b""
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return b""

    def write(self, config: TrainConfig, content: bytes) -> None:
        """Keep that of a training, whole or not at all.

        Raises:
            OSError: it can't be kept.
        """
        file = self.file(config)
        # A name that nobody can foresee, to put a link in its place.
        draft = file.with_name(f"{file.stem}.{secrets.token_hex(8)}{DRAFT}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb") as stream:
                stream.write(content)
            draft.replace(file)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise

    def remove(self, config: TrainConfig) -> None:
        """Remove that of a training that is over, and what was left of drafts of it."""
        file = self.file(config)
        for each in (file, *file.parent.glob(f"{file.stem}*{DRAFT}")):
            with suppress(OSError):  # what stays takes room, and does no harm
                each.unlink()


def key_of(digest: str, config: TrainConfig) -> str:
    """Return what a training on the data set of a digest is known by."""
    depends_on = [digest, version("torch"), config.as_params()]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """Return a digest of the code that trains: of another network, a checkpoint is none."""
    digest = hashlib.sha256()
    for folder in cnn.__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def pack(past: list[dict[str, float]], checkpoint: Checkpoint, key: str) -> bytes:
    """Return a checkpoint as it is kept.

    Args:
        past: the metrics of its epochs.
        checkpoint: what to go on from.
        key: that of the training.
    """
    import torch

    archive = io.BytesIO()
    torch.save({"past": past, **vars(checkpoint)}, archive)
    content, about = archive.getvalue(), _about(key)
    return b"".join([about, b" ", _digest(about, content), b"\n", content])


def unpack(
    content: bytes, key: str, config: TrainConfig, num_classes: int
) -> tuple[list[dict[str, float]], Checkpoint]:
    """Return the metrics of the epochs in a checkpoint, and it.

    Those made before they had a header, ZIP archives alone, are taken by their own checksums.

    Args:
        content: what `pack` returned once, or what has become of it.
        key: that of the training.
        config: the training.
        num_classes: of its data set.

    Raises:
        CheckpointError: it is damaged, or of another training.
    """
    from cnn.training import Checkpoint

    if content.startswith(_MARK):
        header, _, content = content.partition(b"\n")
        about, _, digest = header.rpartition(b" ")
        if about != _about(key):
            raise CheckpointError("it is of another training, or of other code")
        if digest != _digest(about, content):
            raise CheckpointError("its digest does not fit")
    try:
        parts = _load(content)
        _check_fit(parts, config, num_classes)
    except CheckpointError:
        raise
    except Exception as error:  # whatever it is that a file has PyTorch or a ZIP reader say
        raise CheckpointError(f"{type(error).__name__} as it was read") from error
    past = parts.pop("past")
    return past, Checkpoint(**parts)


def _about(key: str) -> bytes:
    return b" ".join([_MARK, key.encode(), _code().encode()])


def _digest(about: bytes, content: bytes) -> bytes:
    digest = hashlib.sha256(about)
    digest.update(content)
    return digest.hexdigest().encode()


def _load(content: bytes) -> dict[str, Any]:
    """Return what is in an archive of `torch.save`, if it takes no more than its size to load."""
    import torch

    with ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointError("two entries have the same name")
        if any(entry.compress_type != ZIP_STORED for entry in entries):
            raise CheckpointError("an entry is compressed")
        if archive.testzip() is not None:
            raise CheckpointError("a checksum does not fit")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_names(archive.read(entry))
    parts: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return parts


def _check_names(pickle: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickle):
        if "GLOBAL" in operation.name and not _OURS.fullmatch(str(argument)):
            raise CheckpointError(f"it has {argument}")


def _check_fit(parts: dict[str, Any], config: TrainConfig, num_classes: int) -> None:
    """Raise whatever it is if a checkpoint's parts are not those of a training."""
    from cnn.networks import build_cnn
    from cnn.optimizers import OPTIMIZERS

    network = build_cnn(num_classes, seed=0)
    network.load_state_dict(parts["model"])
    num_weights = sum(each.numel() for each in network.parameters())
    _, shapes = OPTIMIZERS[config.optimizer]
    for name, shape in shapes.items():
        if parts["optimizer"][name].numel() != (num_weights if shape == "weights" else 1):
            raise CheckpointError(f"the optimizer's {name} has another size")
    if not 1 <= parts["epoch"] == len(parts["past"]) <= config.epochs:
        raise CheckpointError("the number of epochs does not fit")
    metrics = [value for epoch in parts["past"] for value in epoch.values()]
    if not all(isinstance(value, (int, float)) for value in metrics):
        raise CheckpointError("a metric is no number")
