"""The configuration of a training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from cnn.augmentation import AUGMENTATIONS
from cnn.losses import LOSSES, get_loss
from cnn.networks import NETWORKS, TORCHVISION, get_factory
from cnn.optimizers import OPTIMIZERS, SCHEDULES, WARMUP
from cnn.references import digest_of, is_reference

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that determines a training, except the data set.

    Raises:
        ValueError: a field is out of its range; the message names field, value and range.
    """

    loss: str
    """A name of `cnn.losses.LOSSES`, or a reference as `cnn.losses.get_loss` takes it."""
    learning_rate: float
    """The highest of the schedule, > 0."""
    batch_size: int
    """Images per step, ≥ 1 and at most the size of the training split."""
    epochs: int = 8
    """Passes over the training split, ≥ 1."""
    seed: int = 0
    """Of initial weights, image order and dropout, in 0 .. 2³² − 1."""
    optimizer: str = "sgd"
    """A name of `OPTIMIZERS`. `sgd` has Nesterov momentum."""
    momentum: float = 0.9
    """Of `sgd`, in [0, 1)."""
    weight_decay: float = 0.0
    """As the optimizer defines it, ≥ 0."""
    schedule: str = "one_cycle"
    """How the learning rate changes: a name of `SCHEDULES`."""
    warmup: float | None = None
    """Share of the steps in which the learning rate rises, in [0, 1); None: as `WARMUP` says."""
    network: str = "cnn"
    """A name as `cnn.networks.get_factory` takes it."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, in [0, 1): see `cnn.losses.smoothed`."""
    augment: str = "none"
    """Random changes of the training images: a name of `AUGMENTATIONS`."""
    precision: str = "float32"
    """Of the network's arithmetic, a name of `PRECISIONS`. Weights are stored in float32."""
    device: str = "cpu"
    """Where to train: `cpu`, `cuda`, `cuda:1`, …"""

    def __post_init__(self) -> None:
        get_loss(self.loss)
        get_factory(self.network)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("augment", self.augment, AUGMENTATIONS)
        if self.warmup is None:
            object.__setattr__(self, "warmup", WARMUP[self.schedule])
        _check("learning_rate", self.learning_rate, "finite and > 0", lambda v: 0 < v < math.inf)
        _check("batch_size", self.batch_size, "an integer ≥ 1", _is_integer_from(1))
        _check("epochs", self.epochs, "an integer ≥ 1", _is_integer_from(1))
        _check("seed", self.seed, "an integer from 0 to 2**32 - 1", _is_integer_from(0, 2**32 - 1))
        _check("momentum", self.momentum, "≥ 0 and < 1", lambda v: 0 <= v < 1)
        _check("weight_decay", self.weight_decay, "finite and ≥ 0", lambda v: 0 <= v < math.inf)
        _check("warmup", self.warmup, "≥ 0 and < 1", lambda v: 0 <= v < 1)
        _check("label_smoothing", self.label_smoothing, "≥ 0 and < 1", lambda v: 0 <= v < 1)
        is_device = re.compile(r"cpu|cuda(:\d+)?").fullmatch
        _check("device", self.device, "cpu, cuda or cuda:N", is_device)

    def as_params(self) -> dict[str, Any]:
        """Return the fields by name, to be recorded as params."""
        return asdict(self)

    @classmethod
    def from_params(cls, params: Mapping[str, str]) -> TrainConfig:
        """Return the configuration of recorded params; a field that they lack has its default.

        Raises:
            ValueError: a param is no value of its field, or one without a default is missing.
        """
        given: dict[str, Any] = {}
        for each in fields(cls):
            if each.name not in params:
                if each.default is MISSING:
                    raise ValueError(f"its params have no {each.name}")
                continue
            text = params[each.name]
            try:
                given[each.name] = None if text == "None" else _KINDS[str(each.type)](text)
            except ValueError:
                raise ValueError(f"its param {each.name} is {text!r}: no {each.type}") from None
        return cls(**given)

    def code_digests(self) -> dict[str, str]:
        """Return the digests of the files of a user's own network and loss, by their references."""
        own = {self.loss, self.network} - {*LOSSES, *NETWORKS}
        return {
            name: digest_of(name)
            for name in sorted(own)
            if is_reference(name) and not name.startswith(TORCHVISION)
        }


_KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": float,
}


def _is_integer_from(low: int, high: float = math.inf) -> Callable[[object], bool]:
    return lambda v: isinstance(v, int) and low <= v <= high


def _check(name: str, value: Any, allowed: str, is_allowed: Callable[[Any], object]) -> None:
    try:
        fine = is_allowed(value) and not isinstance(value, bool)  # True is an integer to Python
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ValueError that lists the choices if `value` is not one of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
