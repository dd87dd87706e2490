"""Write a model: traced once, as a graph with its weights, which passes the checks of loading."""

from __future__ import annotations

import io
import logging
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tracking.errors import one_line
from tracking.models.fetching import DESCRIPTION
from tracking.models.safety import TARGETS, load_graph, sanitized_archive

if TYPE_CHECKING:
    import numpy as np
    from mlflow.models import Model
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    input_example: np.ndarray[Any, Any],
    metadata: Mapping[str, Any],
    about: Model | None = None,
) -> None:
    """Write a model to a new folder, as `Run.log_model` records it.

    The first call of a process takes seconds, because it imports PyTorch's compiler.

    Args:
        model: as `Run.log_model` takes it, and `input_example` as well.
        folder: it must not exist.
        metadata: stored with the model; it has the names of the K `classes`.
        about: MLflow's description so far, with its run.

    Raises:
        ValueError: it is not on the CPU, or `tracking.predict` would not load its graph.
    """
    import numpy as np
    from mlflow import pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    _check_device(model)
    about = about or Model()
    images = TensorSpec(np.dtype(np.uint8), (-1, *input_example.shape[1:]))
    probabilities = TensorSpec(np.dtype(np.float32), (-1, len(metadata["classes"])))
    with _frugal_export():
        pytorch.save_model(
            model,
            folder,
            mlflow_model=about,
            serialization_format="pt2",
            signature=ModelSignature(Schema([images]), Schema([probabilities])),
            input_example=input_example,
            metadata=dict(metadata),
            # MLflow would load the model in another process to infer them: 12 s a model.
            pip_requirements=_requirements(),
        )
    # Without this, MLflow uses a GPU if there is one, and this graph is for the CPU.
    about.flavors["python_function"]["config"] = {"device": "cpu"}
    about.save(str(folder / DESCRIPTION))


def _check_device(model: nn.Module) -> None:
    """Raise ValueError for a model on a GPU: machines without one could not load its graph."""
    for name, weight in model.state_dict().items():
        if weight.device.type != "cpu":
            raise ValueError(
                f"a model is recorded from the CPU, for machines without a GPU: its {name} is on "
                f"{weight.device} (model.cpu() moves it)"
            )


def check_storable(model: nn.Module, input_example: np.ndarray[Any, Any]) -> None:
    """Raise ValueError, in one line, if `save_model` or loading would refuse the model.

    The model is traced. `save_model` uses this trace, if it gets the same object, weights that were
    changed in place only, and the same example.

    Args:
        model: as `Run.log_model` takes it, and `input_example` as well.
    """
    import torch

    _check_device(model)
    images = torch.from_numpy(input_example)
    dynamic_shapes = [{0: torch.export.Dim.AUTO}]  # as MLflow
    with _frugal_export():
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic_shapes)
    with _recordable(), torch.inference_mode():
        outputs = load_graph(_archive(program))(torch.zeros_like(images))
        if outputs.ndim != 2 or len(outputs) != len(images) or outputs.dtype != torch.float32:
            raise ValueError(
                f"for {len(images)} images, it gives {outputs.dtype} {tuple(outputs.shape)}, not "
                "float32 probabilities (N, K)"
            )


_PROGRAMS: WeakKeyDictionary[nn.Module, ExportedProgram] = WeakKeyDictionary()


@contextmanager
def _frugal_export() -> Iterator[None]:
    """Let PyTorch trace each model once, and Python write the file.

    A trace takes 0.1 s and leaks 0.2 MB. On a full disk, PyTorch's own writer ends the process, but
    Python raises OSError. The written file has no lines of source and no paths of this machine.
    """
    import torch

    from tracking.models.cost import check_cost

    package: Any = torch.export
    export, save = package.export, package.save

    def export_once(
        model: nn.Module, example: tuple[Tensor, ...], **options: object
    ) -> ExportedProgram:
        program = _PROGRAMS.get(model)
        if program is None or not _is_of(program, model, example):
            with _recordable():
                program = _exported(export, model, example, **options)
                _check_graph(program)
                check_cost(program.module(check_guards=False), example[0].shape[1:])
            _PROGRAMS[model] = program
        return program

    def save_by_python(program: ExportedProgram, file: str) -> None:
        with _recordable():
            archive = _archive(program, save)
        Path(file).write_bytes(archive)

    package.export, package.save = export_once, save_by_python
    try:
        yield
    finally:
        package.export, package.save = export, save


def _archive(
    program: ExportedProgram, save: Callable[[ExportedProgram, io.BytesIO], None] | None = None
) -> bytes:
    """Return the checked archive of a program."""
    import torch

    content = io.BytesIO()
    (save or torch.export.save)(program, content)
    return sanitized_archive(content.getvalue())


def _exported(
    export: Callable[..., ExportedProgram],
    model: nn.Module,
    example: tuple[Tensor, ...],
    **options: object,
) -> ExportedProgram:
    """Trace a model, or raise ValueError: its own code may raise anything."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it shows what it raises as well, and prints graphs
    try:
        with redirect_stderr(io.StringIO()):
            return export(model, example, **options)
    except Exception as error:
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        why = one_line(error)
        if isinstance(error, GuardOnDataDependentSymNode):
            why = "what it does depends on numbers in a tensor (`if`, `while` or `int()` of one)"
        frames = traceback.extract_tb(error.__traceback__)
        where = _place((frame.filename, frame.lineno) for frame in frames)
        raise ValueError(f"PyTorch can't trace it{where}: {why}") from error
    finally:
        log.setLevel(level)


def _place(lines: Iterable[tuple[str, object]]) -> str:
    """Return the innermost of some lines that is not PyTorch's or our own, as " at net.py:12"."""
    import torch

    own = Path(torch.__file__).parent, Path(__file__)
    for file, line in reversed(list(lines)):
        if not any(Path(file).is_relative_to(part) for part in own):
            return f" at {Path(file).name}:{line}"
    return ""


def _check_graph(program: ExportedProgram) -> None:
    """Raise ValueError for what loading refuses: an operator, a fixed number of images, outputs."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            target = _target(node.target)
            if target not in TARGETS:
                name = target.removeprefix("torch.ops.aten.").partition(".")[0]
                raise ValueError(
                    f"{_caller(node)} calls {name} ({target}), which is not in the list of "
                    "operators that are safe to load"
                )
    if guards := program._guards_code:
        raise ValueError(
            f"its graph is only for some numbers of images ({guards[0]}): len() of a tensor makes "
            "it so, or a constant in place of its shape[0]"
        )
    outputs = program.call_spec.out_spec
    if outputs is not None and not outputs.is_leaf():
        raise ValueError(f"it gives a {outputs.type.__name__}, not a tensor of probabilities")


def _target(function: Any) -> str:
    """Return the name of what a graph calls, as it is stored."""
    text = str(function)
    if text.startswith("aten."):
        return f"torch.ops.{text}"
    return f"{function.__module__}.{getattr(function, '__name__', text)}"


def _caller(node: Node) -> str:
    """Return which module calls an operator, and from which line."""
    path, kind = [("", "model"), *(node.meta.get("nn_module_stack") or {}).values()][-1]
    name = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    where = f"its module {path} ({name})" if path else "its forward"
    lines = re.findall(r'File "([^"]+)", line ([0-9]+)', node.meta.get("stack_trace") or "")
    return f"{where}{_place(lines)}"


@contextmanager
def _recordable() -> Iterator[None]:
    """Raise each refusal of the checks of loading as "this model can't be recorded"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"this model can't be recorded: {error}") from error


def _is_of(program: ExportedProgram, model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    """Return whether a program shares a model's tensors, and was traced with this example."""
    import torch

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made_with: tuple[Tensor, ...] = program.example_inputs[0] if program.example_inputs else ()
    return (
        all(tensor is tensors.get(name) for name, tensor in program.state_dict.items())
        and len(made_with) == len(example)
        and all(map(torch.equal, made_with, example))
    )


def _requirements() -> list[str]:
    """Return the packages that loading the model needs, in the installed versions."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "numpy")]
