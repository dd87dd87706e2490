"""The table of predictions that a model returns, which can show its images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tracking.examples import ExamplePicker, draw_examples

if TYPE_CHECKING:
    import numpy.typing as npt

_MOST_BYTES = 2**28
"""The images of larger batches are not kept."""


class Predictions(pd.DataFrame):
    """A row for each image: see `Predictor.predict`. Pandas' operations keep the images."""

    _metadata = ["_images"]  # noqa: RUF012 -- pandas wants a list
    _images: _Images | None

    @property
    def _constructor(self) -> type[Predictions]:
        return Predictions

    @classmethod
    def of(cls, columns: dict[str, Any], images: npt.NDArray[np.uint8]) -> Predictions:
        """Return a table of these columns, a row for each of the images (N, H, W, C)."""
        table = cls(columns)
        kept = images if images.nbytes <= _MOST_BYTES else None
        object.__setattr__(table, "_images", _Images(pixels=kept, sources=table["source"]))
        return table

    def show(self, count: int = 12) -> Sheet:
        """Return a sheet of some images, each with its probabilities beside the target.

        Of a table with labels, these are the surest right ones, the surest wrong ones and the least
        sure ones, `count` in all; of one without, the surest and the least sure ones. In a notebook
        the sheet is a picture; `save` writes it as PNG.

        Raises:
            ValueError: `count` is < 1, the table is empty or not one of predictions any more, or
                the batch was too large to be kept (more than 256 MiB).
        """
        if count < 1:
            raise ValueError(f"the number of images to show must be ≥ 1, not {count}")
        images = getattr(self, "_images", None)
        scores = [name for name in self.columns if name.startswith("p(") and name.endswith(")")]
        if images is None or not scores or not images.fit(self):
            raise ValueError("these are not rows of predictions with the index that they came with")
        if images.pixels is None:
            raise ValueError(
                f"the images of more than {_MOST_BYTES // 2**20} MiB are not kept: predict fewer"
            )
        if not len(self):
            raise ValueError("there are no rows to show")
        classes = [name[2:-1] for name in scores]
        labels = np.full(len(self), -1)
        if "label" in self:
            labels = pd.Index(classes).get_indexer(pd.Index(self["label"], dtype=object))
        rows = self.index.to_numpy()
        has_labels = bool((labels >= 0).any())
        picker = ExamplePicker(max(1, count // (3 if has_labels else 2)))
        probabilities = self[scores].to_numpy(np.float32)
        picker.add(rows, [str(name) for name in self["source"]], labels, probabilities)
        file = io.BytesIO()
        draw_examples(picker.examples(classes, images.pixels.__getitem__), file)
        return Sheet(file.getvalue())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    """The images of a batch, and the names by which a row is recognised."""

    pixels: npt.NDArray[np.uint8] | None
    sources: pd.Series[Any]

    def fit(self, table: pd.DataFrame) -> bool:
        """Return whether each row of a table still has the index of its image."""
        if "source" not in table or not table.index.isin(self.sources.index).all():
            return False
        return bool(table["source"].equals(self.sources.loc[table.index]))


@dataclass(frozen=True)
class Sheet:
    """A picture: a notebook shows it."""

    png: bytes

    def save(self, file: str | Path) -> None:
        """Write it as PNG."""
        Path(file).write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.png):,} bytes of PNG: save(FILE) writes them)"
