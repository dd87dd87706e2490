"""How fast is training? `python -m benchmarks.training --dataset cifar10`.

In one run, in turns: the seed's way (a DataLoader of batch size 1, `ToTensor`, float32), the
tutorial's way (a DataLoader with two processes, `ToTensor` and `Normalize`, float32, the same batch
size), and this project's workers, one and as many as there are cores, on trials of their own.

- *images/s*: training images a second of training time, without validation and without a process'
  first epoch; of several workers the sum. Median and range over the repeats.
- *ratio*: to the tutorial's way at the same batch size; of medians.
- *share*: of the rate at which all arithmetic of the training (69 million operations an image)
  would run if it were a bfloat16 matrix product of 2048 rows and columns on all cores, which is
  measured in between.
- *accuracy*: on the validation split, after the same epochs, mean and range. Learning rates are
  0.01 at batch size 64, in proportion to the square root of the batch size.

Then what the seed's way takes to its accuracy, and what this project takes to the same, with the
batch size and the number of epochs, up to as many, that are best for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.common import markdown, matrix_product_rate, small_data, spread
from benchmarks.usual import Trained, seed, tutorial
from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.devices import machine, num_cores, resolve_precision
from experiments.engine.base import EpochEnded, JobEnded, JobFailed
from experiments.engine.processes import ProcessPool

OPERATIONS = 69e6
"""An image's multiplications and additions, forwards and backwards, without the gradient of the
image itself."""

SEED, TUTORIAL, ONE, ALL = "seed's way", "tutorial's way", "one worker", "all workers"


@dataclass
class Measured:
    """What was measured of one way at one batch size."""

    images_per_second: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def add(self, trained: Trained) -> None:
        """Add a repeat."""
        self.images_per_second.append(trained.images_per_second)
        self.seconds.append(trained.seconds)
        self.accuracies.append(trained.accuracy)


Results = dict[tuple[str, int], Measured]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", default="cifar10", metavar="NAME|PATH")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64, 256])
    options = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        data = small_data(options.dataset, folder, options.images, options.data_dir)
        with ProcessPool(num_cores()) as pool:
            pool.open(data, options.data_dir)
            results, rates = measure(
                data, pool, options.batch_sizes, epochs=options.epochs, repeats=options.repeats
            )
    print(f"bfloat16 matrix product: {spread([rate / 1e9 for rate in rates])} GFLOP/s\n")
    print(report(results, statistics.median(rates)), "\n")
    print(to_the_same_accuracy(results))
    return 0


def measure(
    data: Dataset, pool: ProcessPool, batch_sizes: Sequence[int], *, epochs: int, repeats: int
) -> tuple[Results, list[float]]:
    """Return what was measured of each way and batch size, and the rates of matrix products."""
    results: Results = {}
    rates = []
    warm_up(pool)
    for repeat in range(repeats):
        for batch_size in batch_sizes:
            rates.append(matrix_product_rate())
            for way, train in ways(data, pool, batch_size, epochs, repeat).items():
                trained = train()
                results.setdefault((way, batch_size), Measured()).add(trained)
                print(
                    f"{repeat + 1}/{repeats}  {way:15s} batch size {batch_size:4d} "
                    f"{trained.images_per_second:8,.0f} images/s  {trained.accuracy:.2%}",
                    file=sys.stderr,
                    flush=True,
                )
    return results, rates


def ways(
    data: Dataset, pool: ProcessPool, batch_size: int, epochs: int, repeat: int
) -> dict[str, Callable[[], Trained]]:
    """Return what trains in each way at a batch size."""
    rate = 0.01 * (batch_size / 64) ** 0.5
    configs = [
        TrainConfig(
            loss="cross_entropy",
            learning_rate=rate,
            batch_size=batch_size,
            epochs=epochs,
            seed=100 * repeat + worker,
            precision=resolve_precision("auto", "cpu"),
        )
        for worker in range(num_cores() + 1)
    ]
    classes = len(data.classes)
    usual: dict[str, Callable[[], Trained]] = {
        TUTORIAL: lambda: tutorial(
            data.train,
            data.validation,
            num_classes=classes,
            batch_size=batch_size,
            learning_rate=rate,
            epochs=epochs,
        ),
        ONE: lambda: ours(pool, configs[:1]),
        ALL: lambda: ours(pool, configs[1:]),
    }
    if batch_size == 1:
        splits = (data.train, data.validation)
        return {SEED: lambda: seed(*splits, num_classes=classes, epochs=epochs)} | usual
    shorter = {
        f"{ALL}, epochs: {fewer}": partial(
            ours, pool, [replace(c, epochs=fewer) for c in configs[1:]]
        )
        for fewer in range(1, epochs)
    }
    return usual | shorter


def warm_up(pool: ProcessPool) -> None:
    """Have every worker ready."""
    ours(
        pool,
        [
            TrainConfig(loss="mse", learning_rate=0.01, batch_size=256, epochs=1, seed=number)
            for number in range(pool.num_idle)
        ],
    )


def ours(pool: ProcessPool, configs: Sequence[TrainConfig]) -> Trained:
    """Train each configuration in a worker of its own, all at the same time."""
    start = time.perf_counter()
    epochs: dict[int, list[dict[str, float]]] = {}
    for job, config in enumerate(configs):
        pool.submit(job, config)
    running = len(configs)
    while running:
        for event in pool.wait(60):
            assert not isinstance(event, JobFailed), event
            if isinstance(event, EpochEnded):
                epochs.setdefault(event.job, []).append(event.metrics)
            elif isinstance(event, JobEnded):
                running -= 1
    seconds = time.perf_counter() - start
    for config in configs:
        pool.forget(config)
    return Trained(
        images_per_second=sum(
            statistics.mean(each["time/images_per_second"] for each in of[1:] or of)
            for of in epochs.values()
        ),
        seconds=seconds / len(configs),
        accuracy=statistics.mean(of[-1]["val/accuracy"] for of in epochs.values()),
    )


def report(results: Results, rate: float) -> str:
    """Return a row for each way and batch size."""
    rows = []
    for (way, batch_size), measured in sorted(results.items(), key=lambda item: item[0][1]):
        if way not in (SEED, TUTORIAL, ONE, ALL):
            continue
        median = statistics.median(measured.images_per_second)
        base = statistics.median(results[TUTORIAL, batch_size].images_per_second)
        rows.append(
            [
                str(batch_size),
                way,
                spread(measured.images_per_second),
                f"{median / base:.2f}",
                f"{median * OPERATIONS / rate:.2f}" if way in (ONE, ALL) else "",
                accuracy(measured),
            ]
        )
    return markdown(
        ["batch size", "way", "images/s", "ratio", "share", "validation accuracy"], rows
    )


def accuracy(measured: Measured) -> str:
    """Return mean and range."""
    low, high = min(measured.accuracies), max(measured.accuracies)
    return f"{statistics.mean(measured.accuracies):.1%} ({low:.1%}–{high:.1%})"


def to_the_same_accuracy(results: Results) -> str:
    """Return how many times as soon this project has the seed's accuracy, a trial a core."""
    if (SEED, 1) not in results:
        return ""
    theirs = results[SEED, 1]
    wanted = statistics.mean(theirs.accuracies)
    seconds = statistics.median(theirs.seconds)
    enough = {
        key: statistics.median(measured.seconds)
        for key, measured in results.items()
        if key[0].startswith(ALL) and statistics.mean(measured.accuracies) >= wanted
    }
    if not enough:
        return f"no batch size reaches the {wanted:.1%} of the {SEED} in as many epochs"
    best = min(enough, key=lambda key: enough[key])
    fastest = max(
        statistics.median(measured.images_per_second)
        for (way, _), measured in results.items()
        if way == ALL
    )
    return (
        f"{SEED}: {wanted:.1%} after {seconds:.1f} s. {best[0]}, batch size {best[1]}: "
        f"{accuracy(results[best])} after {enough[best]:.1f} s a trial, "
        f"{seconds / enough[best]:.1f} times as soon. Images/s at the best batch size: "
        f"{fastest / statistics.median(theirs.images_per_second):.1f} times the {SEED}."
    )


if __name__ == "__main__":
    sys.exit(main())
