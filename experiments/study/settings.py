"""The settings of a sweep, checked before anything starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.samplers import BaseSampler

from cnn.config import check_choice
from cnn.data import Dataset
from cnn.devices import resolve_device, resolve_precision
from cnn.images import IMAGE_SIZE
from experiments.study.domains import Domain
from experiments.study.identity import made_with
from experiments.study.parameter_types import Configuration
from experiments.study.parameters import BY_NAME
from experiments.study.pruners import PRUNERS
from experiments.study.samplers import SAMPLERS, FixedSampler, make_sampler
from experiments.study.space import Space
from experiments.study.storage import check_study_name
from tracking.registry import check_name, default_name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a sweep; `experiments.sweep` explains each.

    Raises:
        ValueError: one is out of its range; the message names the flag, the value and the range.
    """

    search: Mapping[str, Domain]  # the searched parameters, by names of `parameters.PARAMETERS`
    trials: int
    epochs: int
    seed: int
    sampler: str
    pruner: str
    device: str
    study: str | None
    storage: str
    experiment: str | None
    timeout: float  # seconds; 0 is no limit
    workers: int
    max_failures: int  # failed trials in a row
    tracking_timeout: float  # how long to wait for a tracking server that is away, in seconds
    training: Mapping[str, Any] = field(default_factory=dict)
    """The parameters that are set to one value, other than its default, by their names."""
    patience: int = 0
    """Start no more trials after so many finished ones without a gain; 0: start all."""
    min_delta: float = 0.0
    """The smallest difference in validation accuracy, in 0 .. 1, that is a gain."""
    options: str = field(default="", compare=False)
    """The options of the command as a file that `--config` takes."""
    configurations: Sequence[Configuration] = ()
    """The configurations of all trials, in order; empty: a sampler chooses them."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of all of its runs, besides their own."""
    register: str = "none"
    """The registered model that gets the best trial's model: a name, `auto` or `none`."""
    worker_device: str | None = None
    """The device of workers on other machines, which this one can't detect."""

    def __post_init__(self) -> None:
        check_choice("--sampler", self.sampler, SAMPLERS)
        check_choice("--pruner", self.pruner, PRUNERS)
        for flag, number in (
            ("--trials", self.trials),
            ("--workers", self.workers),
            ("--max-failures", self.max_failures),
        ):
            if number < 1:
                raise ValueError(f"{flag} must be ≥ 1, not {number}")
        if not 0 <= self.timeout < math.inf:
            raise ValueError(f"--timeout must be seconds ≥ 0 (0: no limit), not {self.timeout}")
        if not 0 <= self.tracking_timeout < math.inf:
            raise ValueError(f"--tracking-timeout must be seconds ≥ 0, not {self.tracking_timeout}")
        if self.patience < 0:
            raise ValueError(f"--patience must be trials ≥ 0 (0: no limit), not {self.patience}")
        if not 0 <= self.min_delta < 1:
            raise ValueError(f"--min-delta must be ≥ 0 and < 1, not {self.min_delta}")
        if self.study is not None:
            check_study_name(self.study)
        if self.register not in ("auto", "none"):
            check_name(self.register)
        assert len(self.configurations) in (0, self.trials)
        self.space()

    @property
    def losses(self) -> tuple[str, ...]:
        """The loss functions that are searched."""
        return tuple(str(loss) for loss in self.search["loss"].values)

    def space(self) -> Space:
        """Return the search space."""
        device = self.worker_device or resolve_device(self.device)
        fixed = {"epochs": self.epochs, "seed": self.seed, "device": device, **self.training}
        if "precision" not in self.search:
            asked = fixed.get("precision", "auto")
            # GPUs of other machines are assumed to be of Ampere's generation or later.
            is_remote_gpu = self.worker_device == "cuda" and asked == "auto"
            fixed["precision"] = "bfloat16" if is_remote_gpu else resolve_precision(asked, device)
        return Space(search=self.search, fixed=fixed, varies_seed=bool(self.configurations))

    def make_sampler(self) -> BaseSampler:
        """Return the sampler of the trials' configurations."""
        if self.configurations:
            return FixedSampler(self.configurations)
        return make_sampler(self.sampler, self.seed)

    def registered_model(self, data: Dataset) -> str | None:
        """Return the name of the registered model, None for none."""
        names = {"auto": default_name(data.name), "none": None}
        return names.get(self.register, self.register)

    def made_with(self, data: Dataset) -> dict[str, Any]:
        """Return the digests of the code: see `identity.made_with`."""
        return made_with(data, self.space())

    def fingerprint(self, data: Dataset) -> dict[str, Any]:
        """Return all settings that a study's results depend on: the same make the same study."""
        names = "epochs seed sampler pruner device"
        fingerprint: dict[str, Any] = {"dataset": data.name, "dataset_digest": data.digest}
        if data.image_size != IMAGE_SIZE:  # studies of earlier versions don't say it
            fingerprint["image_size"] = data.image_size
        for name, domain in self.search.items():
            fingerprint |= BY_NAME[name].to_settings(domain)
        fingerprint |= {name: getattr(self, name) for name in names.split()}
        # Studies had these three from the beginning, and the others only if they were given.
        fingerprint |= {"optimizer": "sgd", "schedule": "one_cycle", "precision": "auto"}
        fingerprint |= self.training
        fingerprint = {key: fingerprint[key] for key in fingerprint if key not in self.search}
        if self.configurations:
            # Without the seeds: there may be more later.
            values = {tuple(map(each.get, self.search)) for each in self.configurations}
            fingerprint["points"] = sorted(values, key=_missing_last)
        # As the study returns it: tuples become lists.
        plain: dict[str, Any] = json.loads(json.dumps(fingerprint))
        return plain


def _missing_last(values: Sequence[Any]) -> list[tuple[bool, Any]]:
    """Return the key to sort rows in which values may be None, where they do not apply."""
    return [(value is None, 0 if value is None else value) for value in values]
