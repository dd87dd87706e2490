"""Check a stored model before it is loaded, so that it can't run code.

Everything that `tracking.runs` does not write is refused. PyTorch's loader unpickles records of a
`.pt2` archive, compiles and opens its C++, and evaluates as Python its sizes (by SymPy), guards,
names and trees; MLflow's setting against pickle stops only the first. A graph may also call an
operator that writes files. So PyTorch gets a new archive, built from the checked parts.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import GraphModule

_WHY_SAFE: Mapping[str, str] = {
    # What the operators of a group do, and why no graph can do harm with them: their names
    # (`torch.ops.aten`). They read and write tensors of the process's memory; none opens a file,
    # runs code or reads what no tensor holds. `cost` counts each result at its full size, views as
    # well, before the graph runs. So temporary copies of operands are covered; what takes more has
    # an entry there.
    "types: copies of the same numbers; a device is always the CPU": """
        _assert_tensor_metadata.default to.device to.dtype to.dtype_layout type_as.default
        clone.default contiguous.default detach.default detach_.default lift_fresh_copy.default""",
    "sizes: integers; the product is `cost`'s to bound": "sym_size.int",
    "elements: one number from one of each operand": """
        abs.default add.Tensor clamp.default clamp_max.default clamp_min.default clip.default
        cos.default div.Tensor erf.default exp.default expm1.default log.default log1p.default
        maximum.default minimum.default mul.Tensor neg.default pow.Scalar pow.Tensor_Scalar
        pow.Tensor_Tensor reciprocal.default rsqrt.default rsub.Scalar sign.default sin.default
        sqrt.default square.default sub.Tensor
        eq.Scalar ge.Scalar gt.Scalar le.Scalar lt.Scalar ne.Scalar
        masked_fill.Scalar where.ScalarOther where.self""",
    "activations: the same, or a sum over one dimension besides": """
        celu.default elu.default gelu.default glu.default hardsigmoid.default hardswish.default
        hardtanh.default leaky_relu.default log_sigmoid.default log_softmax.int mish.default
        prelu.default relu.default relu6.default selu.default sigmoid.default silu.default
        softmax.int softplus.default tanh.default""",
    "in place: the same, written into a tensor of the graph; `cost` refuses it for a weight": """
        add_.Tensor celu_.default copy_.default div_.Tensor dropout_.default elu_.default
        feature_dropout_.default fill_.Scalar hardsigmoid_.default hardswish_.default
        hardtanh_.default leaky_relu_.default mish_.default mul_.Tensor relu_.default selu_.default
        sigmoid_.default silu_.default sub_.Tensor zero_.default""",
    "reductions: results smaller than the operand": """
        amax.default amin.default linalg_vector_norm.default logsumexp.default max.dim mean.default
        mean.dim min.dim std.dim sum.default sum.dim_IntList var.dim""",
    "shapes: the same numbers, in another order or fewer": """
        channel_shuffle.default flatten.using_ints flip.default mT.default movedim.int
        narrow.default permute.default pixel_shuffle.default pixel_unshuffle.default
        reshape.default roll.default select.int slice.Tensor squeeze.default squeeze.dim
        swapaxes.default transpose.int unflatten.int unsqueeze.default view.default
        view_as.default""",
    "parts: lists of views, whose number `cost` bounds before they are made": """
        chunk.default split.Tensor split_with_sizes.default unbind.int""",
    "larger results: `cost` counts them": """
        cat.default expand.default expand_as.default pad.default repeat.default stack.default
        upsample_bilinear2d.vec upsample_nearest2d.vec""",
    "made of nothing: `cost` counts the size that is asked for, and makes none of it": """
        arange.default arange.start arange.start_step full.default full_like.default
        new_zeros.default ones.default ones_like.default zeros.default zeros_like.default""",
    "look-ups: an index outside of the tensor is an error": "embedding.default index.Tensor",
    "layers: numbers from weights and inputs; `cost` refuses those that change their weights": """
        adaptive_avg_pool2d.default adaptive_max_pool2d.default batch_norm.default
        dropout.default feature_dropout.default group_norm.default instance_norm.default
        layer_norm.default rms_norm.default""",
    "products and windows: `cost` has the multiply-adds and the temporary memory of each": """
        avg_pool2d.default bmm.default conv2d.default conv2d.padding linear.default matmul.default
        max_pool2d.default mm.default scaled_dot_product_attention.default""",
}

OPERATORS = frozenset(name for names in _WHY_SAFE.values() for name in names.split())
"""The operators of `torch.ops.aten` that a graph may call: usual layers, which touch tensors only.
"""

TARGETS = {f"torch.ops.aten.{name}" for name in OPERATORS} | {"_operator.mul"}
"""What a graph may call: the operators, and `*` of two integers, such as batch size × heads."""

MAX_ARCHIVE = 1 << 28
_MAX_JSON = 1 << 22  # parsed, it takes ten times as much
"""Sizes in bytes; models here have about 0.8 MB, 0.04 MB of it JSON. Loading takes four times the
archive, and PyTorch itself 0.7 GB: 1.8 GB in all."""

_MAX_RECORDS = 10_000
_STORED = 0  # in a ZIP archive: not compressed

MAX_NODES = 2_000
"""PyTorch takes about 5 seconds to load a graph with so many nodes. A ResNet-152 has about 600."""

# PyTorch's numbers for types and for the layout in its JSON, and the bytes of an element.
_FLOATS = {6: 2, 7: 4, 8: 8, 13: 2}
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 1} | _FLOATS
_STRIDED = 7

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
_SYMBOL = re.compile(r"Symbol\('s[0-9]+', positive=True, integer=True\)").fullmatch
_ARITHMETIC = re.compile(r"[A-Z][A-Za-z0-9(),=' -]*").fullmatch
# A module's name may have a hyphen, as in torchvision's RegNet. PyTorch quotes such a name where it
# writes code; unquoted, a hyphen could only subtract.
_PATH = re.compile(r"(?!__)[A-Za-z0-9_-]+(\.(?!__)[A-Za-z0-9_-]+)*").fullmatch

# The texts that a graph's JSON may have, by key; other keys have no text. "type" is that of a
# device or of a tree of inputs or outputs, as "context" is. Such a tree is JSON within a text.
_TEXTS: dict[str, Callable[[str], object]] = {
    "target": TARGETS.__contains__,
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _IDENTIFIER),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name"), _PATH),
    "fqn": lambda text: text == "" or _PATH(text),
    "path_name": re.compile(r"(weight|tensor)_[0-9]+").fullmatch,
    "expr_str": _SYMBOL,
    "as_float": {"Infinity", "-Infinity", "NaN"}.__contains__,
    "as_string": re.compile(r"[a-z_]*").fullmatch,
    "type": {"cpu", "builtins.tuple", "builtins.dict"}.__contains__,
    "context": {"null", "[]"}.__contains__,
    "verifiers": {"TRAINING"}.__contains__,
    "torch_version": re.compile(r"[0-9][A-Za-z0-9.+]*").fullmatch,
}


def load_graph(archive: bytes) -> GraphModule:
    """Return the module of a `.pt2` archive, on the CPU.

    Raises ValueError if it could run code or is too large. A damaged one raises errors of PyTorch
    or `json`.
    """
    import torch

    records = _checked_records(archive)
    records[_EXAMPLE] = b""  # not needed, and PyTorch would unpickle it
    with _cause_raised():
        # Guards would run `exec`; sizes are checked without them.
        return torch.export.load(io.BytesIO(_zipped(records))).module(check_guards=False)


@contextmanager
def _cause_raised() -> Iterator[None]:
    """Raise the cause that PyTorch's loader only logs, and hide its log lines.

    Its own error refers to the log, which has a traceback of 20 lines.
    """
    causes: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            causes.append(record.exc_info[1])
        return False

    logs = [logging.getLogger(name) for name in ("torch.export", "torch._export.serde.serialize")]
    for log in logs:
        log.addFilter(keep)
    try:
        yield
    except RuntimeError as error:
        raise (causes or [error])[-1] from error
    finally:
        for log in logs:
            log.removeFilter(keep)


def sanitized_archive(archive: bytes) -> bytes:
    """Return a `.pt2` archive with only the parts that loading needs; raises as `load_graph`."""
    return _zipped(_checked_records(archive))


def _zipped(records: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as writer:
        for name, record in records.items():
            # A ZipInfo without the time: the same graph gives the same bytes.
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.external_attr = 0o600 << 16
            writer.writestr(entry, record)
    return content.getvalue()


def _checked_records(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive, with only the checked parts of its JSON."""
    records = _records(archive)
    for name in (_PROGRAM, _WEIGHTS, _CONSTANTS):
        if len(records[name]) > _MAX_JSON:
            raise ValueError(f"its {name} has {len(records[name]):,} bytes: at most {_MAX_JSON:,}")
        try:
            content = _checked(json.loads(records[name]))
        except RecursionError as error:
            raise ValueError(f"its {name} is nested too deep") from error
        if name != _PROGRAM:
            _check_tensors(content["config"], name.rpartition("/")[0], records)
        elif (count := len(content["graph_module"]["graph"]["nodes"])) > MAX_NODES:
            raise ValueError(f"its graph has {count:,} nodes: at most {MAX_NODES:,} are loaded")
        records[name] = json.dumps(content).encode()
    return records


def _records(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive, by name without the common folder."""
    records = {name.partition("/")[2]: record for name, record in _unpacked(archive)}
    for name in records:
        if not _RECORD(name):
            raise ValueError(f"its graph holds {name!r}, which no recorded model has")
    for name in (_PROGRAM, _WEIGHTS, _CONSTANTS, _EXAMPLE):
        if name not in records:
            raise ValueError(f"its graph lacks {name!r}")
    return records


def _unpacked(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in a ZIP archive, if it is as PyTorch writes it."""
    if len(archive) > MAX_ARCHIVE:
        raise ValueError(f"it has {len(archive):,} bytes, more than the {MAX_ARCHIVE:,} allowed")
    if archive.count(b"PK\1\2") > _MAX_RECORDS:  # an entry of its directory begins so
        raise ValueError(f"it has more than the {_MAX_RECORDS:,} records allowed")
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        entries = reader.infolist()
        for entry in entries:
            if entry.compress_type != _STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its {entry.filename!r} is compressed, which no recorded one is")
        if sum(entry.file_size for entry in entries) > len(archive):
            raise ValueError(f"it unpacks to more than its own {len(archive):,} bytes")
        for entry in entries:
            yield entry.filename, reader.read(entry)


def _checked(value: Any, key: str = "", where: str = "graph") -> Any:
    """Return a part of a graph's JSON, without its metadata, or raise ValueError.

    Args:
        value: the part.
        key: its key; for an element of a list, that of the list.
        where: the key of what contains it, for the message.
    """
    if key == "metadata":  # the origin of a node as free text: not needed
        return {}
    match value:
        case {"as_expr": {"expr_str": str(text), "hint": {"as_int": int(example)}}} if _ARITHMETIC(
            text
        ) and not _SYMBOL(text):
            # A size such as 4 × the batch size: that of the example does, and nothing evaluates it.
            return {"as_int": example}
        case dict():
            for name in value:
                if not _PATH(name):
                    raise ValueError(f"the name {name!r} in its {key or where} is not allowed")
            return {name: _checked(part, name, key or where) for name, part in value.items()}
        case list():
            return [_checked(part, key, where) for part in value]
        case str() if key in ("in_spec", "out_spec"):
            return json.dumps(_checked(json.loads(value), where=key))
        case str() if key not in _TEXTS or not _TEXTS[key](value):
            raise ValueError(f"the {key} {value!r} in its {where} is not allowed")
    return value


def _check_tensors(tensors: Mapping[str, Any], folder: str, records: Mapping[str, bytes]) -> None:
    """Raise ValueError if a weight or constant is not a plain tensor inside its record."""
    types: dict[str, int] = {}
    for name, tensor in tensors.items():
        stored = records.get(f"{folder}/{tensor['path_name']}")
        if tensor["use_pickle"] is not False or stored is None:
            raise ValueError(f"its weight {name!r} is pickled, or lacks its record")
        about = tensor["tensor_meta"]
        kind = about["dtype"]
        # PyTorch reads a record once, with the first type that names it.
        if not _is_plain(about) or types.setdefault(tensor["path_name"], kind) != kind:
            raise ValueError(f"its weight {name!r} is no plain tensor on the CPU")
        if not _fits(about, len(stored)):
            raise ValueError(f"its weight {name!r} is larger than its record")


def _is_plain(about: Mapping[str, Any]) -> bool:
    """Return whether a tensor is strided, on the CPU, and of a type that models have."""
    return (
        about["dtype"] in _ITEM_BYTES
        and about["layout"] == _STRIDED
        and about["device"] == {"type": "cpu", "index": None}
        and about["requires_grad"] in (({True, False}) if about["dtype"] in _FLOATS else {False})
    )


def _fits(about: Mapping[str, Any], num_bytes: int) -> bool:
    """Return whether all elements of a tensor lie in a record of so many bytes."""
    item = _ITEM_BYTES[about["dtype"]]
    sizes, strides = ([_integer(part) for part in about[key]] for key in ("sizes", "strides"))
    if len(sizes) != len(strides) or min(sizes, default=1) < 1:
        return False
    offset = _integer(about["storage_offset"])
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    num_elements = math.prod(sizes)
    return (
        min([offset, *strides]) >= 0
        and num_bytes % item == 0
        and max(last + 1, num_elements) * item <= num_bytes
    )


def _integer(part: Mapping[str, Any]) -> int:
    value = part["as_int"]
    if type(value) is not int:
        raise ValueError(f"the size {part!r} is no integer")
    return value
