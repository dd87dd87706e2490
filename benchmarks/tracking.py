"""What it costs to record a trial in MLflow: `python -m benchmarks.tracking`.

Beside this project's way (`tracking.runs`), the way of most scripts: MLflow's fluent calls, a
metric at a time, and `log_model` with its requirements inferred. Both record the same, in turns, in
one fresh SQLite store each. Times are in milliseconds: median, and the range of all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

METRICS = {
    "train/loss": 0.5,
    "train/accuracy": 0.8,
    "val/loss": 0.6,
    "val/accuracy": 0.7,
    "learning_rate": 0.1,
    "time/epoch_seconds": 3.0,
    "time/images_per_second": 9000.0,
}
CLASSES = [str(k) for k in range(10)]

Times = dict[str, list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__)
    parser.add_argument("--trials", type=int, default=10, help="of each way (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="a trial (default: %(default)s)")
    parser.add_argument(
        "--inferred", type=int, default=3, help="trials of the other way (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        times: dict[str, Times] = {"tracking.runs": {}, "fluent, inferred": {}}
        measure_ours = prepare_ours()
        for trial in range(options.trials):
            measure_ours(options.epochs, times["tracking.runs"] if trial else {})
            if trial < options.inferred:
                measure_fluent(options.epochs, times["fluent, inferred"])
        report(times)


def prepare_ours() -> Callable[[int, Times], None]:
    """Return what records a trial as a sweep does."""
    import numpy as np

    from cnn.config import TrainConfig
    from cnn.losses import softmax
    from cnn.networks import CNN, Classifier
    from tracking.tracker import Tracker

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('ours.db').absolute()}"
    tracker = Tracker.open("benchmark")
    parent = tracker.start_run("sweep")
    model = Classifier(CNN(10), softmax).eval()
    example = np.zeros((2, 32, 32, 3), np.uint8)
    config = TrainConfig(loss="mse", learning_rate=0.1, batch_size=64)

    def measure(epochs: int, times: Times) -> None:
        def opened() -> Any:
            run = tracker.start_run("trial", params=config.as_params(), tags={}, parent=parent)
            run.log_dataset(
                name="digits", digest="0" * 32, source="", profile={}, context="training"
            )
            return run

        run = timed(times, "open", opened)
        for epoch in range(1, epochs + 1):
            timed(times, "epoch", partial(run.log_metrics, METRICS, step=epoch))
        timed(
            times,
            "model",
            lambda: run.log_model(model, input_example=example, classes=CLASSES, step=epochs),
        )
        timed(times, "close", lambda: run.end("complete"))

    return measure


def measure_fluent(epochs: int, times: Times) -> None:
    """Record a trial as most scripts do."""
    import mlflow
    import numpy as np
    import torch
    from mlflow.data.numpy_dataset import from_numpy
    from mlflow.models import infer_signature

    from cnn.config import TrainConfig
    from cnn.losses import softmax
    from cnn.networks import CNN, Classifier

    before = os.environ["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(f"sqlite:///{Path('fluent.db').absolute()}")
    mlflow.set_experiment("benchmark")
    model = Classifier(CNN(10), softmax).eval()
    example = np.zeros((2, 32, 32, 3), np.uint8)
    answers = model(torch.from_numpy(example)).detach().numpy()
    config = TrainConfig(loss="mse", learning_rate=0.1, batch_size=64)

    def opened() -> None:
        mlflow.start_run()
        mlflow.log_params(config.as_params())
        mlflow.log_input(from_numpy(example), context="training")

    def log_epoch(step: int) -> None:
        for name, value in METRICS.items():
            mlflow.log_metric(name, value, step=step)

    timed(times, "open", opened)
    for epoch in range(1, epochs + 1):
        timed(times, "epoch", partial(log_epoch, epoch))
    timed(
        times,
        "model",
        lambda: mlflow.pytorch.log_model(
            model, name="model", input_example=example, signature=infer_signature(example, answers)
        ),
    )
    timed(times, "close", mlflow.end_run)
    mlflow.set_tracking_uri(before)


def timed(times: Times, what: str, call: Callable[[], Any]) -> Any:
    """Call, and add the time that it took, in milliseconds."""
    start = time.perf_counter()
    result = call()
    times.setdefault(what, []).append((time.perf_counter() - start) * 1000)
    return result


def report(times: dict[str, Times]) -> None:
    """Print a row for each thing that is recorded, and the sum of a trial without its epochs."""
    print(f"{'ms: median (range), n':26s}" + "".join(f"{way:>34s}" for way in times))
    for what in ("open", "epoch", "model", "close"):
        print(f"{what:26s}" + "".join(f"{spread(of[what]):>34s}" for of in times.values()))
    trials = [
        sum(statistics.median(of[what]) for what in ("open", "model", "close"))
        for of in times.values()
    ]
    print(f"{'a trial, without epochs':26s}" + "".join(f"{trial:34.0f}" for trial in trials))
    print(f"ratio: {trials[1] / trials[0]:.1f}")


def spread(values: list[float]) -> str:
    """Return median, range and number of some times."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f}), {len(values)}"


if __name__ == "__main__":
    main()
