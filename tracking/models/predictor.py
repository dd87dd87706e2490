"""Load a stored model and predict with it. Loading runs no code of the model's author."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracking.errors import one_line, without_passwords
from tracking.models.description import read_description
from tracking.models.fetching import fetch, shown_uri
from tracking.models.labels import class_names
from tracking.models.safety import load_graph
from tracking.prediction.pixels import as_batch
from tracking.text import listed, printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from tracking.models.labels import Labels
    from tracking.models.predictions import Predictions
    from tracking.prediction.pixels import Images


# The fastest of 16 to 4,096 on two idle cores of an AMD EPYC: 7,350 images/s with 128, 5,170 with
# 256, 4,150 with 1,024. Larger batches cause 30 to 90 page faults an image.
BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Predictor:
    """A recorded model, loaded to predict."""

    model: Callable[[Tensor], Tensor]
    """Images (N, H, W, C) uint8 → probabilities (N, K)."""
    classes: tuple[str, ...]
    """The K class names, in the order of the probabilities."""
    image_shape: tuple[int, int, int]
    """Height, width and channels that the model takes."""
    uri: str
    run_id: str | None
    metadata: Mapping[str, Any]
    """What was recorded with the model: class names, data set, its digest, seed, loss."""
    digest: str = ""
    """The SHA-256 of the stored graph with its weights."""

    def predict(
        self,
        images: Images | Sequence[Images],
        *,
        sources: Sequence[object] | None = None,
        labels: Labels | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Predictions:
        """Predict the classes of images, and return a row for each image.

        Args:
            images: one image, a batch, or a list of such: paths of image files, Pillow's images, or
                arrays (H, W), (H, W, C), (N, H, W, C) with C 1, 3 or 4 (transparency is dropped),
                uint8 or floats in 0 .. 1. They are resized to the model's `image_shape`.
            sources: the name of each image; None takes its position.
            labels: the true classes: names (None if unknown) or positions in `classes`.
            batch_size: images that go through the model at once.

        Returns:
            Columns `source`, `prediction` (a class name), `probability` (that of the prediction),
            `p(<class>)` for each class, and `label` (a class name or missing) if labels are given.
            `show()` shows some of the images: see `Predictions`.

        Raises:
            ValueError: an image can't be read, has another type or shape, or the numbers of images,
                sources and labels differ.
        """
        import numpy as np
        import pandas as pd

        from tracking.models.predictions import Predictions

        if batch_size < 1:
            raise ValueError(f"the batch size must be ≥ 1, not {batch_size}")
        batch = as_batch(images, self.image_shape)
        probabilities = self.probabilities(batch, batch_size=batch_size)
        names: Any = range(len(batch))
        if sources is not None:
            # As objects: pandas' strings reject file names that are not UTF-8.
            names = pd.Series(list(sources), dtype=object)
        if len(names) != len(batch):
            raise ValueError(f"{len(batch)} images need as many sources, not {len(names)}")
        best = probabilities.argmax(axis=1)
        columns: dict[str, Any] = {
            "source": names,
            "prediction": [self.classes[k] for k in best],
            "probability": probabilities[np.arange(len(batch)), best],
        }
        columns |= {f"p({name})": probabilities[:, k] for k, name in enumerate(self.classes)}
        if labels is not None:
            columns["label"] = class_names(labels, self.classes, size=len(batch))
        return Predictions.of(columns, batch)

    def probabilities(
        self, images: Images | Sequence[Images], *, batch_size: int = BATCH_SIZE
    ) -> npt.NDArray[np.float32]:
        """Return the probabilities (N, K) of images, as `predict` takes them."""
        import numpy as np
        import torch

        pixels = as_batch(images, self.image_shape)
        probabilities = np.empty((len(pixels), len(self.classes)), np.float32)
        with torch.inference_mode():
            for start in range(0, len(pixels), batch_size):
                batch = slice(start, start + batch_size)
                # A copy, because torch warns about read-only memory such as a mapped file.
                probabilities[batch] = self.model(torch.from_numpy(pixels[batch].copy())).numpy()
        return probabilities

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self._about().items())
        return f"{type(self).__name__}({told})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
            f"<td style='text-align: left'>{html.escape(value)}</td></tr>"
            for name, value in self._about().items()
        )
        return f"<table>{rows}</table>"

    def _about(self) -> dict[str, str]:
        """Return what a reader wants to know of the model, in its order."""
        height, width, channels = self.image_shape
        told = {
            "model": self.uri,
            "run": self.run_id,
            "data set": self.metadata.get("dataset"),
            "loss": self.metadata.get("loss"),
            "classes": f"{len(self.classes)}: {listed(self.classes)}",
            "images": f"{height} × {width} × {channels}",
        }
        return {name: printable(str(value)) for name, value in told.items() if value is not None}


def load_model(uri: str) -> Predictor:
    """Load a model to the CPU: `models:/<id>`, `runs:/<id>/model`, a registered one, or a folder.

    Raises:
        ValueError: there is no such model, `tracking.runs` did not record it, its bytes changed
            since, it could run code (see `tracking.models.safety`), or loading it could take more
            than 2 GB or a minute.
    """
    from hashlib import sha256

    stored = fetch(uri)
    try:
        about = read_description(stored.description)
    except ValueError as error:
        line = f"{shown_uri(uri)} can't be used as a model: {one_line(error)}"
        raise ValueError(line) from error
    shape = about.image_shape
    return Predictor(
        model=_load_graph(shown_uri(uri), stored.graph, shape, num_classes=len(about.classes)),
        classes=about.classes,
        image_shape=shape,
        uri=without_passwords(uri),
        run_id=about.run_id,
        metadata=about.metadata,
        digest=sha256(stored.graph).hexdigest(),
    )


def _load_graph(
    uri: str, archive: bytes, image_shape: tuple[int, int, int], *, num_classes: int
) -> Callable[[Tensor], Tensor]:
    """Return the graph of an archive, after a trial with two images."""
    import torch

    from tracking.models.cost import check_cost, in_parts

    try:
        module = load_graph(archive)
        check_cost(module, image_shape)
        with torch.inference_mode():
            tried = module(torch.zeros(2, *image_shape, dtype=torch.uint8))
        what = (tuple(tried.shape), tried.dtype)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"can't load the model {uri}: {one_line(error)}") from error
    if what != ((2, num_classes), torch.float32):
        raise ValueError(f"can't load the model {uri}: for two images, it gives {what}")
    return in_parts(module, image_shape)
