"""How fast is training? `python -m benchmarks.training --dataset cifar10`.

Three ways are measured in turns: the tutorial's way (a DataLoader with two processes,
`ToTensor` and `Normalize`, float32), one worker of this project, and a worker for each core, which
train different trials.

- *images/s*: training images per second of training time, without validation and without the first
  epoch; for several workers the sum. Median and range over the repeats.
- *ratio*: to the tutorial's way at the same batch size, of the medians.
- *share*: of the speed at which all arithmetic of training (69 million operations per image) would
  run at the rate of a bfloat16 matrix product (2048 rows and columns, all cores, measured in
  between).
- *accuracy*: on the validation split after the same epochs, mean and range. The learning rate is
  0.01 at batch size 64, and grows with the square root of the batch size.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import tutorial
from benchmarks.common import make_parser, markdown, matrix_product_rate, spread
from benchmarks.tutorial import Trained
from cnn.config import TrainConfig
from cnn.data import Dataset, load
from cnn.devices import machine, num_cores, resolve_precision
from experiments.engine.base import EpochEnded, JobEnded, JobFailed
from experiments.engine.processes import ProcessPool

OPERATIONS = 69e6
"""Multiplications and additions for an image, forward and backward, without the gradient of the
image itself."""

TUTORIAL, ONE, ALL = "tutorial's way", "one worker", "all workers"

Results = dict[tuple[int, str], list[Trained]]


def main() -> int:
    """Measure and print."""
    parser = make_parser("training", __doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", metavar="NAME|PATH", help="as experiments.sweep takes it")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="for decoded images")
    add("--images", type=int, default=10_000, help="to train on; a tenth of them validates")
    add("--epochs", type=int, default=3, help="of each training")
    add("--repeats", type=int, default=3, help="of each way and batch size")
    add("--batch-sizes", type=int, nargs="+", default=[16, 64, 256], help="to train with")
    options = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder, ProcessPool(num_cores()) as pool:
        data = first_images(options.dataset, Path(folder), options.images, options.data_dir)
        pool.open(data, options.data_dir)
        warm_up = TrainConfig(loss="mse", learning_rate=0.01, batch_size=256, epochs=1)
        train_at_once(pool, [replace(warm_up, seed=n) for n in range(pool.num_idle)])
        results: Results = defaultdict(list)
        rates = []
        for repeat in range(options.repeats):
            for batch_size in options.batch_sizes:
                rates.append(matrix_product_rate())
                for way, train in ways(data, pool, batch_size, options.epochs, repeat).items():
                    trained = train()
                    results[batch_size, way].append(trained)
                    speed = f"{trained.images_per_second:,.0f} images/s"
                    print(
                        f"{repeat + 1}/{options.repeats}", way, batch_size, speed, file=sys.stderr
                    )
    print(f"bfloat16 matrix product: {spread([rate / 1e9 for rate in rates])} GFLOP/s\n")
    print(report(results, statistics.median(rates)))
    return 0


def first_images(source: str, folder: Path, num_images: int, data_dir: Path) -> Dataset:
    """Return a data set of the first training images of another one, written to a folder.

    As PNG, which loses nothing; as many of each class, a tenth of them for validation.
    """
    import torch
    from PIL import Image

    whole = load(source, data_dir=data_dir, seed=0)
    per_class = num_images // len(whole.classes)
    for split, part, count in (
        ("train", whole.train, per_class),
        ("test", whole.test, max(1, per_class // 10)),
    ):
        for label, name in enumerate(whole.classes):
            (folder / split / name).mkdir(parents=True)
            rows = torch.nonzero(part.labels == label).flatten()[:count]
            images, _ = part.batch(rows)
            for number, image in enumerate(images.numpy()):
                Image.fromarray(image).save(folder / split / name / f"{number:05d}.png")
    return load(str(folder), data_dir=data_dir, seed=0)


def ways(
    data: Dataset, pool: ProcessPool, batch_size: int, epochs: int, repeat: int
) -> dict[str, Callable[[], Trained]]:
    """Return what trains in each way at a batch size."""
    learning_rate = 0.01 * (batch_size / 64) ** 0.5
    one, *others = (
        TrainConfig(
            loss="cross_entropy",
            learning_rate=learning_rate,
            batch_size=batch_size,
            epochs=epochs,
            seed=100 * repeat + number,
            precision=resolve_precision("auto", "cpu"),
        )
        for number in range(num_cores() + 1)
    )
    return {
        TUTORIAL: lambda: tutorial.train(
            data.train,
            data.validation,
            num_classes=len(data.classes),
            batch_size=batch_size,
            learning_rate=learning_rate,
            epochs=epochs,
        ),
        ONE: lambda: train_at_once(pool, [one]),
        ALL: lambda: train_at_once(pool, others),
    }


def train_at_once(pool: ProcessPool, configs: Sequence[TrainConfig]) -> Trained:
    """Train each configuration in a worker of its own; return their speed and mean accuracy."""
    metrics: dict[int, list[dict[str, float]]] = defaultdict(list)
    for job, config in enumerate(configs):
        pool.submit(job, config)
    running = len(configs)
    while running:
        for event in pool.wait(60):
            assert not isinstance(event, JobFailed), event
            if isinstance(event, EpochEnded):
                metrics[event.job].append(event.metrics)
            running -= isinstance(event, JobEnded)
    for config in configs:
        pool.forget(config)
    return Trained(
        images_per_second=sum(
            statistics.mean(epoch["worker/images_per_second"] for epoch in epochs[1:] or epochs)
            for epochs in metrics.values()
        ),
        accuracy=statistics.mean(epochs[-1]["val/accuracy"] for epochs in metrics.values()),
    )


def report(results: Results, rate: float) -> str:
    """Return a table with a row for each batch size and way."""
    rows = []
    for (batch_size, way), trained in sorted(results.items(), key=lambda item: item[0][0]):
        speeds = [each.images_per_second for each in trained]
        accuracies = [each.accuracy for each in trained]
        speed = statistics.median(speeds)
        baseline = statistics.median(e.images_per_second for e in results[batch_size, TUTORIAL])
        share = "" if way == TUTORIAL else f"{speed * OPERATIONS / rate:.2f}"
        accuracy = (
            f"{statistics.mean(accuracies):.1%} ({min(accuracies):.1%}–{max(accuracies):.1%})"
        )
        rows.append(
            [f"{batch_size}", way, spread(speeds), f"{speed / baseline:.2f}", share, accuracy]
        )
    header = ["batch size", "way", "images/s", "ratio", "share", "validation accuracy"]
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(main())
