"""Trainings that are over, found by all that determines them, so that none is made twice.

A trial's run has a key: a digest of its configuration, its data, the behaviour of network, loss and
optimizer, the code of `cnn`, PyTorch's version, and the arithmetic of its worker. Trainings with
equal keys have equal results, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnn.config import TrainConfig
from cnn.data import Dataset
from experiments.study.identity import digest_of_network, training_digest

if TYPE_CHECKING:
    from tracking.tracker import Tracker

KEY = "training_key"
"""The tag of a run that holds its key."""

_MOST_LOOKED_AT = 20
"""Runs with one key: more are there only if reuse was switched off."""


def training_key(
    config: TrainConfig,
    data: Dataset,
    provenance: Mapping[str, str],
    arithmetic: Mapping[str, str],
) -> str:
    """Return 32 hex digits of all that determines the results of a training; empty if unknown.

    It is unknown where the workers' processor is: the nodes of a Ray cluster may differ. For
    `provenance`, see `identity.provenance`; for `arithmetic`, `WorkerPool`.
    """
    if "processor" not in arithmetic:
        return ""
    determined_by = {
        "config": config.as_params(),
        "data": data.digest,
        "image_size": data.image_size,
        "network": digest_of_network(config.network, data),
        "training": training_digest(config.loss, config.optimizer, config.schedule),
        "source": provenance["source"],
        "torch": provenance["torch"],
        "arithmetic": dict(arithmetic),
    }
    text = json.dumps(determined_by, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class FinishedTraining:
    """A training that another trial has made."""

    run_id: str
    outcome: str
    """complete or diverged."""
    accuracies: Mapping[int, float]
    """Of the validation split, by epoch."""
    val_loss: float | None

    @property
    def accuracy(self) -> float:
        """The last accuracy."""
        return self.accuracies[max(self.accuracies)]


def find_finished(tracker: Tracker, key: str) -> FinishedTraining | None:
    """Return a finished training with this key in the tracker's experiment, None if there is none.

    A complete one still has its model.
    """
    if not key:
        return None
    wanted = f"tags.{KEY} = '{key}' and tags.role = 'trial'"
    for found in tracker.client.search_runs(
        [tracker.experiment_id], wanted, max_results=_MOST_LOOKED_AT, order_by=["start_time ASC"]
    ):
        outcome = found.data.tags.get("outcome")
        has_model = bool(found.outputs and found.outputs.model_outputs)
        if outcome != "diverged" and not (outcome == "complete" and has_model):
            continue
        history = tracker.client.get_metric_history(found.info.run_id, "val/accuracy")
        if history:
            return FinishedTraining(
                run_id=found.info.run_id,
                outcome=outcome,
                accuracies={entry.step: entry.value for entry in history},
                val_loss=found.data.metrics.get("val/loss"),
            )
    return None
