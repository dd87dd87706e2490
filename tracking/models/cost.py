"""Estimate the cost of a stored graph before it runs: 500 bytes of graph can need terabytes.

The graph runs on PyTorch's device `meta`, which has shapes but no numbers: this takes milliseconds
and no memory. A step takes a core two nanoseconds at most (measured: 0.02 to 1.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.operator_schemas import normalize_function

MAX_BYTES, MAX_STEPS = 1 << 29, 2 * 10**10
"""Limits for two images: 0.5 GiB, and at most 40 seconds. A ResNet-50 for 224 × 224 pixels takes
half of both."""

BATCH_BYTES = 1 << 31
"""The memory of a batch. A larger one goes through the graph in parts."""

_ELEMENT_STEPS, _SLOW_STEPS = 20, 10
"""Steps of an element that is read or written, and of a multiply-add that isn't float32."""

_BLOCK = 16
"""oneDNN rounds channels up to a multiple of this."""


def check_cost(graph: GraphModule, image_shape: tuple[int, ...]) -> None:
    """Run a graph on the shapes of two images (H, W, C).

    Raises ValueError if it takes more memory or time than is allowed. A graph that can't run raises
    errors of PyTorch.
    """
    _Meter(graph, max_bytes=MAX_BYTES, max_steps=MAX_STEPS).measure(2, image_shape)


def in_parts(graph: GraphModule, image_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return the graph; it splits batches that need more than `BATCH_BYTES`."""
    sizes: dict[int, int] = {}

    def largest(num_images: int) -> int:
        """Return how many images of a batch fit at once."""
        if num_images <= 2:
            return num_images
        if num_images not in sizes:
            try:
                _Meter(graph, max_bytes=BATCH_BYTES).measure(num_images, image_shape)
                sizes[num_images] = num_images
            except TooMuchError:
                sizes[num_images] = largest(num_images // 2)
        return sizes[num_images]

    def run(images: Tensor) -> Tensor:
        size = largest(len(images))
        if size == len(images):
            return graph(images)  # type: ignore[no-any-return]
        return torch.cat([graph(part) for part in torch.split(images, size)])

    return run


class TooMuchError(ValueError):
    """A graph takes more memory or time than is allowed."""


class _Meter(Interpreter):
    """Runs a graph on the device `meta`, and counts bytes and steps up to the limits."""

    def __init__(self, graph: GraphModule, *, max_bytes: int, max_steps: float = math.inf) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.max_bytes, self.max_steps = max_bytes, max_steps
        self.bytes = self.scratch = self.steps = 0

    def measure(self, num_images: int, image_shape: tuple[int, ...]) -> None:
        images = torch.empty(num_images, *image_shape, dtype=torch.uint8, device="meta")
        with torch.no_grad():
            self.run(images)

    def fetch_attr(self, target: str) -> Any:
        tensor = super().fetch_attr(target)
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts that the tensor is on the CPU
        result = super().call_function(target, args, kwargs)
        if isinstance(result, Tensor):
            self._count(target, args, kwargs, result)
        return result

    def _count(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        adds, scratch = 0, 0
        if cost := _COSTS.get(target):
            named = normalize_function(target, args, kwargs, normalize_to_only_use_kwargs=True)
            assert named is not None
            adds, scratch = cost(result, **named.kwargs)
        given = [part for arg in (*args, *kwargs.values()) for part in _listed(arg)]
        elements = scratch + sum(tensor.numel() for tensor in (result, *given))
        self.bytes += result.numel() * result.itemsize
        self.scratch = max(self.scratch, scratch * max(4, result.itemsize))
        self.steps += adds * (1 if result.dtype == torch.float32 else _SLOW_STEPS)
        self.steps += elements * _ELEMENT_STEPS
        if self.bytes + self.scratch > self.max_bytes:
            raise TooMuchError(
                f"for two images, its graph takes more than the {self.max_bytes / 2**30:g} GiB of "
                "memory that are allowed"
            )
        if self.steps > self.max_steps:
            raise TooMuchError(
                f"for two images, its graph takes more than the {self.max_steps:.0e} steps that "
                "are allowed"
            )


def _listed(arg: object) -> list[Tensor]:
    parts = arg if isinstance(arg, (list, tuple)) else [arg]
    return [part for part in parts if isinstance(part, Tensor)]


# For an operator: its multiply-adds, and the elements of its temporary memory


def _convolution(result: Tensor, input: Tensor, weight: Tensor, **_: object) -> tuple[int, int]:  # noqa: A002
    outputs, channels = weight.shape[:2]
    pixels = result.numel() // outputs
    groups = input.shape[-3] // channels
    columns = pixels * math.prod(weight.shape[1:]) * groups
    blocked = sum(
        tensor.numel() // tensor.shape[-3] * -(-tensor.shape[-3] // _BLOCK) * _BLOCK
        for tensor in (input, result)
    )
    return result.numel() * math.prod(weight.shape[1:]), columns + blocked


def _linear(result: Tensor, input: Tensor, **_: object) -> tuple[int, int]:  # noqa: A002
    return result.numel() * input.shape[-1], input.numel()


def _matmul(result: Tensor, input: Tensor, other: Tensor) -> tuple[int, int]:  # noqa: A002
    batch = math.prod(result.shape[:-2])
    operands = sum(batch * math.prod(tensor.shape[-2:]) for tensor in (input, other))
    return result.numel() * input.shape[-1], operands


def _pool(result: Tensor, kernel_size: list[int], **_: object) -> tuple[int, int]:
    sides = kernel_size * (2 // len(kernel_size))
    return result.numel() * math.prod(sides), 0


_aten = torch.ops.aten
_COSTS: dict[Any, Callable[..., tuple[int, int]]] = {
    _aten.conv2d.default: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.max_pool2d.default: _pool,
    _aten.avg_pool2d.default: _pool,
}
