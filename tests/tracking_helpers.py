"""Runs and models for the tests of `tracking`, made through it, but for no training."""

from __future__ import annotations

import io
import itertools
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from torch import Tensor, nn

from tracking.runs import Run
from tracking.tracker import Tracker

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

_starts = itertools.count(1_700_000_000_000, 1000)


class ColourModel(nn.Module):
    """Tells red, green and blue from each other: images (N, 32, 32, 3) uint8 → (N, 3)."""

    def __init__(self, sharpness: float = 4.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images: Tensor) -> Tensor:
        means = images.to(self.scale.dtype).mean((1, 2)) / 255  # (N, 3)
        return torch.softmax(self.scale * means, dim=1)


def log_model(
    run: Run,
    *,
    classes: Sequence[str] = tuple(COLOURS),
    sharpness: float = 4.0,
    step: int = 1,
    **metadata: object,
) -> str:
    example = np.zeros((2, 32, 32, 3), np.uint8)
    model = ColourModel(sharpness).eval()
    return run.log_model(
        model, input_example=example, classes=classes, step=step, metadata=metadata
    )


def record(
    tracker: Tracker,
    name: str = "run",
    *,
    accuracy: float | Sequence[float] | None = 0.5,
    loss: float | None = None,
    outcome: str | None = "complete",
    has_model: bool = True,
    start: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Record a run whose model is a mere entry, which nobody could load; return the run's id."""
    client = tracker.client
    created = client.create_run(
        tracker.experiment_id, run_name=name, start_time=start or next(_starts)
    )
    run = Run(client, created.info.run_id, tracker.experiment_id)
    accuracies = accuracy if isinstance(accuracy, Sequence) else [accuracy]
    for step, value in enumerate(accuracies, 1):
        values = {"val/accuracy": value, "val/loss": loss, **(metrics or {})}
        run.log_metrics({k: v for k, v in values.items() if v is not None}, step=step)
    if has_model:
        add_model_entry(run, step=len(accuracies))
    if outcome is not None:
        run.end(outcome)
    return run.run_id


def add_model_entry(run: Run, *, step: int) -> str:
    model = run.client.create_logged_model(run.experiment_id, "model", run.run_id)
    run.client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
    return str(model.model_id)


@contextmanager
def new_store(folder: Path) -> Iterator[str]:
    """Work in a folder with an MLflow store of its own, of which nothing else is set; give its URI.

    To make the tables takes two seconds, to copy them none.
    """
    shutil.copy(empty_database(folder.parent), folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield uri


@cache
def empty_database(folder: Path) -> Path:
    """Make an MLflow database with all its tables, once for each folder; return its file."""
    file = folder / "empty-mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def type_at_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    """Make input and output a terminal where a user types an answer, or ends the input."""
    typed = io.StringIO("" if answer is None else f"{answer}\n")
    monkeypatch.setattr("sys.stdin", typed)
    for stream in (typed, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
