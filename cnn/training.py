"""Train the CNN: a configuration and a data set in, an `Epoch` out after each epoch.

    for epoch in train(TrainConfig(loss="mse", learning_rate=0.1, batch_size=64), data):
        print(epoch.number, epoch.val_accuracy)

To stop early, stop iterating.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cnn.augmentation import Augmentation
from cnn.config import TrainConfig
from cnn.data import Dataset, Split
from cnn.losses import Loss, get_loss
from cnn.networks import build_network
from cnn.stepper import Checkpoint, Stepper

EVALUATION_BATCH_SIZE = 250  # fits a CPU's cache: 1.4 times as fast there as batches of 1,000
CHECK_EVERY = 50  # steps on a CPU between checks whether the losses are finite


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of a network on a split."""

    loss: float
    """Mean over the images; may be infinite or NaN."""
    accuracy: float
    """Share of the images whose largest output is that of their class, in 0 .. 1."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The results of an epoch of training."""

    number: int
    """1 is the first."""
    train_loss: float
    """Mean over the epoch's images, each measured during its training step."""
    train_accuracy: float
    """Share of the epoch's images predicted correctly, measured likewise."""
    val_loss: float
    """Mean over the validation split, with the weights after the epoch, in float32."""
    val_accuracy: float
    """Share of the validation split predicted correctly."""
    learning_rate: float
    """The rate of the epoch's last step."""
    seconds: float
    """Wall time of training and validation."""
    images_per_second: float
    """Training images per second of training time, without validation."""
    diverged: bool
    """A training or validation loss or a weight is not finite: this is the last epoch."""
    model: nn.Module = field(repr=False, compare=False)
    """The network, float32 and in evaluation mode. Later epochs change it."""
    optimizer: Mapping[str, Tensor] = field(repr=False, compare=False)
    """The optimizer's state. Later epochs change it."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their recorded names.

        MLflow shows groups of charts in alphabetical order: those that matter come first.
        """
        return {
            "train/loss": self.train_loss,
            "train/accuracy": self.train_accuracy,
            "val/loss": self.val_loss,
            "val/accuracy": self.val_accuracy,
            "train/learning_rate": self.learning_rate,
            "worker/epoch_seconds": self.seconds,
            "worker/images_per_second": self.images_per_second,
        }

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint of this epoch. It is valid until the next epoch is asked for."""
        return Checkpoint(
            epoch=self.number, model=self.model.state_dict(), optimizer=self.optimizer
        )


def train(
    config: TrainConfig, data: Dataset, *, resume_from: Checkpoint | None = None
) -> Iterator[Epoch]:
    """Train a new CNN on the training split and yield an `Epoch` after each epoch.

    The same configuration and data give the same epochs, bit for bit, on one machine with the same
    number of threads. Training that diverges yields that as its last epoch. It resumes from a
    checkpoint of the same configuration and data.

    Raises:
        ValueError: at the first epoch, the batch size is larger than the training split.
    """
    check_batch_size(config.batch_size, data)
    device = torch.device(config.device)
    training, validation = data.train.to(device), data.validation.to(device)
    loss = get_loss(config.loss)
    model = build_network(
        len(data.classes), seed=config.seed, name=config.network, image_size=data.image_size
    ).to(device)
    num_batches = math.ceil(len(training) / config.batch_size)
    stepper = Stepper(model, loss, config, steps=config.epochs * num_batches)
    never_finite = _not_finite(model)
    first = 1
    if resume_from is not None:
        first = resume_from.epoch + 1
        stepper.restore(resume_from, step=resume_from.epoch * num_batches)
    for number in range(first, config.epochs + 1):
        start = time.perf_counter()
        order = epoch_order(len(training), seed=config.seed, epoch=number).to(device)
        steps_seed, changes_seed = _epoch_seeds(config.seed, number)[1:]
        augmentation = Augmentation(
            config.augment, size=len(training), image_size=data.image_size, seed=changes_seed
        ).to(device)
        with _drawing_from(steps_seed, device):
            trained, num_images = _train_epoch(
                stepper, training, order, config.batch_size, augmentation
            )
        trained_at = time.perf_counter()
        validated = evaluate(model, validation, loss)
        losses_are_finite = math.isfinite(trained.loss) and math.isfinite(validated.loss)
        diverged = not (losses_are_finite and _not_finite(model) <= never_finite)
        yield Epoch(
            number=number,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            val_loss=validated.loss,
            val_accuracy=validated.accuracy,
            learning_rate=stepper.learning_rate,
            seconds=time.perf_counter() - start,
            images_per_second=num_images / (trained_at - start),
            diverged=diverged,
            model=model,
            optimizer=stepper.state,
        )
        if diverged:
            return


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, loss: Loss) -> Evaluation:
    """Return a network's mean loss and accuracy on a split on its device.

    It runs in evaluation mode, as a stored model predicts.
    """
    everything = torch.arange(len(split), device=split.rows.device)
    batches = _Batches(everything, EVALUATION_BATCH_SIZE)
    with _repeatable(), _in_evaluation_mode(model):
        for indices in batches:
            images, labels = split.batch(indices)
            outputs = model(images).float()
            batches.note(loss(outputs, labels), outputs, labels)
    return batches.evaluation()


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order (N,) int64 of the images in an epoch.

    It is drawn on the CPU and from the epoch's number, so it is the same on every device.
    """
    generator = torch.Generator().manual_seed(_epoch_seeds(seed, epoch)[0])
    return torch.randperm(num_images, generator=generator)


def check_batch_size(batch_size: int, data: Dataset) -> None:
    """Raise a `ValueError` if a batch would be larger than the training split."""
    if batch_size > len(data.train):
        raise ValueError(
            f"batch size {batch_size} is larger than the training split of {data.name}: "
            f"{len(data.train)} images"
        )


class _Batches:
    """The batches of some images, and their results.

    The results stay on the device, so that no step waits for them.
    """

    def __init__(self, order: Tensor, batch_size: int) -> None:
        self.indices = torch.split(order, batch_size)
        self.losses = torch.zeros(len(self.indices), device=order.device)
        self.correct = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        self.num_batches = self.num_images = 0

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.indices)

    def note(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Add the next batch's mean loss () and its outputs (N, K)."""
        end = self.num_images + len(labels)
        torch.eq(outputs.argmax(1), labels, out=self.correct[self.num_images : end])
        self.losses[self.num_batches] = loss
        self.num_batches, self.num_images = self.num_batches + 1, end

    def are_finite(self) -> bool:
        return bool(self.losses.isfinite().all())

    def evaluation(self) -> Evaluation:
        sizes = torch.tensor([len(each) for each in self.indices[: self.num_batches]])
        losses = self.losses[: self.num_batches].double().cpu()
        return Evaluation(
            loss=(losses @ sizes.double()).item() / self.num_images,
            accuracy=int(self.correct.count_nonzero()) / self.num_images,
        )


def _train_epoch(
    stepper: Stepper,
    training: Split,
    order: Tensor,
    batch_size: int,
    augmentation: Augmentation,
) -> tuple[Evaluation, int]:
    """Train on images in an order, and return the results and the number of images.

    It ends early if a loss is not finite.
    """
    batches = _Batches(order, batch_size)
    stepper.begin_epoch()
    with _repeatable():
        for step, indices in enumerate(batches, 1):
            images, labels = training.batch(indices)
            images = augmentation(images, batches.num_images)
            loss, outputs = stepper(images, labels)
            batches.note(loss, outputs, labels)
            # On a GPU, a check would wait for all steps, and an epoch is short.
            if order.device.type == "cpu" and step % CHECK_EVERY == 0 and not batches.are_finite():
                break
    stepper.end_epoch()
    return batches.evaluation(), batches.num_images


def _repeatable() -> AbstractContextManager[None]:
    """Make cuDNN repeat bit for bit. (Its float32 products use TF32.)"""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=True
    )
    return flags


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators in a block, and restore their state after it."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _epoch_seeds(seed: int, epoch: int) -> list[int]:
    """Return the seeds of an epoch's order, steps (dropout) and augmentation, in 0 .. 2⁶³ − 1."""
    return [int(n >> 1) for n in np.random.SeedSequence([seed, epoch]).generate_state(3, np.uint64)]


def _not_finite(model: nn.Module) -> set[str]:
    """Return the names of weights and buffers that are not finite, as a mask may always be."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name for name, tensor in tensors if not bool(tensor.isfinite().all())}
