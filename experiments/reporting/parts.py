"""The parts of a report, for every format: sections of tables, figures and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.reporting.small_multiples import Panel, SmallMultiples


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Texts; the first of a row names it."""
    data: str = ""
    """The entry of `TABLES` with its data."""
    kind: str = "table"
    """table, or facts: each row is a word and a text."""


Columns = Mapping[str, Callable[[Mapping[Any, Any]], str]]
"""Of a table: the head of each column, and the text of a row in it."""


def make_table(
    caption: str, columns: Columns, records: Iterable[Mapping[Any, Any]], data: str
) -> Table:
    """Return a table of records."""
    rows = [[text(record) for text in columns.values()] for record in records]
    return Table(caption=caption, heads=list(columns), rows=rows, data=data)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Small multiples, a panel for each loss."""

    multiples: SmallMultiples
    panels: Sequence[Panel]
    kind: str = "gallery"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """An interactive plot."""

    name: str
    caption: str
    figure: Mapping[str, Any]
    """For Plotly's script."""
    data: str
    kind: str = "plot"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of fixed colours and size."""

    name: str
    """One of `sections.FIGURES`."""
    caption: str
    description: str
    """What it shows, for those who can't see it."""
    png: bytes
    kind: str = "picture"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report, under a heading."""

    id: str
    title: str
    texts: Sequence[str] = ()
    items: Sequence[Table | Gallery | Plot | Picture] = ()


@dataclass(frozen=True, kw_only=True)
class Note:
    """A caveat."""

    text: str
    command: str = ""
    """What to type, if there is such a command."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report."""

    name: str
    question: str = "Which loss wins?"
    answer: Sequence[str]
    """Two sentences at most."""
    figure: Gallery | None
    """The result; None if there is none."""
    missing: Sequence[str]
    warnings: Sequence[Note]
    """Those that matter most."""
    more_warnings: Sequence[Note]
    sections: Sequence[Section]
    tables: Mapping[str, pd.DataFrame]
    """By the names of `TABLES`."""


def interval(row: Mapping[Any, Any], name: str, factor: float, digits: str) -> str:
    """Return the mean of a metric, with its interval if there is one."""
    mean = row.get(f"{name}_mean", row.get(name))
    low, high = factor * row[f"{name}_low"], factor * row[f"{name}_high"]
    text = number(factor * mean, digits)
    return text if pd.isna(low) else f"{text} ({number(low, digits)} to {number(high, digits)})"


def lead(pair: Mapping[Any, Any]) -> str:
    """Return the lead of the first of a pair in points, with the interval if there is one."""
    ends = {f"difference_{end}": pair[end] for end in ("low", "high")}
    return interval({"difference": pair["difference"], **ends}, "difference", 100, "+.2f")


def number(value: Any, digits: str) -> str:
    """Return a number as text, and a dash for NaN."""
    return "–" if pd.isna(value) else f"{value:{digits}}".replace("-", "−")


def plain(value: Any) -> str:
    """Return a value of a plan as text."""
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
