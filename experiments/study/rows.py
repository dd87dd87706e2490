"""Rows of trials that fit into a width: columns are given up from the last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.study.domains import Choices, Domain
from experiments.study.parameter_types import Configuration, Parameter
from experiments.study.parameters import PARAMETERS
from experiments.study.progress import Row, sparkline
from tracking.text import printable, shortened
from tracking.wording import counted, duration, percent

_LONGEST_TEXT = 20
"""Longer names of losses and networks are shortened."""
_SHORTEST_TEXT = 8
_WIDTH_OF_NUMBER = 8
_LONGEST_CURVE = 12
_NOTE = 24
"""A note with less room than this gets that of the columns before it."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of rows."""

    name: str
    width: int  # of its values
    least: int = 0  # the width that they can be shortened to, if they can
    label: str = ""  # stands before each value
    is_right: bool = False

    @property
    def whole(self) -> int:
        """The width with the label."""
        return self.width + len(self.label) + bool(self.label)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of a row, as wide as its column."""

    name: str
    text: str


class Rows:
    """Arranges rows in columns, the most important first.

    Args:
        search: what is searched, by names of parameters.
        configurations: the configurations of all trials, if they are given.
        trials: how many trials there are.
        epochs: of each trial.
    """

    def __init__(
        self,
        search: Mapping[str, Domain],
        configurations: Sequence[Configuration],
        *,
        trials: int,
        epochs: int,
    ) -> None:
        self.searched = {each.name: each for each in PARAMETERS if each.name in search}
        first = [
            Column(name="trial", width=len(str(max(0, trials - 1))), is_right=True),
            Column(name="outcome", width=max(11, len(f"epoch {epochs}/{epochs}")), least=8),
            Column(name="accuracy", width=len("100.00%"), is_right=True),
        ]
        values = [
            _column(each, search[name], [row.get(name) for row in configurations])
            for name, each in self.searched.items()
        ]
        is_main = [each.is_searched_by_default for each in self.searched.values()]
        if seeds := [str(row["seed"]) for row in configurations if "seed" in row]:
            values.append(Column(name="seed", width=max(map(len, seeds)), label="seed"))
        last = [
            Column(name="epochs", width=len(counted(max(2, epochs), "epoch")), is_right=True),
            Column(name="seconds", width=len("1:00:00"), is_right=True),
            Column(name="curve", width=min(epochs, _LONGEST_CURVE)),
        ]
        self.columns = [*first, *values, *last]
        self.num_main = len(first) + sum(is_main)

    def lines(self, row: Row, width: int | None = None) -> list[list[Cell]]:
        """Return a row's cells in one line; why a trial failed may need a second.

        The end of a note may be beyond the width. Without a width, there are all columns but the
        curve.
        """
        columns, gap = self._fitting(width)
        if width is None:
            columns = [each for each in columns if each.name != "curve"]
            return [[*self._cells(row, columns, gap), *_note(row)]]
        wanted = min(_NOTE, sum(len(cell.text) for cell in _note(row)))
        if row.note and width - _width(columns[: self.num_main], gap) >= wanted:
            while width - _width(columns, gap) < wanted:
                columns.pop()
            return [[*self._cells(row, columns, gap), *_note(row)]]
        if not row.outcome and columns[-1].name in ("epochs", "seconds"):
            # These are empty while it runs: its curve takes their place.
            columns = [each for each in columns if each.name not in ("epochs", "seconds")]
            curve = self.columns[-1]
            room = max(0, width - _width(columns, gap) - gap)
            columns.append(replace(curve, width=min(curve.width, room)))
        cells = self._cells(row, columns, gap)
        return [cells, _note(row)] if row.note and row.outcome == "failed" else [cells]

    def _cells(self, row: Row, columns: Sequence[Column], gap: int) -> list[Cell]:
        cells = []
        for place, column in enumerate(columns):
            text = self._text(row, column)
            text = text.rjust(column.width) if column.is_right else text.ljust(column.width)
            text = f"{column.label} {text}" if column.label else text
            cells.append(Cell(name=column.name, text=" " * gap * (place > 0) + text))
        return cells

    def _fitting(self, width: int | None) -> tuple[list[Column], int]:
        """Return as many columns as fit into a width, and the gap between them.

        Labels go before the main columns do; then names are shortened.
        """
        bare = [replace(each, label="") for each in self.columns]
        for columns, gap in ((self.columns, 2), (self.columns, 1), (bare, 1)):
            fitting = _first(columns, gap, width)
            if len(fitting) >= self.num_main:
                return fitting, gap
        assert width is not None
        fitting = _first([replace(each, width=each.least or each.width) for each in bare], 1, width)
        # What is left goes to the names, the last first: an outcome is hardly ever the longest.
        for place in reversed(range(len(fitting))):
            spare = width - _width(fitting, 1)
            grown = min(bare[place].width, fitting[place].width + max(0, spare))
            fitting[place] = replace(fitting[place], width=grown)
        return fitting, 1

    def _text(self, row: Row, column: Column) -> str:
        """Return what a row has in a column."""
        match column.name:
            case "trial":
                return str(row.trial)
            case "outcome":
                text = row.outcome or f"epoch {row.epochs}/{row.epochs_planned}"
                if len(text) > column.width and not row.outcome:
                    text = text.removeprefix("epoch ")
                return text if len(text) <= column.width else f"{text[: column.width - 1]}…"
            case "accuracy":
                return percent(row.accuracy)
            case "epochs":
                return counted(row.epochs, "epoch") if row.outcome else ""
            case "seconds":
                return "" if row.seconds is None else duration(row.seconds)
            case "curve":
                return sparkline(list(row.accuracies.values()), column.width)
            case "seed":
                return str(row.values.get("seed", "–"))
        parameter = self.searched[column.name]
        text = printable(parameter.text(row.values.get(column.name)))
        return shortened(text, column.width) if parameter.kind is str else text


def _note(row: Row) -> list[Cell]:
    """Return the note of a row as its last cell, if there is one."""
    return [Cell(name="note", text=f"  {printable(row.note)}")] if row.note else []


def _column(parameter: Parameter, domain: Domain, given: Sequence[Any]) -> Column:
    """Return the column of a parameter's values."""
    width, least = _WIDTH_OF_NUMBER, 0
    if isinstance(domain, Choices):
        texts = [parameter.text(value) for value in (*domain.values, *given)]
        width = max(len(printable(text)) for text in texts)
    if parameter.kind is str:
        width = min(width, _LONGEST_TEXT)
        least = min(width, _SHORTEST_TEXT)
    return Column(name=parameter.name, width=width, least=least, label=parameter.short)


def _first(columns: Sequence[Column], gap: int, width: int | None) -> list[Column]:
    """Return the first columns, as many as fit into a width."""
    return list(columns) if width is None else list(_while_it_fits(columns, gap, width))


def _while_it_fits(columns: Sequence[Column], gap: int, width: int) -> Iterator[Column]:
    used = -gap
    for column in columns:
        used += gap + column.whole
        if used > width:
            return
        yield column


def _width(columns: Sequence[Column], gap: int) -> int:
    return sum(each.whole for each in columns) + gap * (len(columns) - 1)
