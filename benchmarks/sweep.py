"""How long does a whole sweep take? `python -m benchmarks.sweep --dataset cifar10`.

The same six trials (two epochs of 10,000 images, batch sizes 64 and 256, the losses `mse` and
`cross_entropy`) by `python -m experiments.sweep` and by a plain Optuna and MLflow script
(`benchmarks/plain.py`), in turns, each in a process and a folder of its own, from the command to
its end: start, tables, training, validation, logging, models. Both find the images decoded.

Of this project it prints as well after how long the first training step began: when there was a
first epoch's checkpoint, less what the epoch took.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from benchmarks.common import REPOSITORY, markdown, small_data, spread
from cnn.devices import machine

RATES = ("0.002", "0.02")
"""The range of learning rates: narrow, so that no trial diverges, which would end it early."""


class Watch:
    """Notes after how many seconds, of a `with` block, there is a first file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds, self.is_over = folder, math.nan, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self.start = time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.is_over.wait(0.01):
            if any(self.folder.glob("*.pt")):
                self.seconds = time.perf_counter() - self.start
                return


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", default="cifar10", metavar="NAME|PATH")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--trials", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args()
    print(machine(), flush=True)
    theirs, ours, first_steps = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder, data_dir = Path(name), options.data_dir.resolve()
        images = folder / "images"
        small_data(options.dataset, images, options.images, data_dir)
        data = ["--dataset", str(images), "--data-dir", str(data_dir)]
        for repeat in range(options.repeats):
            place = folder / f"ours {repeat}"
            command = sweep_command(data, options.trials, options.epochs)
            with Watch(data_dir / "checkpoints") as watch:
                ours.append(run(command, place))
            first_steps.append(watch.seconds - first_epoch(place))
            trials = folder / f"trials {repeat}.json"
            trials.write_text(json.dumps(parameters(place)))
            command = [sys.executable, "-m", "benchmarks.plain", str(images), str(data_dir)]
            command += [str(options.epochs), str(trials)]
            theirs.append(run(command, folder / f"plain {repeat}"))
            print(
                f"{repeat + 1}/{options.repeats}: {ours[-1]:.1f} s, {theirs[-1]:.1f} s",
                file=sys.stderr,
            )
    ratio = statistics.median(theirs) / statistics.median(ours)
    rows = [
        ["plain Optuna and MLflow script", spread(theirs, 1), "1.00"],
        ["python -m experiments.sweep", spread(ours, 1), f"{ratio:.2f}"],
    ]
    print(markdown(["way", "whole process, s", "ratio"], rows))
    print(f"\nfirst training step after {spread(first_steps, 1)} s")
    return 0


def sweep_command(data: Sequence[str], trials: int, epochs: int) -> list[str]:
    """Return the command line of the sweep."""
    command = [sys.executable, "-m", "experiments.sweep", *data, "--study", "benchmark"]
    command += ["--losses", "mse", "cross_entropy", "--batch-sizes", "64", "256"]
    command += ["--learning-rate-min", RATES[0], "--learning-rate-max", RATES[1]]
    command += ["--sampler", "random", "--pruner", "none"]
    return [*command, "--trials", str(trials), "--epochs", str(epochs)]


def run(command: Sequence[str], folder: Path) -> float:
    """Run a command in a new folder, and return how many seconds it took."""
    folder.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment = clean | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log.txt").open("wb") as log:
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=log, check=False
        )
        seconds = time.perf_counter() - start
    assert done.returncode == 0, (folder / "log.txt").read_text()[-3000:]
    return seconds


def first_epoch(folder: Path) -> float:
    """Return how many seconds the first epoch took, of the trial that had it first."""
    query = "SELECT MIN(value) FROM metrics WHERE key = 'time/epoch_seconds' AND step = 1"
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        (seconds,) = database.execute(query).fetchone()
    return float(seconds)


def parameters(folder: Path) -> list[dict[str, object]]:
    """Return the parameters of a sweep's trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name="benchmark", storage=f"sqlite:///{folder}/optuna.db")
    return [trial.params for trial in study.get_trials()]


if __name__ == "__main__":
    sys.exit(main())
