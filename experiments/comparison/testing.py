"""The test split: a stored model predicts it once, and its metrics are recorded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from cnn.data import Dataset, Split

if TYPE_CHECKING:
    import numpy.typing as npt

    from tracking.examples import Examples
    from tracking.runs import Run


LEAST_PROBABILITY = 1e-6
"""The lower bound in the negative log-likelihood, which would be infinite at 0."""

CONFUSION_FILE = "test/confusion.json"
"""The artifact with the confusion matrix, and the true and predicted class of each test image."""

EXAMPLES_FILE = "test/examples.json"
"""The artifact with some test images and their probabilities: see `tracking.examples`."""

ROUND_TAG = "test_round"
"""The round in which a confirmed run's model last saw the test split."""


def test_model(run: Run, data: Dataset, *, test_round: int) -> float:
    """Predict the test split with a run's model, record its metrics, and return its accuracy."""
    from tracking.evaluation.metrics import MetricsAccumulator
    from tracking.selection import load_run

    model = load_run(run.run_id)
    labels = data.test.labels.numpy()
    probabilities = model.probabilities(data.test.images.numpy())
    counts = MetricsAccumulator(model.classes)
    counts.add(labels, probabilities)
    measures = counts.measures()
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    metrics = {
        "test/accuracy": measures.accuracy[0],
        "test/nll": float(-np.log(of_truth.clip(LEAST_PROBABILITY)).mean()),
        "test/brier": measures.brier_score,
        "test/ece": measures.calibration_error,
    }
    confusion = {
        "classes": list(model.classes),
        "images": measures.confusion.tolist(),
        "true": labels.tolist(),
        "predicted": probabilities.argmax(axis=1).tolist(),
    }
    run.log_text(json.dumps(confusion), CONFUSION_FILE)
    examples = _examples(data.test, model.classes, probabilities)
    run.log_text(json.dumps(examples.as_dict()), EXAMPLES_FILE)
    # Last and in one call: a run with metrics also has the file and the round.
    run.log_metrics(
        metrics,
        step=test_round,
        tags={ROUND_TAG: str(test_round)},
        model_id=run.model_id(),
        data=(data.name, data.digest),
    )
    return metrics["test/accuracy"]


def _examples(
    split: Split, classes: tuple[str, ...], probabilities: npt.NDArray[np.float32]
) -> Examples:
    """Return images of the split to look at, chosen by these predictions of them."""
    from tracking.examples import ExamplePicker

    def read_image(row: int) -> npt.NDArray[np.uint8]:
        images, _ = split.batch(torch.tensor([row]))
        return images[0].numpy()

    picker, rows = ExamplePicker(), np.arange(len(split))
    picker.add(rows, [f"test[{row}]" for row in rows], split.labels.numpy(), probabilities)
    return picker.examples(classes, read_image)


def last_round(run: Run) -> int:
    """Return the round in which a run's model last saw the test split, 0 for never."""
    return int(run.tags().get(ROUND_TAG, 0))
