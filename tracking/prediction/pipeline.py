"""Predict all images of a source: from its chunks through the model into a draft."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracking.prediction.formats import table
from tracking.progress import progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tracking.models.predictor import Predictor
    from tracking.prediction.chunks import Chunk, Source
    from tracking.prediction.drafts import Draft
    from tracking.prediction.formats import Format

# Images that are read and written at once: with so many, the cost of a chunk is small. Fewer, if
# they take more bytes: three chunks are in memory.
CHUNK = 1024
_CHUNK_BYTES = 2**26

_COUNTS = ("predicted", "true", "correct")


def chunk_size(batch_size: int, image_shape: Sequence[int]) -> int:
    """Return how many images are read and written at once: a multiple of the batch size."""
    most = min(CHUNK, _CHUNK_BYTES // math.prod(image_shape))
    return batch_size * max(1, most // batch_size)


def predict_images(
    predictor: Predictor,
    source: Source,
    draft: Draft,
    out: Format,
    *,
    batch_size: int,
    strict: bool = False,
) -> RunningCounts:
    """Predict all images that the draft does not have yet, and append their rows.

    Args:
        strict: raise ValueError at the first image that can't be read.
    """
    counts = RunningCounts(predictor.classes, draft.state)
    with progress("images", source.size, done=draft.rows) as advance, _quiet_pillow():
        size = chunk_size(batch_size, predictor.image_shape)
        for chunk in source.read(size, draft.rows):
            if strict and chunk.errors:
                index, error = min(chunk.errors.items())
                raise ValueError(f"{chunk.names[index]!r} {error}")
            probabilities = predictor.probabilities(chunk.images, batch_size=batch_size)
            counts.add(chunk, probabilities)
            rows = out.rows(table(chunk, probabilities, predictor.classes))
            draft.append(rows, rows=len(chunk.names), state=counts.state())
            advance(len(chunk.names))
    return counts


class RunningCounts:
    """How often each class was predicted, true, and both; and how many images failed."""

    def __init__(self, classes: Sequence[str], state: Mapping[str, Any]) -> None:
        import numpy as np

        self.classes = classes
        zeros = [0] * len(classes)
        self.predicted, self.true, self.correct = (
            np.array(state.get(name, zeros), np.int64) for name in _COUNTS
        )
        self.failed: int = state.get("failed", 0)
        self.has_labels: bool = state.get("has_labels", False)

    def state(self) -> dict[str, Any]:
        """Return the counts in JSON's types, for the constructor."""
        counts = {name: getattr(self, name).tolist() for name in _COUNTS}
        return {**counts, "failed": self.failed, "has_labels": self.has_labels}

    def add(self, chunk: Chunk, probabilities: npt.NDArray[np.float32]) -> None:
        """Count the images of a chunk. A failed image counts as failed only."""
        import numpy as np

        self.failed += len(chunk.errors)
        best = probabilities.argmax(axis=1)
        self.predicted += np.bincount(best, minlength=len(self.classes))
        if chunk.labels is None:
            return
        position = {name: k for k, name in enumerate(self.classes)}
        read = [name for i, name in enumerate(chunk.labels) if i not in chunk.errors]
        true = np.array([-1 if name is None else position[name] for name in read], np.int64)
        self.has_labels |= bool((true >= 0).any())
        self.true += np.bincount(true[true >= 0], minlength=len(self.classes))
        self.correct += np.bincount(true[true == best], minlength=len(self.classes))

    def __str__(self) -> str:
        import pandas as pd

        columns = {"predicted": self.predicted}
        if self.has_labels:
            columns |= {"true": self.true, "correct": self.correct}
        counts = pd.DataFrame(columns, index=pd.Index(list(self.classes), dtype=object))
        counts = counts[counts.any(axis=1)].sort_index()
        if not len(counts):
            return "no image could be read"
        lines = [counts.rename_axis("class").reset_index().to_string(index=False)]
        labelled, correct = self.true.sum(), self.correct.sum()
        if labelled:
            lines.append(f"\naccuracy {100 * correct / labelled:.2f} % ({correct} of {labelled})")
        return "\n".join(lines)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Hide Pillow's warnings about files: the row of each file has its error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def use_available_cores() -> None:
    """Limit PyTorch's threads to the cores of the container's quota."""
    import torch

    from cnn.devices import num_cores

    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
