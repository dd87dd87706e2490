"""A stored model, checked before anything of it is loaded: none may run code.

What `tracking.runs` doesn't write is refused. MLflow imports what a file MLmodel or a file beside
the model names. PyTorch's loader unpickles records of a `.pt2` archive, compiles and opens the C++
in it, and evaluates as Python what its graph says of sizes (by SymPy), guards, names and trees;
MLflow's setting against pickle stops the first of these only. And a graph may call an operator that
writes files. So PyTorch is handed an archive made anew, of what was looked at.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import GraphModule

DESCRIPTION = Path("MLmodel")
GRAPH = Path("data/model.pt2")

OPERATORS = {
    # types and sizes
    "_assert_tensor_metadata.default", "sym_size.int", "to.dtype",
    # elements
    "abs.default", "add.Tensor", "clamp.default", "clamp_min.default", "div.Tensor",
    "eq.Scalar", "exp.default", "log.default", "matmul.default", "mul.Tensor", "neg.default",
    "pow.Tensor_Scalar", "reciprocal.default", "sqrt.default", "sub.Tensor", "where.self",
    # reductions
    "amax.default", "mean.dim", "sum.dim_IntList",
    # shapes
    "cat.default", "flatten.using_ints", "permute.default", "reshape.default", "select.int",
    "slice.Tensor", "squeeze.dim", "transpose.int", "unsqueeze.default", "view.default",
    # layers
    "adaptive_avg_pool2d.default", "avg_pool2d.default", "batch_norm.default", "conv2d.default",
    "conv2d.padding", "dropout.default", "feature_dropout.default", "group_norm.default",
    "layer_norm.default", "linear.default", "max_pool2d.default",
    # activations
    "elu.default", "gelu.default", "hardswish.default", "hardtanh.default",
    "leaky_relu.default", "log_sigmoid.default", "log_softmax.int", "mish.default",
    "relu.default", "sigmoid.default", "silu.default", "softmax.int", "softplus.default",
    "tanh.default",
}  # fmt: skip
"""What of `torch.ops.aten` a graph may call: for the usual layers, what touches tensors alone."""

_MAX_ARCHIVE = 1 << 30
_MAX_JSON = 1 << 24  # parsed, it takes some ten times as much
_MAX_DESCRIPTION = 1 << 20
"""Sizes in bytes; models here have about 0.8 MB, 0.04 MB of JSON, and 1 kB of description."""

_FLAVORS: Mapping[str, Mapping[str, object]] = {
    "pytorch": {"model_data": "data", "code": None},
    "python_function": {"loader_module": "mlflow.pytorch", "data": "data", "code": None},
}
_FREE = {"pytorch_version", "python_version", "config", "env", "pickle_module_name"}

_PROGRAM = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_EXAMPLE = "data/sample_inputs/model.pt"
_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|data/weights/weight_[0-9]+|data/constants/tensor_[0-9]+"
    + "".join(f"|{re.escape(name)}" for name in (_PROGRAM, _WEIGHTS, _CONSTANTS, _EXAMPLE))
).fullmatch

_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*").fullmatch
_PATH = re.compile(r"(?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*").fullmatch

# What a text in a graph's JSON may be, by its key; under other keys there is none. "type" is
# that of a device or, as "context" is, of a tree of inputs or outputs, which is JSON within a text.
_TEXTS: dict[str, Callable[[str], object]] = {
    "target": {f"torch.ops.aten.{name}" for name in OPERATORS}.__contains__,
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _IDENTIFIER),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name"), _PATH),
    "fqn": lambda text: text == "" or _PATH(text),
    "path_name": re.compile(r"(weight|tensor)_[0-9]+").fullmatch,
    "expr_str": re.compile(r"Symbol\('s[0-9]+', positive=True, integer=True\)").fullmatch,
    "as_float": {"Infinity", "-Infinity", "NaN"}.__contains__,
    "as_string": re.compile(r"[a-z_]*").fullmatch,
    "type": {"cpu", "builtins.tuple", "builtins.dict"}.__contains__,
    "context": {"null", "[]"}.__contains__,
    "verifiers": {"TRAINING"}.__contains__,
    "torch_version": re.compile(r"[0-9][A-Za-z0-9.+]*").fullmatch,
}


def folder_objection(folder: Path) -> str | None:
    """Return what keeps us from looking into the files of a model's folder, if anything does."""
    if not (folder / DESCRIPTION).is_file():
        return f"it has no file {DESCRIPTION}"
    for file in (DESCRIPTION, GRAPH):
        if not (folder / file).resolve().is_relative_to(folder.resolve()):
            return f"its {file} is a link that leads out of its folder"
    # Of a model.pth, MLflow imports the module that a file beside it names, before it refuses.
    if not (folder / GRAPH).is_file() or (folder / GRAPH).with_suffix(".pth").exists():
        return "it is not stored as a graph (pt2), and pickle, which can run any code, is refused"
    for file, most in ((DESCRIPTION, _MAX_DESCRIPTION), (GRAPH, _MAX_ARCHIVE)):
        if (size := (folder / file).stat().st_size) > most:
            return f"its {file} has {size:,} bytes, more than the {most:,} that are loaded"
    return None


def flavor_objection(flavors: Mapping[str, Mapping[str, object]]) -> str | None:
    """Return in what a file MLmodel has a model loaded otherwise than we do, if in anything."""
    for name, flavor in flavors.items():
        if name not in _FLAVORS:
            return f"it has the flavor {name!r}, not only {' and '.join(_FLAVORS)}"
        ours = _FLAVORS[name]
        for key, value in flavor.items():
            if key not in ours and key not in _FREE:
                return f"its flavor {name} has {key!r}, which no recorded model has"
            if key in ours and value != ours[key]:
                return f"its {key} is {value!r}, not {ours[key]!r}"
    return None


def load_graph(archive: bytes) -> GraphModule:
    """Return the module that a `.pt2` archive holds, on the CPU.

    Raises:
        ValueError: it has something in it that could run code; whatever PyTorch or `json` raises
            of one that is damaged.
    """
    import torch

    records = _checked_records(archive)
    records[_EXAMPLE] = b""  # not needed, and PyTorch would unpickle it
    # Guards would be made by `exec`; sizes are checked without.
    return torch.export.load(io.BytesIO(_zipped(records))).module(check_guards=False)


def harmless(archive: bytes) -> bytes:
    """Return a `.pt2` archive without all that is not needed to load it.

    Raises:
        ValueError: as `load_graph` does.
    """
    return _zipped(_checked_records(archive))


def _zipped(records: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as writer:
        for name, record in records.items():
            # Not by its name alone, with which the time goes in: the same graph is the same bytes.
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.external_attr = 0o600 << 16
            writer.writestr(entry, record)
    return content.getvalue()


def _checked_records(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive, its JSON as far as it was looked at."""
    records = _records(archive)
    for name in (_PROGRAM, _WEIGHTS, _CONSTANTS):
        if len(records[name]) > _MAX_JSON:
            raise ValueError(f"its {name} has {len(records[name]):,} bytes: at most {_MAX_JSON:,}")
        content = _checked(json.loads(records[name]))
        if name != _PROGRAM:
            _check_tensors(content["config"], name.rpartition("/")[0], records)
        records[name] = json.dumps(content).encode()
    _check_example(records[_EXAMPLE])
    return records


def _records(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive, by their names without the folder that all are in."""
    records = {name.partition("/")[2]: record for name, record in _unpacked(archive)}
    for name in records:
        if not _RECORD(name):
            raise ValueError(f"its graph holds {name!r}, which no recorded model has")
    for name in (_PROGRAM, _WEIGHTS, _CONSTANTS, _EXAMPLE):
        if name not in records:
            raise ValueError(f"its graph lacks {name!r}")
    return records


def _unpacked(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in a ZIP archive, which must be as PyTorch writes it."""
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        entries = reader.infolist()
        if sum(entry.file_size for entry in entries) > len(archive):
            raise ValueError(f"it unpacks to more than its own {len(archive):,} bytes")
        for entry in entries:
            yield entry.filename, reader.read(entry)


def _checked(value: Any, key: str = "", where: str = "graph") -> Any:
    """Return a part of a graph's JSON, without its metadata, or raise ValueError.

    Args:
        value: the part.
        key: the key under which it is found; for an element of a list, that of the list.
        where: the key around that, for the message.
    """
    if key == "metadata":  # where a node came from, as free text: not needed
        return {}
    match value:
        case dict():
            for name in value:
                if not _PATH(name):
                    raise ValueError(f"the name {name!r} in its {key or where} is not allowed")
            return {name: _checked(part, name, key or where) for name, part in value.items()}
        case list():
            return [_checked(part, key, where) for part in value]
        case str() if key in ("in_spec", "out_spec"):
            return json.dumps(_checked(json.loads(value), where=key))
        case str() if not _TEXTS.get(key, _nothing)(value):
            raise ValueError(f"the {key} {value!r} in its {where} is not allowed")
    return value


def _nothing(_: str) -> bool:
    return False


def _check_tensors(tensors: Mapping[str, Any], folder: str, records: Mapping[str, bytes]) -> None:
    """Raise ValueError if a weight or constant is pickled, or larger than its record."""
    for name, tensor in tensors.items():
        stored = records.get(f"{folder}/{tensor['path_name']}")
        if tensor["use_pickle"] is not False or stored is None:
            raise ValueError(f"its weight {name!r} is pickled, or lacks its record")
        if math.prod(size["as_int"] for size in tensor["tensor_meta"]["sizes"]) > len(stored):
            raise ValueError(f"its weight {name!r} is larger than its record")


def _check_example(record: bytes) -> None:
    """Raise ValueError if the example of the inputs, which is pickled, holds more than tensors."""
    import torch

    try:
        dict(_unpacked(record))  # raises for a decompression bomb
        torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"its example {_EXAMPLE!r} is a pickle of more than tensors") from error
