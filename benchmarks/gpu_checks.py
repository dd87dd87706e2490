"""What training promises on any device, as checks: for `benchmarks.gpu` and the tests marked `gpu`.

They need PyTorch and NumPy, nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import made_up
from cnn import training
from cnn.config import PRECISIONS, TrainConfig
from cnn.data import Dataset, Split
from cnn.devices import resolve_precision
from cnn.losses import LOSSES
from cnn.optimizers import OPTIMIZERS
from cnn.stepper import Checkpoint
from cnn.training import Epoch, evaluate, train

Check = Callable[[str], None]
"""It takes a device, and raises an AssertionError that says what does not hold."""


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
        except Exception as error:  # any error: the other checks are made
            result = f"does not hold: {' '.join(f'{type(error).__name__}: {error}'.split())}"
            wrong.append(name)
        print(f"| {name} | {result} | {time.perf_counter() - start:.1f} |", flush=True)
    return wrong


def precisions(device: str) -> list[str]:
    """Return the precisions to check: bfloat16 only where the GPU has it, not an emulation."""
    has_bfloat16 = device == "cpu" or resolve_precision("auto", device) == "bfloat16"
    return list(PRECISIONS) if has_bfloat16 else ["float32"]


def small_data() -> Dataset:
    """Return the images that the checks train on; no even batch size divides their number."""
    return made_up(130, 50, contrast=0, tint=50)


def small_config(device: str, **changes: str | float) -> TrainConfig:
    """Return the configuration that the checks train, with changes."""
    fields = {"loss": "cross_entropy", "learning_rate": 0.01, "batch_size": 16, "epochs": 2}
    return TrainConfig(**{**fields, "device": device, **changes})  # type: ignore[arg-type]


def require(holds: bool, otherwise: str) -> None:
    """Raise an AssertionError unless something holds, also under `python -O`."""
    if not holds:
        raise AssertionError(otherwise)


def measured(epoch: Epoch) -> dict[str, float]:
    """Return all that an epoch measured, without times."""
    return {name: value for name, value in epoch.metrics().items() if "worker/" not in name}


def digests(epochs: Iterable[Epoch]) -> Iterator[str]:
    """Yield a digest of each epoch: of what it measured, the network and the optimizer's state."""
    for epoch in epochs:
        digest = hashlib.sha256(repr(measured(epoch)).encode())
        for tensor in (*epoch.model.state_dict().values(), *epoch.optimizer.values()):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        yield digest.hexdigest()


def written_and_read(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as it is after it was written to a file and read."""
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


def check_devices(device: str) -> None:
    """Data, network and optimizer are on the device."""
    batch = Split.batch
    devices: set[str] = set()

    def noted(split: Split, indices: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (split.all_images, split.all_labels, split.rows, indices)
        devices.update(tensor.device.type for tensor in tensors)
        return batch(split, indices)

    with patch.object(Split, "batch", noted):
        epoch = next(train(small_config(device), small_data()))
    tensors = (*epoch.model.parameters(), *epoch.optimizer.values())
    devices.update(tensor.device.type for tensor in tensors)
    require(devices == {torch.device(device).type}, f"they are on {sorted(devices)}")


def check_losses(device: str) -> None:
    """Losses and their gradients are those of the CPU, and the same bits each time."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, 10, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    for name, loss in LOSSES.items():
        results = []
        for where in ("cpu", device, device):
            logits = outputs.to(where).requires_grad_()
            value = loss(logits, labels.to(where))
            (gradient,) = torch.autograd.grad(value, logits)
            results.append(torch.cat([value.detach()[None], gradient.flatten()]).cpu())
        expected, one, other = results
        require(torch.equal(one, other), f"{name} differs between two calls")
        require(torch.allclose(one, expected, rtol=1e-4, atol=1e-6), f"{name} differs")


def check_repeats(device: str) -> None:
    """Two trainings are equal bit for bit, with each optimizer in each precision."""
    for optimizer, precision in itertools.product(OPTIMIZERS, precisions(device)):
        config = small_config(device, optimizer=optimizer, precision=precision, epochs=1)
        one, other = (list(digests(train(config, small_data()))) for _ in range(2))
        require(one == other, f"{optimizer} in {precision} differs")


def check_resumes(device: str) -> None:
    """Training resumes from a checkpoint bit for bit, in each precision."""
    for precision in precisions(device):
        _require_resumes(small_config(device, precision=precision))


def _require_resumes(config: TrainConfig) -> None:
    first = written_and_read(next(train(config, small_data())).checkpoint())
    expected = list(digests(train(config, small_data())))[1:]
    found = list(digests(train(config, small_data(), resume_from=first)))
    require(found == expected, f"it differs in {config.precision}")


def check_follows_the_cpu(device: str) -> None:
    """Training learns, with about the learning curve of the CPU in float32."""
    expected = [measured(epoch) for epoch in train(small_config("cpu", epochs=5), small_data())]
    for precision in precisions(device):
        epochs = train(small_config(device, precision=precision, epochs=5), small_data())
        for epoch, row in zip(epochs, expected, strict=True):
            for name, value in measured(epoch).items():
                require(
                    abs(value - row[name]) < 0.15,
                    f"{precision}, epoch {epoch.number}: {name} is {value}, on the CPU {row[name]}",
                )
        require(epoch.val_accuracy > 0.6, f"{precision}: {epoch.val_accuracy:.0%}")


def check_diverges(device: str) -> None:
    """Training that diverges says so."""
    for precision in precisions(device):
        config = small_config(device, precision=precision, learning_rate=1e4)
        require([epoch.diverged for epoch in train(config, small_data())] == [True], precision)


class Regularised(nn.Module):
    """A network that is not the same in training and prediction: batch normalisation, dropout."""

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


def build_regularised(num_classes: int, *, seed: int, **_: object) -> nn.Module:
    """Return the network above, the same for the same seed."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return Regularised(num_classes).to(memory_format=torch.channels_last)


def check_other_networks(device: str) -> None:
    """Dropout and batch normalisation: what is recorded is stored, repeats, and resumes."""
    with patch.object(training, "build_network", build_regularised):
        for precision in precisions(device):
            config = small_config(device, precision=precision)
            before = _generators(device)
            epoch = list(train(config, small_data()))[-1]
            require(
                torch.equal(before, _generators(device)), "the state of a random generator changed"
            )
            stored = Regularised(10)
            stored.load_state_dict(copy.deepcopy(epoch.model).cpu().state_dict())
            again = evaluate(stored, small_data().validation, LOSSES["cross_entropy"])
            recorded = epoch.val_accuracy
            # Rounding differs between devices: two images may be predicted otherwise.
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
    check_devices,
    check_losses,
    check_repeats,
    check_resumes,
    check_follows_the_cpu,
    check_diverges,
    check_other_networks,
)
