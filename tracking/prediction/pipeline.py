"""Label all images of a source: from its chunks through the model into a draft."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracking.prediction.formats import table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tracking.models.predictor import Predictor
    from tracking.prediction.chunks import Chunk, Source
    from tracking.prediction.drafts import Draft
    from tracking.prediction.formats import Format

# Read and written at once, in images: enough to make the cost of a chunk small.
CHUNK = 1024


def chunk_size(batch_size: int) -> int:
    """Return how many images are read and written at once: a multiple of what the model takes."""
    return batch_size * max(1, CHUNK // batch_size)


def label(
    predictor: Predictor,
    source: Source,
    draft: Draft,
    out: Format,
    *,
    batch_size: int,
    strict: bool = False,
) -> Tally:
    """Label all images from where the draft ends, and write them down.

    Args:
        strict: raise ValueError at the first image that can't be read.
    """
    tally = Tally(predictor.classes, draft.state)
    with _progress(source.size, done=draft.rows) as advance, _quiet_pillow():
        for chunk in source.read(chunk_size(batch_size), draft.rows):
            if strict and chunk.errors:
                index, error = min(chunk.errors.items())
                raise ValueError(f"{chunk.names[index]!r} {error}")
            probabilities = predictor.probabilities(chunk.images, batch_size=batch_size)
            tally.add(chunk, probabilities)
            rows = out.rows(table(chunk, probabilities, predictor.classes))
            draft.append(rows, rows=len(chunk.names), state=tally.state())
            advance(len(chunk.names))
    return tally


class Tally:
    """How often each class was predicted, was true, and was both; and how many images failed."""

    def __init__(self, classes: Sequence[str], state: Mapping[str, Any]) -> None:
        import numpy as np

        self.classes = classes
        nothing = [0] * len(classes)
        self.predicted, self.true, self.correct = (
            np.array(state.get(name, nothing), np.int64)
            for name in ("predicted", "true", "correct")
        )
        self.failed: int = state.get("failed", 0)
        self.has_labels: bool = state.get("has_labels", False)

    def state(self) -> dict[str, Any]:
        """Return it as JSON can hold it, for the constructor."""
        return {
            "predicted": self.predicted.tolist(),
            "true": self.true.tolist(),
            "correct": self.correct.tolist(),
            "failed": self.failed,
            "has_labels": self.has_labels,
        }

    def add(self, chunk: Chunk, probabilities: npt.NDArray[np.float32]) -> None:
        """Count the images of a chunk; in those that failed there is nothing to be right about."""
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
    """Keep Pillow's warnings of odd files from standard error: each such file has its row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _progress(total: int, *, done: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many images are done; hand out what is to be told of each step."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    import time

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, {task.fields[rate]} a second, left:"),
        TimeRemainingColumn(),
    )
    start, before = time.monotonic(), done
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done, rate="–")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = (done - before) / (time.monotonic() - start)
            progress.update(task, completed=done, rate=f"{rate:,.0f}")

        yield advance


def use_available_cores() -> None:
    """Have PyTorch compute on no more cores than a container has a quota for."""
    import torch

    from cnn.devices import num_cores

    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
