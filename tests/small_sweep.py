"""Settings of a sweep that is over in no time, on made data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.study.parameters import BY_NAME, PARAMETERS, searched
from experiments.study.settings import Settings


def small_settings(storage: str, **changes: Any) -> Settings:
    """Return settings: random search over three losses, three trials of three epochs, one worker.

    Args:
        storage: Optuna's database.
        changes: what is to be otherwise.
    """
    settings: dict[str, Any] = {
        "losses": ("l1", "mse", "cross_entropy"),
        "learning_rate_min": 0.001,
        "learning_rate_max": 1.0,
        "batch_sizes": (2, 4),
        "trials": 3,
        "epochs": 3,
        "seed": 0,
        "sampler": "random",
        "pruner": "none",
        "device": "cpu",
        "precision": "float32",
        "study": None,
        "storage": storage,
        "experiment": "tests",
        "timeout": 0,
        "workers": 1,
        "max_failures": 99,
        "tracking_timeout": 0,
    }
    search = {"search": searched(settings), "training": _training(settings)}
    return changed(Settings(**search | _others(settings)), **changes)


def changed(settings: Settings, **changes: Any) -> Settings:
    """Return other settings; what is searched is named as in a study: losses, batch_sizes, ..."""
    told: dict[str, Any] = {}
    for name, domain in settings.search.items():
        told |= BY_NAME[name].to_settings(domain)
    training = {**settings.training, **_training(changes)}
    search = searched(told | changes)
    return replace(settings, search=search, training=training, **_others(changes))


def _training(told: dict[str, Any]) -> dict[str, Any]:
    return {each.name: told[each.name] for each in PARAMETERS if each.name in told}


def _others(told: dict[str, Any]) -> dict[str, Any]:
    return {name: told[name] for name in told if name in Settings.__dataclass_fields__}
