"""What a GPU makes of the training, and how fast: `python -m benchmarks.gpu`.

It needs PyTorch (2.11 or later) and NumPy, nothing else, and takes less than eight minutes. The
images are made up: patterns, one a class, shifted and under noise.

1. *Checks*: what training promises of any device. They are the tests marked `gpu`, too.
2. *Speed*: training images a second, without validation and without a training's first epoch; in
   turns, the tutorial's way (a DataLoader with two processes, float32) and `cnn.training.train`.
   Median, range and number of repeats; ratio of medians. Repeats must end with the same bits.
3. *Accuracy*: on the validation split, the same seeds in each precision, and on the CPU: mean and
   range, and the mean and range of the differences, seed by seed.

The exit code is 1 if something does not hold, and 2 if there is no GPU. `--device cpu` is for
trying the script itself.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import hashlib
import io
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import markdown, spread
from benchmarks.usual import HAS_TORCHVISION, tutorial
from cnn import training
from cnn.config import PRECISIONS, TrainConfig
from cnn.data import Dataset, Split
from cnn.devices import resolve_precision
from cnn.losses import LOSSES
from cnn.optimizers import OPTIMIZERS
from cnn.stepper import Checkpoint
from cnn.training import Epoch, evaluate, train

TUTORIAL = "tutorial's way, float32" + ("" if HAS_TORCHVISION else ", without torchvision")
REPEATS, SEEDS, CPU_SEEDS = 7, 8, 3
"""At most; there are fewer where the time is up."""
LEAST_REPEATS = 2
"""Whatever the time: a repeat is compared with the first."""
TOLERANCE = 0.01
"""How far a mean accuracy may be from that in float32 on the same device: a point."""
LAST_RESORT_SECONDS = 470
"""After so many, what hangs is ended, with its traceback: a GPU may be lent for eight minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=420, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=20_480, help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 2048])
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
    """Return what this runs on, in a line."""
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


def precisions(device: str) -> list[str]:
    """Return those to look at: bfloat16 only where a GPU has it, not where it is emulated."""
    there = device == "cpu" or resolve_precision("auto", device) == "bfloat16"
    return list(PRECISIONS) if there else ["float32"]


@cache
def made_up(num_training: int, num_validation: int, *, contrast: float, tint: float) -> Dataset:
    """Return a data set of ten classes: a pattern and a tint each, shifted and under noise."""
    generator = np.random.default_rng(0)
    coarse = generator.standard_normal((10, 8, 8, 3), np.float32)
    tints = generator.standard_normal((10, 1, 1, 3), np.float32)
    patterns = contrast * coarse.repeat(4, axis=1).repeat(4, axis=2) + tint * tints
    count = num_training + num_validation
    labels = np.arange(count) % 10
    y, x = (np.arange(32) + generator.integers(16, size=(2, count, 1))) % 32
    images = patterns[labels[:, None, None], y[:, :, None], x[:, None, :]]  # (N, 32, 32, 3)
    images += 127 + 50 * generator.standard_normal(images.shape, np.float32)
    pool = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    rows = torch.arange(count)
    train_split, validation = (
        Split(all_images=pool, all_labels=torch.from_numpy(labels), rows=part)
        for part in (rows[:num_training], rows[num_training:])
    )
    return Dataset(
        name="made up",
        classes=tuple("0123456789"),
        train=train_split,
        validation=validation,
        test=validation,
        digest="0" * 32,
        source="benchmarks.gpu.made_up",
    )


# Checks: each takes a device, and raises an AssertionError that says what does not hold

Check = Callable[[str], None]


def run_checks(checks: Sequence[Check], device: str) -> list[str]:
    """Print a row for each check as it ends, and return those that fail."""
    wrong = []
    print("| check | | seconds |\n| --- | --- | --- |", flush=True)
    for check in checks:
        name = (check.__doc__ or check.__name__).split(".")[0]
        start = time.perf_counter()
        try:
            check(device)
            result = "holds"
        except Exception as error:  # whatever it is, the other checks are made
            result = f"does not hold: {' '.join(f'{type(error).__name__}: {error}'.split())}"
            wrong.append(name)
        print(f"| {name} | {result} | {time.perf_counter() - start:.1f} |", flush=True)
    return wrong


def small_data() -> Dataset:
    """Return what the checks train on; no even batch size divides it."""
    return made_up(130, 50, contrast=0, tint=50)


def small_config(device: str, **changes: str | float) -> TrainConfig:
    """Return what the checks train, but for `changes`."""
    fields = {"loss": "cross_entropy", "learning_rate": 0.01, "batch_size": 16, "epochs": 2}
    return TrainConfig(**{**fields, "device": device, **changes})  # type: ignore[arg-type]


def require(holds: bool, otherwise: str) -> None:
    """Raise an AssertionError if something does not hold, also under `python -O`."""
    if not holds:
        raise AssertionError(otherwise)


def measured(epoch: Epoch) -> dict[str, float]:
    """Return all that an epoch measured, but for times."""
    return {name: value for name, value in epoch.metrics().items() if "time/" not in name}


def digests(epochs: Iterable[Epoch]) -> Iterator[str]:
    """Yield a digest of each epoch: of what it measured, the network and the optimizer's state."""
    for epoch in epochs:
        digest = hashlib.sha256(repr(measured(epoch)).encode())
        for tensor in (*epoch.model.state_dict().values(), *epoch.optimizer.values()):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        yield digest.hexdigest()


def passed_on(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as it comes back from a file."""
    file = io.BytesIO()
    torch.save(vars(checkpoint), file)
    file.seek(0)
    return Checkpoint(**torch.load(file, weights_only=True, map_location="cpu"))


def check_batches(device: str) -> None:
    """Batches on the device are those on the CPU."""
    split = small_data().train
    positions = torch.tensor([7, 0, 129])
    found = split.to(device).batch(positions.to(device))
    for one, other in zip(found, split.batch(positions), strict=True):
        require(one.device.type == torch.device(device).type, f"they are on {one.device}")
        require(torch.equal(one.cpu(), other), "they differ")


def check_places(device: str) -> None:
    """Data, network and optimizer are on the device."""
    batch = Split.batch
    places: set[str] = set()

    def noted(split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (split.all_images, split.all_labels, split.rows, indices)
        places.update(tensor.device.type for tensor in tensors)
        return batch(split, indices)

    with patch.object(Split, "batch", noted):
        epoch = next(train(small_config(device), small_data()))
    tensors = (*epoch.model.parameters(), *epoch.optimizer.values())
    places.update(tensor.device.type for tensor in tensors)
    require(places == {torch.device(device).type}, f"they are on {sorted(places)}")


def check_losses(device: str) -> None:
    """Losses and their gradients are those of the CPU, the same bits each time."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, 10, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    for name, loss in LOSSES.items():
        results = []
        for place in ("cpu", device, device):
            there = outputs.to(place).requires_grad_()
            value = loss(there, labels.to(place))
            (gradient,) = torch.autograd.grad(value, there)
            results.append(torch.cat([value.detach()[None], gradient.flatten()]).cpu())
        expected, one, other = results
        require(torch.equal(one, other), f"{name} differs from time to time")
        require(torch.allclose(one, expected, rtol=1e-4, atol=1e-6), f"{name} differs")


def check_repeats(device: str) -> None:
    """Two trainings are the same bit for bit, with each optimizer in each precision."""
    for optimizer, precision in itertools.product(OPTIMIZERS, precisions(device)):
        config = small_config(device, optimizer=optimizer, precision=precision, epochs=1)
        one, other = (list(digests(train(config, small_data()))) for _ in range(2))
        require(one == other, f"{optimizer} in {precision} differs")


def check_resumes(device: str) -> None:
    """Training goes on from a checkpoint bit for bit, in each precision."""
    for precision in precisions(device):
        _require_resumes(small_config(device, precision=precision))


def _require_resumes(config: TrainConfig) -> None:
    first = passed_on(next(train(config, small_data())).checkpoint())
    expected = list(digests(train(config, small_data())))[1:]
    found = list(digests(train(config, small_data(), resume_from=first)))
    require(found == expected, f"it differs in {config.precision}")


def check_follows_the_cpu(device: str) -> None:
    """Training learns, along about the curve of the CPU in float32."""
    expected = [measured(epoch) for epoch in train(small_config("cpu", epochs=5), small_data())]
    for precision in precisions(device):
        epochs = train(small_config(device, precision=precision, epochs=5), small_data())
        for epoch, row in zip(epochs, expected, strict=True):
            for name, value in measured(epoch).items():
                require(
                    abs(value - row[name]) < 0.15,
                    f"{precision}, epoch {epoch.number}: {name} is {value}, there {row[name]}",
                )
        require(epoch.val_accuracy > 0.6, f"{precision}: {epoch.val_accuracy:.0%}")


def check_diverges(device: str) -> None:
    """Training that diverges says so."""
    for precision in precisions(device):
        config = small_config(device, precision=precision, learning_rate=1e4)
        require([epoch.diverged for epoch in train(config, small_data())] == [True], precision)


class Regularised(nn.Module):
    """A network that trains in another way than it predicts: batch normalisation and dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 5, padding=2)
        self.features = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(1024, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return outputs (N, K) of images (N, 32, 32, 3) uint8."""
        pixels = images.permute(0, 3, 1, 2).to(self.convolution.weight.dtype) / 127.5 - 1
        outputs: Tensor = self.head(self.features(self.convolution(pixels)))
        return outputs


def build_regularised(num_classes: int, *, seed: int) -> nn.Module:
    """Return such a network, the same for the same seed."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return Regularised(num_classes).to(memory_format=torch.channels_last)


def check_other_networks(device: str) -> None:
    """Dropout and batch normalisation: what is recorded is stored, repeats, and resumes."""
    with patch.object(training, "build_cnn", build_regularised):
        for precision in precisions(device):
            config = small_config(device, precision=precision)
            before = _generators(device)
            epoch = list(train(config, small_data()))[-1]
            require(torch.equal(before, _generators(device)), "a generator is not as it was")
            stored = Regularised(10)
            stored.load_state_dict(copy.deepcopy(epoch.model).cpu().state_dict())
            again = evaluate(stored, small_data().validation, LOSSES["cross_entropy"])
            recorded = epoch.val_accuracy
            # By rounding, two images may fall on the other side on another device.
            require(
                abs(again.accuracy - recorded) < 0.05,
                f"{precision}: {recorded:.1%} recorded, {again.accuracy:.1%} stored",
            )
            one = list(digests(train(config, small_data())))
            torch.manual_seed(5)  # of all devices
            require(one == list(digests(train(config, small_data()))), f"{precision} differs")
            _require_resumes(config)


def _generators(device: str) -> Tensor:
    states = [torch.get_rng_state()]
    if device != "cpu":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


CHECKS: tuple[Check, ...] = (
    check_batches,
    check_places,
    check_losses,
    check_repeats,
    check_resumes,
    check_follows_the_cpu,
    check_diverges,
    check_other_networks,
)


# Speed


def measure_speed(
    data: Dataset, device: str, batch_sizes: Sequence[int], until: float
) -> list[str]:
    """Print what was measured of each way at each batch size, and return what does not hold."""
    print("\n| batch size | way | images/s |\n| --- | --- | --- |", flush=True)
    ways = [TUTORIAL, *precisions(device)]
    rates: dict[tuple[int, str], list[float]] = {}
    ends: dict[tuple[int, str], set[str]] = {}
    for repeat in range(REPEATS):
        for batch_size, way in itertools.product(batch_sizes, ways):
            if repeat >= LEAST_REPEATS and time.perf_counter() > until:
                break
            rate, end = trained(way, data, device, batch_size)
            rates.setdefault((batch_size, way), []).append(rate)
            ends.setdefault((batch_size, way), set()).add(end)
            print(f"| {batch_size} | {way} | {rate:,.0f} |", flush=True)
    rows = []
    for (batch_size, way), measurements in rates.items():
        usual = statistics.median(rates[batch_size, TUTORIAL])
        ratio = statistics.median(measurements) / usual
        equal = "" if way == TUTORIAL else "no" if len(ends[batch_size, way]) > 1 else "yes"
        rows.append([str(batch_size), way, spread(measurements), f"{ratio:.1f}", equal])
    header = ["batch size", "way", "images/s", "ratio", "repeats end with the same bits"]
    print(f"\n{markdown(header, rows)}", flush=True)
    return [f"repeats differ: batch size {row[0]}, {row[1]}" for row in rows if row[4] == "no"]


def trained(way: str, data: Dataset, device: str, batch_size: int) -> tuple[float, str]:
    """Return the images a second of a training in some way, and a digest of where it ended."""
    rate = learning_rate(batch_size)
    if way == TUTORIAL:
        usual = tutorial(
            data.train,
            data.validation,
            num_classes=len(data.classes),
            batch_size=batch_size,
            learning_rate=rate,
            epochs=2,
            device=device,
        )
        return usual.images_per_second, ""
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
    """Return one at which training goes well."""
    return 0.01 * math.sqrt(batch_size / 64)


# Accuracy


def measure_accuracy(data: Dataset, device: str, batch_size: int, until: float) -> list[str]:
    """Print the accuracies in each precision and on the CPU, and return what does not hold."""
    print("\n| precision | device | seed | validation accuracy |\n| --- | --- | --- | --- |")
    base = ("float32", device)
    # The CPU last: it takes longest.
    trainings = [(way, seed) for seed in range(SEEDS) for way in _with(precisions(device), device)]
    if device != "cpu":
        trainings += [(("float32", "cpu"), seed) for seed in range(CPU_SEEDS)]
    accuracies: dict[tuple[str, str], list[float]] = {}
    for way, seed in trainings:
        if seed > 0 and time.perf_counter() > until:
            continue  # each way has a seed at least
        config = TrainConfig(
            loss="cross_entropy",
            learning_rate=learning_rate(batch_size),
            batch_size=batch_size,
            epochs=4,
            seed=seed,
            precision=way[0],
            device=way[1],
        )
        *_, epoch = train(config, data)
        accuracies.setdefault(way, []).append(epoch.val_accuracy)
        print(f"| {way[0]} | {way[1]} | {seed} | {epoch.val_accuracy:.2%} |", flush=True)
    rows, wrong = [], []
    for way, values in accuracies.items():
        differences = [100 * (v - b) for v, b in zip(values, accuracies[base], strict=False)]
        shown = "" if way == base else f"{statistics.mean(differences):+.2f} points "
        shown += "" if way == base else f"({min(differences):+.2f} to {max(differences):+.2f})"
        low, high = min(values), max(values)
        mean = f"{statistics.mean(values):.2%} ({low:.2%}–{high:.2%})"
        rows.append([*way, mean, shown, str(len(values))])
        if abs(statistics.mean(differences)) > 100 * TOLERANCE:
            wrong.append(f"accuracy of {' on '.join(way)} is another")
    header = ["precision", "device", "validation accuracy", f"to float32 on {device}", "n"]
    print(f"\n{markdown(header, rows)}", flush=True)
    return wrong


def _with(names: Sequence[str], device: str) -> list[tuple[str, str]]:
    return [(name, device) for name in names]


if __name__ == "__main__":
    sys.exit(main())
