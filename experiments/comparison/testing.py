"""The test split: a stored model is shown it once, and what it answered is recorded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from cnn.data import Dataset

if TYPE_CHECKING:
    from tracking.runs import Run


LEAST_PROBABILITY = 1e-6
"""What a smaller one counts as in the negative log-likelihood, which would be infinite at 0."""

CONFUSION_FILE = "test/confusion.json"

ROUND_TAG = "test_round"
"""Of a confirmed run: in which round its model was last shown the test split."""


def test_model(run: Run, data: Dataset, *, test_round: int) -> float:
    """Show a run's model the test split, record what it makes of it, and return its accuracy."""
    from tracking.evaluation.metrics import Counter
    from tracking.selection import load_run

    model = load_run(run.run_id)
    labels = data.test.labels.numpy()
    probabilities = model.probabilities(data.test.images.numpy())
    counter = Counter(model.classes)
    counter.add(labels, probabilities)
    measures = counter.measures()
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    metrics = {
        "test/accuracy": measures.accuracy[0],
        "test/nll": float(-np.log(of_truth.clip(LEAST_PROBABILITY)).mean()),
        "test/brier": measures.brier_score,
        "test/ece": measures.calibration_error,
    }
    confusion = {"classes": list(model.classes), "images": measures.confusion.tolist()}
    run.log_text(json.dumps(confusion), CONFUSION_FILE)
    # Last, and all at once: where there are metrics, the rest is there, and the round is noted.
    run.log_metrics(
        metrics,
        step=test_round,
        tags={ROUND_TAG: str(test_round)},
        model_id=run.model_id(),
        data=(data.name, data.digest),
    )
    return metrics["test/accuracy"]


def last_round(run: Run) -> int:
    """Return in which round a run's model was last shown the test split, 0 for never."""
    return int(run.client.get_run(run.run_id).data.tags.get(ROUND_TAG, 0))
