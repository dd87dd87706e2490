"""The optimizers, and the schedules of their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


def one_cycle(progress: float, warmup: float = 0.3) -> float:
    """Return the share of the peak learning rate at `progress` in (0, 1) through the training.

    It rises from 1/25 to 1 in the warm-up, then falls to 0.000004, along half cosines. That is
    `torch.optim.lr_scheduler.OneCycleLR` with its defaults, without cycled momentum and without its
    edge cases at one or two steps. (Smith and Topin 2018, arXiv:1708.07120.)
    """
    start, end = 1 / 25, 1 / 25e4
    if progress < warmup:
        return _half_cosine(start, 1.0, progress / warmup)
    return _half_cosine(1.0, end, (progress - warmup) / (1 - warmup))


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Rise linearly in the warm-up, then fall from 1 to 0 along half a cosine.

    Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5; warm-up of Goyal et al. 2017,
    arXiv:1706.02677, section 2.2.
    """
    if progress < warmup:
        return progress / warmup
    return _half_cosine(1.0, 0.0, (progress - warmup) / (1 - warmup))


def constant(progress: float, warmup: float = 0.0) -> float:
    """Rise linearly in the warm-up, then stay at 1."""
    return progress / warmup if progress < warmup else 1.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}

WARMUP = {"one_cycle": 0.3, "cosine": 0.0, "constant": 0.0}
"""The share of the steps in each schedule's warm-up, unless told."""


State = Mapping[str, Tensor]

Update = Callable[..., None]
"""One step: changes weights (P,) in place, with the signature of `_sgd`."""


def _sgd(
    weights: Tensor, state: State, *, learning_rate: float, momentum: float, weight_decay: float
) -> None:
    assert weights.grad is not None
    sgd(
        [weights],
        [weights.grad],
        [state["momentum"]] if momentum else [None],
        fused=True,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=learning_rate,
        dampening=0,
        nesterov=momentum > 0,
        maximize=False,
    )


def _adam(
    weights: Tensor,
    state: State,
    *,
    learning_rate: float,
    momentum: float,  # noqa: ARG001 - the signature of all optimizers
    weight_decay: float,
    decoupled: bool = False,
) -> None:
    assert weights.grad is not None
    adam(
        [weights],
        [weights.grad],
        [state["mean"]],
        [state["mean_square"]],
        [],
        [state["step"]],
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
        decoupled_weight_decay=decoupled,
    )


# Each optimizer, and the shapes of its state's tensors, which start as zeros. These are PyTorch's
# functions, not its classes: the first object of a class imports PyTorch's compiler, which takes a
# second at each worker's start.
OPTIMIZERS: dict[str, tuple[Update, Mapping[str, str]]] = {
    "sgd": (_sgd, {"momentum": "weights"}),
    "adam": (_adam, {"mean": "weights", "mean_square": "weights", "step": "scalar"}),
    "adamw": (
        partial(_adam, decoupled=True),
        {"mean": "weights", "mean_square": "weights", "step": "scalar"},
    ),
}


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
