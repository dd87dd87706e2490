"""Optuna studies over loss, learning rate and batch size: what to try, in what order.

`import experiments` is quick: `run_sweep` imports Optuna, MLflow and PyTorch when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.from_python import SweepResult as SweepResult
    from experiments.from_python import run_sweep as run_sweep

__all__ = ["SweepResult", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("experiments.from_python"), name)
