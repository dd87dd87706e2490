"""Read a model's file MLmodel within bounds.

MLflow's reader follows YAML aliases, with which 500 bytes stand for gigabytes, and opens any file
that the key `resources` names. So the file is parsed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 1 << 18
"""The largest MLmodel: models here have about 1 kB, one with 10,000 classes has 0.2 MB."""

_MAX_DEPTH = 20
_MAX_CLASSES = 10_000
_MAX_IMAGE = 1 << 22
"""Numbers in an image, H × W × C: 1,182 × 1,182 pixels with three channels."""

_FLAVORS: Mapping[str, Mapping[str, object]] = {
    "pytorch": {"model_data": "data", "code": None},
    "python_function": {"loader_module": "mlflow.pytorch", "data": "data", "code": None},
}
_FREE = {"pytorch_version", "python_version", "config", "env", "pickle_module_name"}

_TEXTS = ("dataset", "dataset_digest", "loss", "study")
_INTEGERS = {"seed": 2**32, "trial": 2**63}
"""The metadata of `experiments`: texts, and integers with their bounds."""

_RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}", re.ASCII).fullmatch


@dataclass(frozen=True, kw_only=True)
class Description:
    """What prediction needs of a file MLmodel."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """Height, width and channels."""
    run_id: str | None
    metadata: Mapping[str, Any]


def read_description(content: bytes) -> Description:
    """Parse a file MLmodel, or raise ValueError if `tracking.runs` did not record it."""
    about = _parsed(content)
    _check_flavors(_mapping(about, "flavors"))
    metadata = _mapping(about, "metadata")
    _check_metadata(metadata)
    classes = metadata.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its metadata names no classes")
    run_id = about.get("run_id")
    if run_id is not None and not (isinstance(run_id, str) and _RUN_ID(run_id)):
        raise ValueError(f"its run_id {run_id!r} is not the id of a run")
    return Description(
        classes=tuple(classes),
        image_shape=_image_shape(_mapping(about, "signature"), classes),
        run_id=run_id,
        metadata=metadata,
    )


def _parsed(content: bytes) -> dict[Any, Any]:
    import yaml  # type: ignore[import-untyped]

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(content) > MAX_BYTES:
        raise ValueError(f"its file MLmodel has more than the {MAX_BYTES:,} bytes that are read")
    try:
        depth = 0
        for event in yaml.parse(content, Loader=loader):
            if getattr(event, "anchor", None) is not None:  # aliases have one too
                raise ValueError("it has YAML anchors or aliases")  # noqa: TRY301
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")  # noqa: TRY301
        about = yaml.load(content, Loader=loader)  # noqa: S506 -- one of the two safe ones
    except Exception as error:  # YAML's own, and those of its numbers and dates
        text = " ".join(str(error).split())
        raise ValueError(f"its file MLmodel can't be read: {text}") from error
    if not isinstance(about, dict):
        raise ValueError("its file MLmodel can't be read: it is no mapping")  # noqa: TRY004
    return about


def _mapping(about: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    value = about.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"its file MLmodel has no mapping as {key}")  # noqa: TRY004
    return value


def _check_flavors(flavors: Mapping[Any, Any]) -> None:
    """Raise ValueError for a model that MLflow would load in another way than we do."""
    if "pytorch" not in flavors:
        known = ", ".join(map(str, flavors)) or "nothing that is known"
        raise ValueError(f"it is no PyTorch model, but {known}")
    for name in flavors:
        if name not in _FLAVORS:
            raise ValueError(f"it has the flavor {name!r}, not only {' and '.join(_FLAVORS)}")
        ours = _FLAVORS[name]
        for key, value in _mapping(flavors, name).items():
            if key not in ours and key not in _FREE:
                raise ValueError(f"its flavor {name} has {key!r}, which no recorded model has")
            if key in ours and value != ours[key]:
                raise ValueError(f"its {key} is {value!r}, not {ours[key]!r}")


def _check_metadata(metadata: Mapping[Any, Any]) -> None:
    for key, value in metadata.items():
        if key in _TEXTS and not isinstance(value, str):
            raise ValueError(f"its metadata has {value!r} as {key}, which is no text")
        if key in _INTEGERS and not _is_integer(value, bound := _INTEGERS[key]):
            line = f"its metadata has {value!r} as {key}, which is no integer from 0 to {bound - 1}"
            raise ValueError(line)


def _image_shape(signature: Mapping[Any, Any], classes: Sequence[str]) -> tuple[int, int, int]:
    """Return the image shape of a signature, or raise ValueError if it is not images → classes."""
    if not signature.get("inputs") or not signature.get("outputs"):
        raise ValueError("it has no signature")
    images, shape = _tensor(signature["inputs"])
    if images != "uint8" or len(shape) != 4 or not all(_is_integer(n, 2**31) for n in shape[1:]):
        raise ValueError(f"it takes {images} {shape}, not images (N, H, W, C) uint8")
    _, height, width, channels = shape
    if height * width * channels < 1 or height * width * channels > _MAX_IMAGE:
        raise ValueError(
            f"it takes images of {height:,} × {width:,} × {channels:,} numbers: at least 1 and at "
            f"most {_MAX_IMAGE:,} are taken"
        )
    probabilities, gives = _tensor(signature["outputs"])
    if len(set(classes)) != len(classes) or gives != (-1, len(classes)):
        raise ValueError(f"it gives {probabilities} {gives} for the classes {list(classes)}")
    if len(classes) > _MAX_CLASSES:
        raise ValueError(f"it has {len(classes):,} classes: at most {_MAX_CLASSES:,} are taken")
    return height, width, channels


def _tensor(schema: object) -> tuple[object, tuple[Any, ...]]:
    """Return type and shape of the one tensor in a part of a signature, which is a JSON text."""
    try:
        (tensor,) = json.loads(schema)  # type: ignore[arg-type]
        spec = tensor["tensor-spec"]
        return spec["dtype"], tuple(spec["shape"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its signature is not of one tensor: {schema!r}") from error


def _is_integer(value: object, bound: int) -> bool:
    return type(value) is int and 0 <= value < bound
