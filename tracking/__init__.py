"""Runs and models in MLflow: record them, find the best, predict with it.

`import tracking` is quick: functions import MLflow (about two seconds) and PyTorch when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracking.models.predictor import Predictor as Predictor
    from tracking.selection import best_run as best_run
    from tracking.selection import load_best as load_best

__all__ = ["Predictor", "best_run", "load_best"]

_HOMES = {
    "best_run": "tracking.selection",
    "load_best": "tracking.selection",
    "Predictor": "tracking.models.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
