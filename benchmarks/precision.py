"""Does bfloat16 cost accuracy? `python -m benchmarks.precision --dataset cifar10`.

Each loss, at its own learning rate, is trained with several seeds in float32 and in bfloat16, the
same split, initial weights and order of images each time: validation accuracy (always measured in
float32) in percent, its mean and standard deviation over the seeds, and of the paired differences
the mean with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.common import markdown, small_data
from cnn.config import PRECISIONS, TrainConfig
from cnn.devices import machine, num_cores
from experiments.engine.base import EpochEnded, JobEnded, JobFailed
from experiments.engine.processes import ProcessPool

LEARNING_RATES = {"cross_entropy": 0.01, "mse": 0.2, "l1": 0.2}


def main() -> int:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", default="cifar10", metavar="NAME|PATH")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    options = parser.parse_args()
    configs = [
        TrainConfig(
            loss=loss,
            learning_rate=rate,
            batch_size=options.batch_size,
            epochs=options.epochs,
            seed=seed,
            precision=precision,
        )
        for loss, rate in LEARNING_RATES.items()
        for seed in range(options.seeds)
        for precision in PRECISIONS
    ]
    with tempfile.TemporaryDirectory() as name, ProcessPool(num_cores()) as pool:
        images = Path(name, "images")
        data = small_data(options.dataset, images, options.images, options.data_dir)
        pool.open(data, options.data_dir)
        accuracies = dict(train_all(pool, configs))
    print(machine(), "\n")
    print(report(accuracies, options.seeds))
    return 0


def train_all(pool: ProcessPool, configs: list[TrainConfig]) -> Iterator[tuple[TrainConfig, float]]:
    """Train all, and yield each one's last validation accuracy."""
    waiting, last = list(enumerate(configs)), dict.fromkeys(range(len(configs)), np.nan)
    running = 0
    while waiting or running:
        while waiting and pool.num_idle:
            pool.submit(*waiting.pop(0))
            running += 1
        for event in pool.wait(60):
            assert not isinstance(event, JobFailed), event
            if isinstance(event, EpochEnded):
                last[event.job] = event.metrics["val/accuracy"]
            elif isinstance(event, JobEnded):
                running -= 1
                config = configs[event.job]
                pool.forget(config)
                print(config.loss, config.seed, config.precision, last[event.job], file=sys.stderr)
                yield config, last[event.job]


def report(accuracies: dict[TrainConfig, float], seeds: int) -> str:
    """Return a row for each loss."""
    rows = []
    for loss in LEARNING_RATES:
        of = {
            precision: 100
            * np.array(
                [
                    value
                    for config, value in sorted(accuracies.items(), key=lambda each: each[0].seed)
                    if (config.loss, config.precision) == (loss, precision)
                ]
            )
            for precision in PRECISIONS
        }
        difference = of["bfloat16"] - of["float32"]
        low, high = stats.t.interval(
            0.95, seeds - 1, loc=difference.mean(), scale=stats.sem(difference)
        )
        rows.append(
            [
                loss,
                *(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in of.values()),
                f"{difference.mean():+.2f} ({low:+.2f} to {high:+.2f})",
                str(seeds),
            ]
        )
    return markdown(["loss", *PRECISIONS, "difference", "n"], rows)


if __name__ == "__main__":
    sys.exit(main())
