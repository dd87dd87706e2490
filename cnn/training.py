"""Train the CNN: a configuration and a data set in, an `Epoch` out after each epoch.

    for epoch in train(TrainConfig(loss="mse", learning_rate=0.1, batch_size=64), data):
        print(epoch.number, epoch.val_accuracy)

The loop knows nothing of who watches it; to stop early is to stop iterating.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cnn.config import PRECISIONS, TrainConfig
from cnn.data import Dataset, Split
from cnn.losses import Loss, get_loss
from cnn.networks import build_cnn
from cnn.optimizers import OPTIMIZERS, SCHEDULES

EVALUATION_BATCH_SIZE = 250
"""What a CPU's cache holds: 1.4 times as fast there as batches of 1,000."""
CHECK_EVERY = 50
"""After so many steps on a CPU, a loss that is not finite ends the epoch."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network does on a split."""

    loss: float
    """Mean over the images; may be infinite or NaN."""
    accuracy: float
    """Share of the images whose largest output is that of their class, 0 to 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """All that it takes to go on after an epoch as if nothing had happened, bit for bit.

    The order of the images, the learning rate and what dropout draws follow from the configuration
    and the epoch.
    """

    epoch: int
    """The last that is in it."""
    model: Mapping[str, Tensor]
    """The network's `state_dict`: weights in float32, and its buffers."""
    optimizer: Mapping[str, Tensor]
    """The optimizer's state, by name."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch of training came to."""

    number: int
    """1 is the first."""
    train_loss: float
    """Mean over the epoch's images, each measured as its batch was trained on."""
    train_accuracy: float
    """Share of the epoch's images labelled right, each as its batch was trained on."""
    val_loss: float
    """Mean over the validation split, with the weights at the epoch's end, in float32."""
    val_accuracy: float
    """Share of the validation split labelled right, likewise."""
    learning_rate: float
    """That of the epoch's last step."""
    seconds: float
    """Wall time of training and validation."""
    images_per_second: float
    """Training images a second of training time, validation left out."""
    diverged: bool
    """A loss, of training or validation, or a weight is not finite: this is the last epoch."""
    model: nn.Module = field(repr=False, compare=False)
    """The network itself, float32 and in evaluation mode: what was validated, and is to be stored.

    It goes on changing if the iteration goes on.
    """
    optimizer: Mapping[str, Tensor] = field(repr=False, compare=False)
    """The optimizer's state, likewise."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by the names under which they are logged."""
        return {
            "train/loss": self.train_loss,
            "train/accuracy": self.train_accuracy,
            "val/loss": self.val_loss,
            "val/accuracy": self.val_accuracy,
            "learning_rate": self.learning_rate,
            "time/epoch_seconds": self.seconds,
            "time/images_per_second": self.images_per_second,
        }

    def checkpoint(self) -> Checkpoint:
        """Return what it takes to go on after this epoch; good until the iteration goes on."""
        return Checkpoint(
            epoch=self.number,
            model=self.model.state_dict(),
            optimizer=self.optimizer,
        )


def train(
    config: TrainConfig, data: Dataset, *, after: Checkpoint | None = None
) -> Iterator[Epoch]:
    """Train a new CNN on the training split and yield an `Epoch` after each epoch.

    The same configuration and data give the same epochs, bit for bit, on one machine with the same
    number of threads. Training that diverges yields a last epoch that says so.

    Args:
        config: all that determines the training, but for the data.
        data: its training and validation splits are used.
        after: a checkpoint of the same configuration and data, to go on from.

    Raises:
        ValueError: at the first epoch, the batch size is larger than the training split.
    """
    check_batch_size(config.batch_size, data)
    device = torch.device(config.device)
    training, validation = data.train.to(device), data.validation.to(device)
    loss = get_loss(config.loss)
    model = build_cnn(len(data.classes), seed=config.seed).to(device)
    num_batches = math.ceil(len(training) / config.batch_size)
    stepper = _Stepper(model, loss, config, steps=config.epochs * num_batches)
    never_finite = _not_finite(model)
    first = 1
    if after is not None:
        first = after.epoch + 1
        stepper.restore(after, step=after.epoch * num_batches)
    for number in range(first, config.epochs + 1):
        start = time.perf_counter()
        order = epoch_order(len(training), seed=config.seed, epoch=number).to(device)
        with _drawing_from(_epoch_seeds(config.seed, number)[1], device):
            trained, num_images = _train_epoch(stepper, training, order, config.batch_size)
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
    """Return a network's mean loss and accuracy on a split, which is on the network's device.

    It is evaluated as a stored model predicts: in evaluation mode, whatever mode it is in.
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
    """Return the order (N,) int64 in which an epoch takes the images: a function of its number.

    Drawn on the CPU, so that it is the same on every device, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(_epoch_seeds(seed, epoch)[0])
    return torch.randperm(num_images, generator=generator)


def check_batch_size(batch_size: int, data: Dataset) -> None:
    """Raise a `ValueError` where a batch would be larger than the training split."""
    if batch_size > len(data.train):
        raise ValueError(
            f"batch size {batch_size} is larger than the training split of {data.name}: "
            f"{len(data.train)} images"
        )


class _Stepper:
    """A network, its optimizer and its schedule: one training step after another.

    All weights lie in one vector, of which the network's are views, and so do their gradients: the
    optimizer makes one call, whatever the number of layers.

    Below float32, the steps are taken on a copy of the network in that precision, while the
    weights that the optimizer changes stay in float32: small updates would be lost otherwise.
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.)
    """

    def __init__(self, model: nn.Module, loss: Loss, config: TrainConfig, *, steps: int) -> None:
        self.model, self.loss, self.config = model, loss, config
        self.learning_rate = 0.0
        self.schedule = SCHEDULES[config.schedule]
        self.steps, self.step = steps, 0
        dtype = PRECISIONS[config.precision]
        weights = _trained(model)
        self.weights = _in_one_vector(weights)
        self.weights.grad = torch.zeros_like(self.weights)
        if dtype == torch.float32:
            self.network, self.copied, self.parameters = model, self.weights, weights
        else:
            self.network, self.copied = _copy_of(model, dtype), self.weights.to(dtype)
            self.parameters = _trained(self.network)
            views = _views(self.copied, weights)
            for weight, parameter, view in zip(weights, self.parameters, views, strict=True):
                if parameter is not weight:
                    parameter.data = view
        self.gradients = _views(self.weights.grad, weights)
        self.update, shapes = OPTIMIZERS[config.optimizer]
        self.state = {
            name: torch.zeros_like(self.weights if shape == "weights" else self.weights[0])
            for name, shape in shapes.items()
        }

    def restore(self, checkpoint: Checkpoint, *, step: int) -> None:
        """Be as after this many steps, when the checkpoint was made."""
        self.step = step
        self.model.load_state_dict(checkpoint.model)
        for name, value in self.state.items():
            value.copy_(checkpoint.optimizer[name])
        if self.copied is not self.weights:
            self.copied.copy_(self.weights)
        for own, copied in self._copied_buffers():
            copied.copy_(own)

    def begin_epoch(self) -> None:
        """Have the network learn: dropout drops, and batch normalisation takes the batch's."""
        self.model.train()
        self.network.train()

    def end_epoch(self) -> None:
        """Have the model be what the epoch's steps made of it, as it predicts."""
        for own, copied in self._copied_buffers():
            # What the steps left alone is not rounded.
            own.copy_(torch.where(own.to(copied.dtype) == copied, own, copied.to(own.dtype)))
        self.model.eval()

    def _copied_buffers(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self.model.buffers(), self.network.buffers(), strict=True)
        return ((own, copied) for own, copied in pairs if own is not copied)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step on a batch, and return its loss () and outputs (N, K) before the step."""
        # The rate of a step is the schedule's at the step's middle: never 0, not even with one.
        progress = (self.step + 0.5) / self.steps
        self.learning_rate = self.config.learning_rate * self.schedule(progress)
        self.step += 1
        outputs = self.network(images).float()
        loss = self.loss(outputs, labels)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, gradients)
            self.update(
                self.weights,
                self.state,
                learning_rate=self.learning_rate,
                momentum=self.config.momentum,
                weight_decay=self.config.weight_decay,
            )
            if self.copied is not self.weights:
                self.copied.copy_(self.weights)
        return loss.detach(), outputs.detach()


def _trained(network: nn.Module) -> list[Tensor]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def _copy_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network in a lower precision, which shares its batch normalisation.

    PyTorch normalises batches of lower precision by weights and statistics in float32, and running
    means would not hear of small changes in any other. (Micikevicius et al. 2018, section 3.)
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    shared = {id(module): module for module in model.modules() if isinstance(module, norms)}
    network = copy.deepcopy(model, dict(shared))
    for module in network.modules():
        if id(module) not in shared:
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return network


@torch.no_grad()
def _in_one_vector(parameters: Sequence[Tensor]) -> Tensor:
    """Move weights into one vector, of which they become views."""
    vector = torch.empty(
        sum(parameter.numel() for parameter in parameters),
        dtype=parameters[0].dtype,
        device=parameters[0].device,
    )
    for parameter, view in zip(parameters, _views(vector, parameters), strict=True):
        parameter.data = view.copy_(parameter)
    return vector


def _views(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return parts of a vector in the shapes and memory formats of parameters, which fill it."""
    # Of a parameter that is a part of a larger tensor, "empty_like" has strides without gaps.
    like = [torch.empty_like(parameter, device="meta") for parameter in parameters]
    ends = itertools.accumulate(each.numel() for each in like)
    return [
        vector.as_strided(each.shape, each.stride(), end - each.numel())
        for each, end in zip(like, ends, strict=True)
    ]


class _Batches:
    """The batches of some images, and what came of each.

    What came of them is kept on the device: nothing waits for it until it is asked for.
    """

    def __init__(self, order: Tensor, batch_size: int) -> None:
        self.indices = torch.split(order, batch_size)
        self.losses = torch.zeros(len(self.indices), device=order.device)
        self.correct = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        self.num_batches = self.num_images = 0

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.indices)

    def note(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Note of the next batch its mean loss () and its outputs (N, K)."""
        end = self.num_images + len(labels)
        torch.eq(outputs.argmax(1), labels, out=self.correct[self.num_images : end])
        self.losses[self.num_batches] = loss
        self.num_batches, self.num_images = self.num_batches + 1, end

    def are_finite(self) -> bool:
        return bool(self.losses.isfinite().all())

    def evaluation(self) -> Evaluation:
        """Return what came of all images so far."""
        sizes = torch.tensor([len(each) for each in self.indices[: self.num_batches]])
        losses = self.losses[: self.num_batches].double().cpu()
        return Evaluation(
            loss=(losses @ sizes.double()).item() / self.num_images,
            accuracy=int(self.correct.count_nonzero()) / self.num_images,
        )


def _train_epoch(
    stepper: _Stepper, training: Split, order: Tensor, batch_size: int
) -> tuple[Evaluation, int]:
    """Train on images in an order, and return what came of them, and how many they were.

    Training whose loss is not finite any more ends before the last of them.
    """
    batches = _Batches(order, batch_size)
    stepper.begin_epoch()
    with _repeatable():
        for step, indices in enumerate(batches, 1):
            images, labels = training.batch(indices)
            loss, outputs = stepper(images, labels)
            batches.note(loss, outputs, labels)
            # On a GPU, to look would be to wait for it: an epoch there is over soon.
            if order.device.type == "cpu" and step % CHECK_EVERY == 0 and not batches.are_finite():
                break
    stepper.end_epoch()
    return batches.evaluation(), batches.num_images


def _repeatable() -> AbstractContextManager[None]:
    """Have cuDNN take what repeats bit for bit. (Its float32 products are TF32's.)"""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=True
    )
    return flags


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Have what draws from PyTorch's generators draw from a seed; then they are as they were."""
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


def _epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Return the seeds of an epoch's order and of what its steps draw, in 0 .. 2⁶³ − 1."""
    order, steps = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    return int(order >> 1), int(steps >> 1)


def _not_finite(model: nn.Module) -> set[str]:
    """Return the names of weights and buffers that are not finite, as a mask may always be."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name for name, tensor in tensors if not bool(tensor.isfinite().all())}
