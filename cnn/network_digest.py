"""A digest of a network: what it computes, not how its code is written."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name


def network_digest(network: nn.Module, *, image_shape: tuple[int, int, int] = (32, 32, 3)) -> str:
    """Return 32 hex digits that change when a network changes. Take them from a new network.

    They cover the PyTorch calls of a forward pass in training and in evaluation mode, with shapes
    and constants. They also cover names, shapes, types and `requires_grad` of the weights, and the
    contents of the buffers, but not the weights' values. The network takes images (N, H, W, C)
    uint8, on any device, and is not changed.

    The calls are those of the network's source (`conv2d`, `batch_norm`, `/`), not the operators
    of a device. So all devices give the same digest, and so do PyTorch versions whose layers make
    the same calls.
    """
    network = copy.deepcopy(network).cpu()
    calls = _Calls(network)
    size = 2 * image_shape[0] * image_shape[1] * image_shape[2]
    images = (torch.arange(size) % 251).to(torch.uint8).reshape(2, *image_shape)
    calls.name(images, "images")
    # Dropout draws from the global generator.
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        for is_training in (True, False):
            network.train(is_training)
            with calls:
                outputs = network(images)
            calls.lines.append(f"training {is_training}: {calls.described(outputs)}")
    return hashlib.sha256("\n".join(calls.lines).encode()).hexdigest()[:32]


class _Calls(TorchFunctionMode):
    """Records the calls of PyTorch, a line each: tensors by name, all else by value."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.kept: list[Tensor] = []  # a deleted tensor's id could be reused
        for name, weight in network.named_parameters(remove_duplicate=False):
            shown = f"{_kind(weight)} trained {weight.requires_grad}"
            self.lines.append(f"weight {name}: {self.names.get(id(weight), shown)}")
            self.name(weight, f"weight {name}")
        for name, buffer in network.named_buffers(remove_duplicate=False):
            self.lines.append(f"buffer {name}: {_kind(buffer)} {_content(buffer)}")
            self.name(buffer, f"buffer {name}")

    def name(self, tensor: Tensor, name: str) -> None:
        self.names[id(tensor)] = name
        self.kept.append(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        called = f"{_function_name(func)} {self.described(args)} {self.described(kwargs)}"
        result = func(*args, **kwargs)
        # An assignment to a slice returns None. A size or a type matters only as an argument.
        parts = result if isinstance(result, tuple | list) else [result]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if result is None or tensors:
            self.lines.append(f"{called} -> {[_kind(tensor) for tensor in tensors]}")
        for number, tensor in enumerate(tensors):
            self.name(tensor, f"result {len(self.lines)}.{number}")
        return result

    def described(self, value: Any) -> str:
        """Return an argument or a result as text, the same in every process."""
        if isinstance(value, Tensor):
            return self.names.get(id(value)) or f"constant {_kind(value)} {_content(value)}"
        if isinstance(value, np.ndarray | np.generic):
            return (
                f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
            )
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self.described, value))})"
        if isinstance(value, Mapping):
            return self.described([(name, value[name]) for name in sorted(value)])
        if isinstance(value, slice):
            return f"slice{self.described((value.start, value.stop, value.step))}"
        if callable(value):
            return _function_name(value)
        shows_all = bool | int | float | complex | str | torch.dtype | torch.device | torch.layout
        if value is None or value is ... or isinstance(value, shows_all | torch.memory_format):
            return repr(value)
        return type(value).__qualname__  # its repr might contain an address


def _function_name(function: Callable[..., Any]) -> str:
    module = getattr(function, "__module__", None)
    return resolve_name(function) or f"{module}.{getattr(function, '__qualname__', None)}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _content(tensor: Tensor) -> str:
    if tensor.requires_grad:  # of weights, so of their initial values
        return "of weights"
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
