"""Load a stored model and predict with it. Loading runs no code of the model's author."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracking.errors import one_line, without_passwords
from tracking.models.description import read_description
from tracking.models.fetching import fetch, shown_uri
from tracking.models.labels import class_names
from tracking.models.safety import load_graph

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from torch import Tensor

    from tracking.models.labels import Labels

    Images = npt.NDArray[np.uint8] | Tensor


# The fastest of 16 to 4,096 on two idle cores of an AMD EPYC: 7,350 images/s with 128, 5,170 with
# 256, 4,150 with 1,024. Larger batches cause 30 to 90 page faults an image.
BATCH_SIZE = 128


@dataclass(frozen=True, kw_only=True, eq=False)
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
    ) -> pd.DataFrame:
        """Predict the classes of images, and return a row for each image.

        Args:
            images: uint8, (N, H, W, C) or one image (H, W, C), or a list of such.
            sources: the name of each image; None takes its position.
            labels: the true classes: names (None if unknown) or positions in `classes`.
            batch_size: images that go through the model at once.

        Returns:
            Columns `source`, `prediction` (a class name), `probability` (that of the prediction),
            `p(<class>)` for each class, and `label` (a class name or missing) if labels are given.

        Raises:
            ValueError: the images have another type or shape, or the numbers of images, sources
                and labels differ.
        """
        import numpy as np
        import pandas as pd

        if batch_size < 1:
            raise ValueError(f"the batch size must be ≥ 1, not {batch_size}")
        batch = self._as_array(images)
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
        return pd.DataFrame(columns)

    def _as_array(self, images: Images | Sequence[Images]) -> npt.NDArray[np.uint8]:
        import numpy as np

        if isinstance(images, (list, tuple)):
            parts = [self._as_array(image) for image in images]
            return np.concatenate([np.empty((0, *self.image_shape), np.uint8), *parts])
        array = np.asarray(images)
        if array.ndim == 3:
            array = array[np.newaxis]
        if array.dtype != np.uint8 or array.shape[1:] != self.image_shape:
            shape = ", ".join(str(size) for size in self.image_shape)
            raise ValueError(
                f"images must be uint8 (0 to 255) and (N, {shape}) or ({shape}): "
                f"these are {array.dtype} {np.shape(images)}"
            )
        return array

    def probabilities(
        self, images: npt.NDArray[np.uint8], *, batch_size: int = BATCH_SIZE
    ) -> npt.NDArray[np.float32]:
        """Return the probabilities (N, K) of images (N, H, W, C), as `predict` takes them."""
        import numpy as np
        import torch

        images = self._as_array(images)
        probabilities = np.empty((len(images), len(self.classes)), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                # A copy, because torch warns about read-only memory such as a mapped file.
                probabilities[batch] = self.model(torch.from_numpy(images[batch].copy())).numpy()
        return probabilities


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
