"""Checkpoints: a training that was interrupted resumes from its checkpoint.

A checkpoint names its training and its code, and has a digest of its bytes. Reading it runs no code
from it. If it does not fit, the training starts again.
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
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

from cnn.source import source_digest

if TYPE_CHECKING:
    from cnn.config import TrainConfig
    from cnn.stepper import Checkpoint

FOLDER = "checkpoints"  # in the data folder
DRAFT = ".draft"  # the suffix of a checkpoint while it is written
MAX_BYTES = 2 * 2**30  # larger files are not read as checkpoints

_MARK = b"checkpoint 1"
_OURS = re.compile(r"collections OrderedDict|torch._utils _rebuild_tensor_v2|torch \w+Storage")
"""The names in our pickles. PyTorch's `weights_only` allows others, of any size."""


class CheckpointError(ValueError):
    """The reason why a checkpoint can't be used, in one line."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The files of checkpoints of trainings on a data set.

    The name of each is a digest of all that the training depends on. So the same training resumes
    from it, and gives the same result.
    """

    digest: str  # of the data set
    data_dir: Path

    def file(self, config: TrainConfig) -> Path:
        """Return the file of a training's checkpoint."""
        return self.data_dir / FOLDER / f"{key_of(self.digest, config)}.pt"

    def read(self, config: TrainConfig) -> bytes | None:
        """Return a training's checkpoint: None if there is none, empty if it can't be read."""
        # The file may be a link, or a pipe that would block.
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
        """Write a training's checkpoint, completely or not at all.

        Raises:
            OSError: it can't be written.
        """
        file = self.file(config)
        # The name is random, so that nobody can put a link in its place.
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
        """Remove the checkpoint of a training that ended, and its drafts."""
        file = self.file(config)
        for each in (file, *file.parent.glob(f"{file.stem}*{DRAFT}")):
            with suppress(OSError):  # a file that stays does no harm
                each.unlink()


def key_of(digest: str, config: TrainConfig) -> str:
    """Return the key of a training on the data set with this digest."""
    depends_on = [digest, version("torch"), config.as_params(), config.code_digests()]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def pack(past: list[dict[str, float]], checkpoint: Checkpoint, key: str) -> bytes:
    """Return a checkpoint as bytes, with the metrics of its past epochs and its training's key."""
    import torch

    archive = io.BytesIO()
    torch.save({"past": past, **vars(checkpoint)}, archive)
    content, about = archive.getvalue(), _about(key)
    return b"".join([about, b" ", _digest(about, content), b"\n", content])


def unpack(
    content: bytes, key: str, config: TrainConfig, *, num_classes: int, image_size: int
) -> tuple[list[dict[str, float]], Checkpoint]:
    """Return the metrics of the epochs in a checkpoint, and the checkpoint.

    Old checkpoints have no header. They are checked by the checksums of their ZIP archive.

    Raises:
        CheckpointError: it is damaged, or belongs to another training.
    """
    from cnn.stepper import Checkpoint

    if content.startswith(_MARK):
        header, _, content = content.partition(b"\n")
        about, _, digest = header.rpartition(b" ")
        if about != _about(key):
            raise CheckpointError("it is of another training, or of other code")
        if digest != _digest(about, content):
            raise CheckpointError("its digest does not fit")
    try:
        parts = _load(content)
        _check_fit(parts, config, num_classes, image_size)
    except CheckpointError:
        raise
    except Exception as error:  # PyTorch and the ZIP reader may raise anything
        raise CheckpointError(f"{type(error).__name__} as it was read") from error
    past = parts.pop("past")
    return past, Checkpoint(**parts)


def _about(key: str) -> bytes:
    return b" ".join([_MARK, key.encode(), source_digest().encode()])


def _digest(about: bytes, content: bytes) -> bytes:
    digest = hashlib.sha256(about)
    digest.update(content)
    return digest.hexdigest().encode()


def _load(content: bytes) -> dict[str, Any]:
    """Return the content of an archive of `torch.save`. Loading it takes no more than its size."""
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


def _check_fit(
    parts: dict[str, Any], config: TrainConfig, num_classes: int, image_size: int
) -> None:
    from cnn.networks import build_network
    from cnn.optimizers import OPTIMIZERS

    network = build_network(num_classes, seed=0, name=config.network, image_size=image_size)
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
