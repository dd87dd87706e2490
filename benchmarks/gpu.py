"""Does training on a GPU do what it promises, and how fast? `python -m benchmarks.gpu`.

It needs PyTorch (2.11 or later) and NumPy, nothing else, and takes less than eight minutes. The
images are made up: each class has a pattern, shifted, with noise.

1. *Checks*: what training promises on any device (`benchmarks/gpu_checks.py`).
2. *Speed*: training images per second, without validation and without the first epoch. It measures
   the tutorial's way (a DataLoader with two processes, float32) and `cnn.training.train` in turns:
   median, range and number of repeats; ratio of medians. Repeats must end with the same bits.
3. *Accuracy*: on the validation split, with the same seeds in each precision and on the CPU: mean
   and range, and mean and range of the differences, seed by seed.

Exit codes: 0 all holds, 1 something does not hold, 2 there is no GPU. `--device cpu` tries the
script itself.
"""

from __future__ import annotations

import faulthandler
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks import tutorial
from benchmarks.common import made_up, make_parser, markdown, spread
from benchmarks.gpu_checks import CHECKS, digests, precisions, run_checks
from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.training import train

TUTORIAL = "tutorial's way, float32" + ("" if tutorial.HAS_TORCHVISION else ", without torchvision")
REPEATS, SEEDS, CPU_SEEDS = 7, 8, 3
"""At most; there are fewer where the time is up."""
LEAST_REPEATS = 2
"""However long they take: a repeat is compared with the first."""
TOLERANCE = 0.01
"""The largest difference of a mean accuracy to that in float32 on the same device: a point."""
LAST_RESORT_SECONDS = 470
"""After this time, whatever hangs is ended with its traceback: a GPU may be lent for 8 minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print."""
    parser = make_parser("gpu", __doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="as PyTorch names it")
    add("--seconds", type=float, default=420, help="time for all of it")
    add("--images", type=int, default=20_480, help="to train on")
    add("--batch-sizes", type=int, nargs="+", default=[64, 512, 2048], help="to train with")
    options = parser.parse_args(argv)
    device = options.device
    if device != "cpu" and not torch.cuda.is_available():
        print(
            f"no GPU here that PyTorch {torch.__version__} can use: --device cpu tries the script",
            file=sys.stderr,
        )
        return 2
    faulthandler.dump_traceback_later(max(LAST_RESORT_SECONDS, options.seconds + 50), exit=True)
    start = time.perf_counter()
    print(f"{described(device)}\n", flush=True)
    wrong = run_checks(CHECKS, device)
    data = made_up(options.images, max(20, options.images // 10), contrast=20, tint=0)
    wrong += measure_speed(data, device, options.batch_sizes, start + 0.6 * options.seconds)
    wrong += measure_accuracy(data, device, options.batch_sizes[0], start + options.seconds)
    print(f"\n{time.perf_counter() - start:.0f} s. ", end="")
    print(f"Does not hold: {'; '.join(wrong)}" if wrong else "All holds.")
    faulthandler.cancel_dump_traceback_later()
    return 1 if wrong else 0


def described(device: str) -> str:
    """Return the device and the versions in a line."""
    versions = f"PyTorch {torch.__version__}, NumPy {np.__version__}"
    versions += f", Python {platform.python_version()}"
    if device == "cpu":
        return f"CPU ({torch.get_num_threads()} threads), {versions}"
    about = torch.cuda.get_device_properties(device)
    return (
        f"{about.name} ({about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} "
        f"multiprocessors), {os.cpu_count()} CPU cores, {versions}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    )


def measure_speed(
    data: Dataset, device: str, batch_sizes: Sequence[int], until: float
) -> list[str]:
    """Print the speed of each way at each batch size, and return what does not hold."""
    print("\n| batch size | way | images/s |\n| --- | --- | --- |", flush=True)
    ways = [TUTORIAL, *precisions(device)]
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    ends: dict[tuple[int, str], set[str]] = defaultdict(set)
    for repeat in range(REPEATS):
        for batch_size, way in itertools.product(batch_sizes, ways):
            if repeat >= LEAST_REPEATS and time.perf_counter() > until:
                break
            rate, end = trained(way, data, device, batch_size)
            rates[batch_size, way].append(rate)
            ends[batch_size, way].add(end)
            print(f"| {batch_size} | {way} | {rate:,.0f} |", flush=True)
    rows = []
    for (batch_size, way), measurements in rates.items():
        baseline = statistics.median(rates[batch_size, TUTORIAL])
        ratio = statistics.median(measurements) / baseline
        equal = "" if way == TUTORIAL else "no" if len(ends[batch_size, way]) > 1 else "yes"
        rows.append([str(batch_size), way, spread(measurements), f"{ratio:.1f}", equal])
    header = ["batch size", "way", "images/s", "ratio", "repeats end with the same bits"]
    print(f"\n{markdown(header, rows)}", flush=True)
    return [f"repeats differ: batch size {row[0]}, {row[1]}" for row in rows if row[4] == "no"]


def trained(way: str, data: Dataset, device: str, batch_size: int) -> tuple[float, str]:
    """Return the images per second of a training in some way, and a digest of its end."""
    rate = learning_rate(batch_size)
    if way == TUTORIAL:
        sizes = {"num_classes": len(data.classes), "batch_size": batch_size, "epochs": 2}
        baseline = tutorial.train(
            data.train, data.validation, **sizes, learning_rate=rate, device=device
        )
        return baseline.images_per_second, ""
    config = TrainConfig(
        loss="cross_entropy",
        learning_rate=rate,
        batch_size=batch_size,
        epochs=5,
        precision=way,
        device=device,
    )
    epochs = list(train(config, data))
    (end,) = digests(epochs[-1:])
    return statistics.mean(epoch.images_per_second for epoch in epochs[1:] or epochs), end


def learning_rate(batch_size: int) -> float:
    """Return a learning rate at which training goes well."""
    return 0.01 * math.sqrt(batch_size / 64)


def measure_accuracy(data: Dataset, device: str, batch_size: int, until: float) -> list[str]:
    """Print the accuracies in each precision and on the CPU, and return what does not hold."""
    print("\n| precision | device | seed | validation accuracy |\n| --- | --- | --- | --- |")
    # The CPU last: it takes longest.
    trainings = [
        (precision, device, seed) for seed in range(SEEDS) for precision in precisions(device)
    ]
    if device != "cpu":
        trainings += [("float32", "cpu", seed) for seed in range(CPU_SEEDS)]
    accuracies: dict[tuple[str, str], list[float]] = defaultdict(list)
    for precision, where, seed in trainings:
        if seed > 0 and time.perf_counter() > until:
            continue  # each way has one seed at least
        config = TrainConfig(
            loss="cross_entropy",
            learning_rate=learning_rate(batch_size),
            batch_size=batch_size,
            epochs=4,
            seed=seed,
            precision=precision,
            device=where,
        )
        *_, epoch = train(config, data)
        accuracies[precision, where].append(epoch.val_accuracy)
        print(f"| {precision} | {where} | {seed} | {epoch.val_accuracy:.2%} |", flush=True)
    rows, wrong, baseline = [], [], ("float32", device)
    for way, values in accuracies.items():
        mean = f"{statistics.mean(values):.2%} ({min(values):.2%}–{max(values):.2%})"
        pairs = zip(values, accuracies[baseline], strict=False)
        points = [100 * (value - expected) for value, expected in pairs]
        shown = f"{statistics.mean(points):+.2f} points ({min(points):+.2f} to {max(points):+.2f})"
        rows.append([*way, mean, "" if way == baseline else shown, str(len(values))])
        if abs(statistics.mean(points)) > 100 * TOLERANCE:
            wrong.append(f"accuracy of {' on '.join(way)} differs")
    header = ["precision", "device", "validation accuracy", f"to float32 on {device}", "n"]
    print(f"\n{markdown(header, rows)}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
