"""Estimate the cost of a stored graph before it runs: 500 bytes of graph can need terabytes.

The graph runs on PyTorch's device `meta`, which has shapes but no numbers: this takes milliseconds
and no memory. A step takes a core two nanoseconds at most (measured: 0.02 to 1.6).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.operator_schemas import normalize_function

MAX_BYTES, MAX_STEPS = 1 << 29, 2 * 10**10
"""Limits for two images: 0.5 GiB, and at most 40 seconds. A ResNet-50 for 224 × 224 pixels takes
half of both."""

BATCH_BYTES = 1 << 31
"""The memory of a batch. A larger one goes through the graph in parts."""

MAX_PARTS = 1_000
"""The tensors that one operator may split another one into."""

_MAX_SIZE = 1 << 62
"""Larger products of sizes would overflow; squared again and again they would fill the memory."""

_ELEMENT_STEPS, _SLOW_STEPS = 20, 10
"""Steps of an element that is read or written, and of a multiply-add that isn't float32."""

_BLOCK = 16
"""oneDNN rounds channels up to a multiple of this."""


def check_cost(graph: GraphModule, image_shape: tuple[int, ...]) -> None:
    """Run a graph on the shapes of two images (H, W, C).

    Raises ValueError if it takes more memory or time than is allowed, or changes its own weights. A
    graph that can't run raises errors of PyTorch.
    """
    _Meter(graph, max_bytes=MAX_BYTES, max_steps=MAX_STEPS).measure(2, image_shape)


def in_parts(graph: GraphModule, image_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return the graph; it splits batches that need more than `BATCH_BYTES`.

    One image can't be split: then it raises ValueError. A graph may take more for one than for two.
    """
    sizes = {0: 0, 2: 2}

    def largest(num_images: int) -> int:
        """Return how many images of a batch fit at once."""
        if num_images not in sizes:
            max_steps = MAX_STEPS * max(1, num_images / 2)
            meter = _Meter(graph, max_bytes=BATCH_BYTES, max_steps=max_steps)
            try:
                meter.measure(num_images, image_shape)
                sizes[num_images] = num_images
            except TooMuchError:
                if num_images == 1:
                    raise
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
        self.num_images = 0
        self.weights: list[tuple[str, Tensor]] = []

    def measure(self, num_images: int, image_shape: tuple[int, ...]) -> None:
        self.num_images = num_images
        # Tensors of the inference mode have no versions.
        with torch.inference_mode(mode=False), torch.no_grad():
            self.run(torch.empty(num_images, *image_shape, dtype=torch.uint8, device="meta"))
        for name, weight in self.weights:
            if weight._version:  # counts changes in place, of its views as well
                raise ValueError(
                    f"its graph changes its {name} whenever it predicts (eval() keeps the "
                    "statistics of BatchNorm as they are)"
                )

    def fetch_attr(self, target: str) -> Any:
        tensor = super().fetch_attr(target)
        weight = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )
        self.weights.append((target, weight))
        return weight

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts that the tensor is on the CPU
        if target is operator.mul:
            return _product_of_sizes(*args)
        if (count := _PARTS.get(target)) and count(**_named(target, args, kwargs)) > MAX_PARTS:
            raise TooMuchError(f"its graph splits a tensor into more than {MAX_PARTS:,} parts")
        args = tuple(_META if isinstance(arg, torch.device) else arg for arg in args)
        if target in _MAKERS or isinstance(kwargs.get("device"), torch.device):
            kwargs = kwargs | {"device": _META}
        result = super().call_function(target, args, kwargs)
        if target is not operator.getitem:
            self._count(target, args, kwargs, _listed(result))
        return result

    def _count(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]
    ) -> None:
        adds, scratch = 0, 0
        if cost := _COSTS.get(target):
            adds, scratch = cost(results[0], **_named(target, args, kwargs))
        given = [part for arg in (*args, *kwargs.values()) for part in _listed(arg)]
        elements = scratch + sum(tensor.numel() for tensor in (*results, *given))
        self.bytes += sum(result.numel() * result.itemsize for result in results)
        item = max((result.itemsize for result in results), default=4)
        self.scratch = max(self.scratch, scratch * max(4, item))
        is_fast = all(result.dtype == torch.float32 for result in results)
        self.steps += adds * (1 if is_fast else _SLOW_STEPS)
        self.steps += elements * _ELEMENT_STEPS
        if self.bytes + self.scratch > self.max_bytes:
            self._refuse(f"{self.max_bytes / 2**30:g} GiB of memory")
        if self.steps > self.max_steps:
            self._refuse(f"{self.max_steps:.0e} steps")

    def _refuse(self, limit: str) -> NoReturn:
        images = {1: "one image", 2: "two images"}.get(self.num_images, f"{self.num_images} images")
        raise TooMuchError(f"for {images}, its graph takes more than the {limit} that are allowed")


def _named(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name; `self` is called `input`."""
    named = normalize_function(target, args, kwargs, normalize_to_only_use_kwargs=True)
    assert named is not None
    return named.kwargs


def _product_of_sizes(*factors: object) -> int:
    """Return the product of two sizes: `*` of a text or a list could fill the memory."""
    if not all(type(factor) is int for factor in factors):
        raise ValueError(f"its graph multiplies {' by '.join(map(repr, factors))}, not two sizes")
    product = math.prod(factors)  # type: ignore[arg-type]
    if abs(product) > _MAX_SIZE:
        raise TooMuchError("its graph multiplies sizes to more than 2^62")
    return product


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


def _batch_product(result: Tensor, input: Tensor, mat2: Tensor) -> tuple[int, int]:  # noqa: A002
    return _matmul(result, input, mat2)


def _attention(
    result: Tensor, query: Tensor, key: Tensor, value: Tensor, **_: object
) -> tuple[int, int]:
    heads = math.prod(result.shape[:-2])
    scores = heads * query.shape[-2] * key.shape[-2]
    # The slow way makes the scores, masked ones, and their softmax, and repeats shared heads.
    operands = sum(heads * math.prod(part.shape[-2:]) for part in (query, key, value))
    return scores * (query.shape[-1] + value.shape[-1]), 4 * scores + operands


def _pool(result: Tensor, kernel_size: list[int], **_: object) -> tuple[int, int]:
    sides = kernel_size * (2 // len(kernel_size))
    return result.numel() * math.prod(sides), 0


_aten = torch.ops.aten
_COSTS: dict[Any, Callable[..., tuple[int, int]]] = {
    _aten.conv2d.default: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.bmm.default: _batch_product,
    _aten.mm.default: _batch_product,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.max_pool2d.default: _pool,
    _aten.avg_pool2d.default: _pool,
}

_META = torch.device("meta")
_MAKERS = {
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.full.default,
    _aten.ones.default, _aten.zeros.default,
}  # fmt: skip
"""Operators that make a tensor of none: on the CPU, unless they are told."""


# For an operator that splits a tensor: the number of its parts. PyTorch makes a tensor of each.


def _num_chunks(input: Tensor, chunks: int, dim: int = 0) -> int:  # noqa: A002
    return min(chunks, input.shape[dim])


def _num_split(input: Tensor, split_size: int, dim: int = 0) -> int:  # noqa: A002
    return -(-input.shape[dim] // max(1, split_size))


def _num_of_sizes(split_sizes: list[int], **_: object) -> int:
    return len(split_sizes)


def _num_unbound(input: Tensor, dim: int = 0) -> int:  # noqa: A002
    return input.shape[dim]


_PARTS: dict[Any, Callable[..., int]] = {
    _aten.chunk.default: _num_chunks,
    _aten.split.Tensor: _num_split,
    _aten.split_with_sizes.default: _num_of_sizes,
    _aten.unbind.int: _num_unbound,
}
