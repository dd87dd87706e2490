"""What a study's values depend on, and which of it may change within a study.

Digests describe the behaviour of network, losses, optimizer, schedule and split: the PyTorch calls
of the network, the results of some training steps, and the images of each split. Comments, names
and files do not matter; a padding, a margin, a momentum or a share does. A study resumes only with
the same digests. Commit, other code in `cnn`, versions and arithmetic may change, with a note.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cnn.data import Dataset
from cnn.losses import get_loss
from cnn.network_digest import network_digest
from cnn.networks import build_network
from cnn.optimizers import OPTIMIZERS, SCHEDULES
from cnn.source import source_digest
from cnn.training import epoch_order
from experiments.study.space import Space

PACKAGES = ("cnn", "experiments", "tracking")
REPOSITORY = Path(__file__).parents[2]

_GIT_SECONDS = 5
_FILES_SHOWN = 5
_SHOWN = {"source": "code in cnn"}
_DIGESTS = {"commit", "source", "network digest", "training digest"}
_DIGITS = 8  # digits of values that are compared across machines: float64 has twice as many


def made_with(data: Dataset, space: Space) -> dict[str, Any]:
    """Return the digests that stay the same within a study, besides its settings and data.

    Of several networks, optimizers or schedules, each has its digest under its name.
    """
    networks = {name: digest_of_network(name, data) for name in space.values("network")}
    ways = list(product(space.values("optimizer"), space.values("schedule")))
    training = {
        " ".join([loss, *(way if len(ways) > 1 else ())]): training_digest(loss, *way)
        for loss in space.values("loss")
        for way in ways
    }
    return {
        "network": networks if len(networks) > 1 else next(iter(networks.values())),
        "split": split_digest(data),
        "training": training,
    }


def digest_of_network(name: str, data: Dataset) -> str:
    """Return the digest of a trained network: see `cnn.network_digest`."""
    return _digest_of_network(name, len(data.classes), data.image_size)


@lru_cache
def _digest_of_network(name: str, num_classes: int, image_size: int) -> str:
    network = build_network(num_classes, seed=0, name=name, image_size=image_size)
    return network_digest(network, image_shape=(image_size, image_size, 3))


def split_digest(data: Dataset) -> str:
    """Return 32 hex digits of the images in each split, and of their order in an epoch."""
    digest = hashlib.sha256()
    for split in (data.train, data.validation):  # the test split stays unread
        digest.update(split.rows.numpy().astype("<i8").tobytes())
    digest.update(epoch_order(100, seed=1, epoch=2).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]


@lru_cache
def training_digest(loss: str, optimizer: str, schedule: str) -> str:
    """Return 32 hex digits of four training steps with a loss, an optimizer and a schedule.

    The model is linear and the data is made. Values are float64 and rounded, so that processors
    and versions of PyTorch agree.
    """
    images = torch.linspace(-1, 1, 24, dtype=torch.float64).sin().reshape(6, 4)
    labels = torch.arange(6) % 3
    weights = torch.linspace(-2, 2, 12, dtype=torch.float64).cos()
    update, shapes = OPTIMIZERS[optimizer]
    state = {
        # PyTorch counts an optimizer's steps in float32.
        name: torch.zeros_like(weights) if shape == "weights" else torch.zeros(())
        for name, shape in shapes.items()
    }
    values: list[float] = []
    for step in range(4):
        current = weights.detach().clone().requires_grad_()
        value = get_loss(loss)(images @ current.reshape(4, 3), labels)
        (weights.grad,) = torch.autograd.grad(value, current)
        with torch.no_grad():
            update(
                weights,
                state,
                learning_rate=0.5 * SCHEDULES[schedule]((step + 0.5) / 4),
                momentum=0.9,
                weight_decay=0.01,
            )
        values += [value.item(), *weights.tolist()]
    text = " ".join(f"{each:.{_DIGITS - 1}e}" for each in values)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def name_of(prefix: str, *identities: Mapping[str, Any]) -> str:
    """Return the name of a study, which is a digest of these mappings after a prefix."""
    canonical = json.dumps({key: each[key] for each in identities for key in each}, sort_keys=True)
    return f"{prefix}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def check_same(
    what: str,
    *,
    settings_before: Mapping[str, Any],
    settings: Mapping[str, Any],
    made_before: Mapping[str, Any] | None,
    made: Mapping[str, Any],
) -> None:
    """Raise ValueError unless a study or comparison has the settings and digests of now.

    `made_before` is None for one that is older than `made_with`.
    """
    keys = dict.fromkeys([*settings, *settings_before])
    different = [key for key in keys if settings_before.get(key) != settings.get(key)]
    if different:
        changes = "; ".join(
            f"{key} {settings_before.get(key)} → {settings.get(key)}" for key in different
        )
        raise ValueError(f"{what} was made with other settings ({changes}): choose another --study")
    changed = [] if made_before is None else _changed(made_before, made)
    if changed:
        raise ValueError(
            f"{what} was made with another {' and another '.join(changed)} than this code has: "
            "choose another --study, or use the code that it was made with"
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = []
    if before["network"] != now["network"]:
        changed.append(f"network ({_shown(before['network'])} → {_shown(now['network'])})")
    if before["split"] != now["split"]:
        changed.append("split of the data, or order of its images")
    known = before["training"]
    losses = [loss for loss, digest in now["training"].items() if known.get(loss, digest) != digest]
    if losses:
        changed.append(f"training of {', '.join(losses)} (loss, optimizer or schedule)")
    return changed


def _shown(digests: str | Mapping[str, str]) -> str:
    if isinstance(digests, str):
        return digests[:8]
    return ", ".join(f"{name} {digest[:8]}" for name, digest in digests.items())


# What may change, and is recorded


@lru_cache
def code_state() -> dict[str, str]:
    """Return the commit of this code, and the files with uncommitted changes."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": "unknown", "uncommitted": "unknown"}
    status = _git("status", "--porcelain", "--", *PACKAGES) or ""
    files = sorted(line[3:] for line in status.splitlines())
    more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
    return {
        "commit": commit.strip(),
        "uncommitted": (", ".join(files[:_FILES_SHOWN]) + more) or "none",
    }


def _git(*command: str) -> str | None:
    # Runs no program from a repository's configuration, and reads only the repository of this file.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    options = ["-c", "core.fsmonitor=false", "-c", "core.quotePath=false"]
    try:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *options, *command],  # noqa: S607
            capture_output=True,
            check=True,
            env=variables,
            text=True,
            timeout=_GIT_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None  # no git or no repository, as in an unpacked archive


def provenance(precision: str, device: str) -> dict[str, str]:
    """Return the code, versions and arithmetic of this process, to be recorded."""
    return {
        **code_state(),
        "source": source_digest(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "precision": precision,
        "device": device.partition(":")[0],
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the differences of two provenances in a line, empty if there are none."""
    return ", ".join(list_differences(before, now))


def list_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return each difference of two provenances; what was not recorded is none."""
    return [
        f"{_SHOWN.get(key, key)} {_short(key, before[key])} → {_short(key, now[key])}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]


def _short(key: str, value: str) -> str:
    return value[:8] if key in _DIGESTS else value
