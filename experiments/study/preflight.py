"""Try a user's networks and losses on a few images, before anything starts or is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.losses import LOSSES, PROBABILITIES, get_loss
from cnn.networks import NETWORKS, Classifier, build_network
from cnn.stepper import Stepper
from experiments.study.settings import Settings

NUM_IMAGES = 4


def check_trainable(settings: Settings, data: Dataset) -> None:
    """Try all networks and losses of a study that are not built in: see `check_configurations`."""
    space = settings.space()
    configs = [
        space.example(network=network, loss=loss)
        for network in space.values("network")
        for loss in space.values("loss")
    ]
    check_configurations(configs, data)


def check_configurations(configs: Sequence[TrainConfig], data: Dataset) -> None:
    """Try the networks and losses of configurations that are not built in.

    Raises:
        ValueError: one can't be built, trained or stored; in one line that says why.
    """
    losses = {config.loss: get_loss(config.loss) for config in configs}
    for name in losses:
        if name not in LOSSES:
            _check_loss(name, len(data.classes))
    images, labels = data.train.batch(torch.arange(min(NUM_IMAGES, len(data.train))))
    # One loss is enough to train a network: the others differ in what comes after its outputs.
    for config in {config.network: config for config in configs}.values():
        if config.network not in NETWORKS:
            network = _check_network(replace(config, device="cpu"), data, images, labels)
            for kind in {loss.outputs_to_probabilities for loss in losses.values()}:
                _check_storable(Classifier(network, PROBABILITIES[kind]), config.network, data)


def _check_network(config: TrainConfig, data: Dataset, images: Tensor, labels: Tensor) -> nn.Module:
    """Take a training step, and return the network; raise ValueError if it can't be trained."""
    name, num_classes = config.network, len(data.classes)
    what = f"network {name!r}"
    with _in_one_line(f"{what} can't be built for {num_classes} classes"):
        network, again = (
            build_network(num_classes, seed=0, name=name, image_size=data.image_size)
            for _ in range(2)
        )
    for (key, one), other in zip(
        network.state_dict().items(), again.state_dict().values(), strict=True
    ):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ValueError(
                f"{what} has other initial values of {key} when it is built again with the same "
                "seed: it must draw from PyTorch's generator only"
            )
    shape = (len(images), 3, data.image_size, data.image_size)
    with _in_one_line(f"{what} can't be applied to images {shape}"), torch.no_grad():
        outputs = network.eval()(images)
    if not isinstance(outputs, Tensor) or outputs.shape != (len(images), num_classes):
        found = (
            f"outputs {tuple(outputs.shape)}"
            if isinstance(outputs, Tensor)
            else type(outputs).__name__
        )
        raise ValueError(f"{what} returns {found}: it must return {(len(images), num_classes)}")
    if not outputs.isfinite().all():
        raise ValueError(f"{what} returns NaN or infinity with its initial weights")
    with _in_one_line(f"{what} can't be trained in {config.precision} (see --precision)"):
        stepper = Stepper(network, get_loss(config.loss), config, steps=2)
        stepper.begin_epoch()
        stepper(images, labels)
        stepper.end_epoch()
    return again.eval()


def _check_loss(name: str, num_classes: int) -> None:
    """Raise ValueError unless a loss is a finite scalar that depends on the outputs."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(NUM_IMAGES, num_classes, generator=generator, requires_grad=True)
    with _in_one_line(f"loss {name!r} can't be applied to outputs {tuple(outputs.shape)}"):
        value = get_loss(name)(outputs, torch.arange(NUM_IMAGES) % num_classes)
    if not value.requires_grad:
        raise ValueError(f"loss {name!r} has no gradient: it must depend on the outputs")
    with _in_one_line(f"loss {name!r} has no gradient"):
        (gradient,) = torch.autograd.grad(value, outputs)
    if not (value.isfinite() and gradient.isfinite().all()):
        raise ValueError(f"loss {name!r} or its gradient is NaN or infinite for normal outputs")


def _check_storable(model: Classifier, name: str, data: Dataset) -> None:
    from tracking.models.recording import check_storable

    model.network.to(memory_format=torch.contiguous_format)  # as it is recorded
    example = data.validation.batch(torch.arange(2))[0].numpy()
    with _in_one_line(f"network {name!r} can't be stored"):
        check_storable(model, example)


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Raise any error of a user's code as a ValueError of one line."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{message}") from error
