"""How the sentences of a comparison write numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from experiments.comparison.intervals import ALPHA

Row = Mapping[Hashable, Any]
"""Of a table of `experiments.comparison`."""

INTERVAL = f"{100 * (1 - ALPHA):g} % interval"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """Return a difference of shares in percent points, without the unit."""
    return f"{100 * difference:z.2f}".replace("-", "−")


def no_more_than(pair: Row) -> str:
    """Return how large a pair's difference may be, by its simultaneous bounds, rounded up."""
    most = max(abs(pair["bound_low"]), abs(pair["bound_high"]))
    return f"no more than {math.ceil(round(1e4 * most, 6)) / 100:.2f} points"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return names as a list in a sentence."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def quoted(losses: Iterable[str]) -> list[str]:
    """Return the names of losses in backticks."""
    return [f"`{loss}`" for loss in losses]


def p_text(p: float) -> str:
    """Return a p-value with its sign."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
