"""Write a model: traced once, as a graph with its weights, which passes the checks of loading."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tracking.models.fetching import DESCRIPTION
from tracking.models.safety import sanitized_archive

if TYPE_CHECKING:
    import numpy as np
    from mlflow.models import Model
    from torch import Tensor, nn
    from torch.export import ExportedProgram


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
            program = export(model, example, **options)
            with _recordable():
                check_cost(program.module(check_guards=False), example[0].shape[1:])
            _PROGRAMS[model] = program
        return program

    def save_by_python(program: ExportedProgram, file: str) -> None:
        content = io.BytesIO()
        save(program, content)
        with _recordable():
            archive = sanitized_archive(content.getvalue())
        Path(file).write_bytes(archive)

    package.export, package.save = export_once, save_by_python
    try:
        yield
    finally:
        package.export, package.save = export, save


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
