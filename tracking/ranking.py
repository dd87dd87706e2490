"""The one order of runs and of an Optuna study's trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The values of a run or a trial that decide its rank."""

    value: float
    """Higher is better."""
    loss: str | None
    """The name of the loss."""
    val_loss: float | None
    start: int
    """The time of the start, or the trial's number."""


def best_first(entries: Sequence[Entry]) -> list[int]:
    """Return the positions of entries, the best first.

    Among equal values, the loss whose run started first comes first, with all of its runs. Within
    a loss, the lowest `val/loss` comes first, then the earliest start. `val/loss` never decides
    between two losses: their units differ. So other losses never change the order within one.
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
