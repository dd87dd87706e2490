"""How the sentences of a comparison write numbers and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """Return a difference of shares in percent points, without the unit."""
    return f"{100 * difference:z.2f}".replace("-", "−")


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return names as a list in a sentence."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def quoted(losses: Iterable[str]) -> list[str]:
    """Return the names of losses in backticks."""
    return [f"`{loss}`" for loss in losses]


def p_text(p: float) -> str:
    """Return a p-value with its sign."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
