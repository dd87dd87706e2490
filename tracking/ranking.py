"""The one order of runs and of an Optuna study's trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the order of runs, or of an Optuna study's trials, is made of."""

    value: float
    """What is best: the higher the better."""
    loss: str | None
    """The name of the loss."""
    val_loss: float | None
    start: int
    """When it was started, or the trial's number."""


def best_first(entries: Sequence[Entry]) -> list[int]:
    """Return the positions of entries, the best first. This is the one order of runs and trials.

    Equal values are settled by `val/loss` only among runs of the same loss, as those of different
    losses are in different units. So of the losses that came to the same value, the one whose run
    was started first is first, with all its runs: the lowest `val/loss`, then the earliest start.
    Thus the order of the runs of one loss is the same whether other losses are beside it or not.
    """
    first: dict[tuple[float, str | None], int] = {}
    for entry in entries:
        key = entry.value, entry.loss
        first[key] = min(first.get(key, entry.start), entry.start)

    def rank(position: int) -> tuple[object, ...]:
        entry = entries[position]
        value = (1, 0.0) if math.isnan(entry.value) else (0, -entry.value)
        loss = (1, 0.0) if _is_no_number(entry.val_loss) else (0, entry.val_loss)
        of_loss = first[entry.value, entry.loss], entry.loss or ""
        return value, of_loss, loss, entry.start

    return sorted(range(len(entries)), key=rank)


def _is_no_number(value: float | None) -> bool:
    return value is None or math.isnan(value)
