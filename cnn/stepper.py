"""Training steps: a network, its optimizer and its schedule."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnn.config import PRECISIONS, TrainConfig
from cnn.losses import Loss, smoothed
from cnn.optimizers import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The state after an epoch, from which training resumes bit for bit.

    Image order, learning rate and dropout follow from the configuration and the epoch.
    """

    epoch: int
    """The last epoch in it."""
    model: Mapping[str, Tensor]
    """The network's `state_dict`: weights in float32, and its buffers."""
    optimizer: Mapping[str, Tensor]
    """The optimizer's state, by name."""


class Stepper:
    """A network, its optimizer and its schedule: takes one training step after another.

    All weights are views of one vector, and so are the gradients. So the optimizer makes one call,
    however many layers there are.

    Below float32, steps run on a copy of the network in that precision. The optimizer changes
    float32 weights, because small updates would be lost otherwise.
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.)
    """

    def __init__(self, model: nn.Module, loss: Loss, config: TrainConfig, *, steps: int) -> None:
        self.model, self.config = model, config
        self.loss = smoothed(loss, config.label_smoothing)
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
        """Restore the state of a checkpoint, made after this many steps."""
        self.step = step
        self.model.load_state_dict(checkpoint.model)
        for name, value in self.state.items():
            value.copy_(checkpoint.optimizer[name])
        if self.copied is not self.weights:
            self.copied.copy_(self.weights)
        for own, copied in self._copied_buffers():
            copied.copy_(own)

    def begin_epoch(self) -> None:
        """Switch to training mode."""
        self.model.train()
        self.network.train()

    def end_epoch(self) -> None:
        """Copy the buffers to the float32 model, and switch it to evaluation mode."""
        for own, copied in self._copied_buffers():
            # Values that the steps did not change are not rounded.
            own.copy_(torch.where(own.to(copied.dtype) == copied, own, copied.to(own.dtype)))
        self.model.eval()

    def _copied_buffers(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self.model.buffers(), self.network.buffers(), strict=True)
        return ((own, copied) for own, copied in pairs if own is not copied)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step on a batch, and return its loss () and outputs (N, K) before the step."""
        # The schedule's rate at the step's middle, which is never 0.
        progress = (self.step + 0.5) / self.steps
        self.learning_rate = self.config.learning_rate * self.schedule(progress, self.config.warmup)
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

    PyTorch normalises batches of lower precision by weights and statistics in float32. In lower
    precision, running means would lose small changes. (Micikevicius et al. 2018, section 3.)
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
    """Move weights into one vector, and make them views of it."""
    vector = torch.empty(
        sum(parameter.numel() for parameter in parameters),
        dtype=parameters[0].dtype,
        device=parameters[0].device,
    )
    for parameter, view in zip(parameters, _views(vector, parameters), strict=True):
        parameter.data = view.copy_(parameter)
    return vector


def _views(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return views that split a vector into the shapes and memory formats of parameters."""
    # "empty_like" gives dense strides, also for a parameter that is a part of a larger tensor.
    like = [torch.empty_like(parameter, device="meta") for parameter in parameters]
    ends = itertools.accumulate(each.numel() for each in like)
    return [
        vector.as_strided(each.shape, each.stride(), end - each.numel())
        for each, end in zip(like, ends, strict=True)
    ]
