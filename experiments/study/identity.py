"""What a study is of: all that its values depend on, and which of it may change within a study.

Network, losses, optimizer, schedule and split are known by what they do, not by their source: a
digest of what the network calls of PyTorch, one of what a few steps of training come to, and one of
which images are where. Another comment, name or file changes none; another padding, margin,
momentum or share does. A study goes on only with the same. Its commit, the other code in `cnn`,
versions and arithmetic may change: then it is said.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cnn
from cnn.data import Dataset
from cnn.losses import get_loss
from cnn.networks import build_cnn, network_digest
from cnn.optimizers import OPTIMIZERS, SCHEDULES
from cnn.training import epoch_order

PACKAGES = ("cnn", "experiments", "tracking")
REPOSITORY = Path(__file__).parents[2]

_GIT_SECONDS = 5
_FILES_SHOWN = 5
_SHOWN = {"source": "code in cnn"}
_DIGITS = 8
"""Of values that are compared across machines: float64 has twice as many."""


def made_with(
    data: Dataset, *, losses: Sequence[str], optimizer: str, schedule: str
) -> dict[str, Any]:
    """Return what has to stay the same within a study, beside its settings and data."""
    return {
        "network": digest_of_cnn(len(data.classes)),
        "split": split_digest(data),
        "training": {loss: training_digest(loss, optimizer, schedule) for loss in losses},
    }


@lru_cache
def digest_of_cnn(num_classes: int) -> str:
    """Return the digest of the network that is trained: see `cnn.networks.network_digest`."""
    return network_digest(build_cnn(num_classes, seed=0))


def split_digest(data: Dataset) -> str:
    """Return 32 hex digits of which images are in which split, and in which order they come."""
    digest = hashlib.sha256()
    for split in (data.train, data.validation):  # nothing of the test split is looked at
        digest.update(split.rows.numpy().astype("<i8").tobytes())
    digest.update(epoch_order(100, seed=1, epoch=2).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]


@lru_cache
def training_digest(loss: str, optimizer: str, schedule: str) -> str:
    """Return 32 hex digits of what loss, optimizer and schedule make of a few weights.

    Four steps of a linear model of made numbers, in float64 and rounded, so that processors and
    versions of PyTorch agree.
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
    """Return the name of a study that follows from what it is of."""
    canonical = json.dumps({key: each[key] for each in identities for key in each}, sort_keys=True)
    return f"{prefix}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def check_same(
    what: str,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
    made: tuple[Mapping[str, Any] | None, Mapping[str, Any]],
) -> None:
    """Raise ValueError if what is there already is of something else.

    Args:
        what: is there.
        settings: those that it was made with, and those asked for.
        made: likewise what `made_with` returns; None, where it is older than that.
    """
    before, now = settings
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        changes = "; ".join(f"{key} {before.get(key)} → {now[key]}" for key in different)
        raise ValueError(f"{what} was made with other settings ({changes}): choose another --study")
    made_before, made_now = made
    changed = [] if made_before is None else _changed(made_before, made_now)
    if changed:
        raise ValueError(
            f"{what} was made with another {' and another '.join(changed)} than this code has: "
            "choose another --study, or go back to the code that it was made with"
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = []
    if before["network"] != now["network"]:
        changed.append(f"network ({before['network'][:8]} → {now['network'][:8]})")
    if before["split"] != now["split"]:
        changed.append("split of the data, or order of its images")
    known = before["training"]
    losses = [loss for loss, digest in now["training"].items() if known.get(loss, digest) != digest]
    if losses:
        changed.append(f"training of {', '.join(losses)} (loss, optimizer or schedule)")
    return changed


# What may change, and is recorded


@lru_cache
def code_state() -> dict[str, str]:
    """Return the commit of this code, and which of its files have changes that are in none."""
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


@cache
def source_digest() -> str:
    """Return 32 hex digits of the code in `cnn`, comments and docstrings left out.

    It tells of what neither digest above sees: initial weights, the loop of training, the order of
    the images. A commit does not, where there is none, or the files had changes already.
    """
    digest = hashlib.sha256()
    for folder in cnn.__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n{_statements(file)}\n".encode())
    return digest.hexdigest()[:32]


def _statements(file: Path) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    # Unparsed: a tree's dump changes from one version of Python to the next.
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    """Return whether a statement is but a text: a docstring."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _git(*command: str) -> str | None:
    # No program that a repository's settings name, and no other repository than that of this file.
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
        return None  # no git, or no repository: an archive that was unpacked, say


def environment(precision: str, device: str) -> dict[str, str]:
    """Return what a study notes of the process that begins it, or goes on with it."""
    return {
        **code_state(),
        "source": source_digest(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "precision": precision,
        "device": device.partition(":")[0],
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in what two of them differ, in a line; nothing, if they don't."""
    changes = [
        f"{_SHOWN.get(key, key)} {_short(key, before[key])} → {_short(key, now[key])}"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]
    return ", ".join(changes)


def _short(key: str, value: str) -> str:
    return value[:8] if key in ("commit", "source") else value
