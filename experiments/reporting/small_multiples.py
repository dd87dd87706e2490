"""Small multiples, a panel for each loss: SVG in the colours of the page, or one PNG of all panels.

All panels have the same axes, so fourteen losses need no fourteen colours. Each is as wide as a
phone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from xml.etree import ElementTree

from tracking.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FONT_SIZE = 11
"""In pixels, as all lengths here."""
_WIDTH = 340
_PER_INCH = 72  # so that a point is a pixel
_COLUMNS = 3


_COLORS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


class Palette(NamedTuple):
    """The colours of a figure that depend on its background."""

    ink: str
    grid: str
    accent: str
    others: str


PAPER = Palette(ink="#222222", grid="#dddddd", accent="#0072B2", others="#bbbbbb")
# Matplotlib has no CSS variables: `_inline` replaces these colours by the page's own.
_PAGE = Palette(ink="#010101", grid="#020202", accent="#030303", others="#040404")
_OF_THE_PAGE = Palette("currentColor", "var(--grid)", "var(--accent)", "var(--others)")


class SmallMultiples(ABC):
    """Draws and describes a panel for each loss."""

    name: ClassVar[str]
    """One of `sections.FIGURES`."""
    data: ClassVar[str]
    """The entry of `sections.TABLES` with its data."""
    title: ClassVar[str]
    caption: str
    height = 250
    margins: tuple[int, int] = (56, 38)
    """The space left of the axes, and below them."""
    losses: Sequence[str]
    """The losses with something to draw; `ResultFigure` has other panels."""
    has_legend: ClassVar[bool] = False

    @abstractmethod
    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the panel of a loss."""

    @abstractmethod
    def describe(self, loss: str) -> str:
        """Describe the panel of a loss in words, or say why there is none."""

    def legend(self, palette: Palette) -> list[Line2D]:
        """Return the entries of the legend that all panels share."""
        del palette
        return []


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel that was drawn."""

    title: str
    description: str
    svg: str = ""
    """Empty if there is nothing to draw."""


def draw_panels(multiples: SmallMultiples, losses: Sequence[str]) -> list[Panel]:
    """Draw the panels of all losses as SVG."""
    return [
        Panel(
            title=loss,
            description=multiples.describe(loss),
            svg=_panel(multiples, loss) if loss in multiples.losses else "",
        )
        for loss in losses
    ]


def _panel(multiples: SmallMultiples, loss: str) -> str:
    from matplotlib.figure import Figure

    left, bottom = multiples.margins
    width, height = 1 - (left + 8) / _WIDTH, 1 - (bottom + 6) / multiples.height
    with _plain_style(_PAGE):
        figure = Figure(figsize=(_WIDTH / _PER_INCH, multiples.height / _PER_INCH))
        axes = figure.add_axes((left / _WIDTH, bottom / multiples.height, width, height))
        multiples.draw(axes, loss, _PAGE)
        return _inline(figure, f"{multiples.title}: {loss}")


def draw_legend(multiples: SmallMultiples) -> str:
    """Draw the legend as SVG."""
    from matplotlib.figure import Figure

    with _plain_style(_PAGE):
        entries = multiples.legend(_PAGE)
        height = 18 * math.ceil(len(entries) / _COLUMNS) + 6
        figure = Figure(figsize=(_WIDTH / _PER_INCH, height / _PER_INCH))
        figure.legend(
            # Matplotlib fills column by column.
            handles=[entry for start in range(_COLUMNS) for entry in entries[start::_COLUMNS]],
            loc="center",
            ncols=_COLUMNS,
            frameon=False,
            handlelength=1.6,
            columnspacing=1,
            handletextpad=0.4,
            borderpad=0,
        )
        return _inline(figure, f"Legend: {', '.join(str(entry.get_label()) for entry in entries)}")


def draw_png(multiples: SmallMultiples) -> bytes:
    """Draw all panels as one PNG, on white."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(multiples.losses))
    rows = math.ceil(len(multiples.losses) / columns)
    stream = io.BytesIO()
    with _plain_style(PAPER):
        size = (columns * _WIDTH / _PER_INCH, rows * (multiples.height + 20) / _PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        for number, loss in enumerate(multiples.losses, start=1):
            axes = figure.add_subplot(rows, columns, number)
            multiples.draw(axes, loss, PAPER)
            axes.set_title(printable(loss), parse_math=False)
        if multiples.has_legend:
            entries = multiples.legend(PAPER)
            figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False)
        _save(figure, stream, format="png", dpi=2 * _PER_INCH, facecolor="white")
    return stream.getvalue()


def _inline(figure: Figure, label: str) -> str:
    """Return a figure in the colours of `_PAGE` as SVG in the page's own colours.

    The label is for screen readers, and unique on the page.
    """
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": label}):  # its identifiers would be random
        _save(figure, stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314 - it is Matplotlib's own
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    targets = set(re.findall(r"#([\w-]+)", values))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # a style would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if attributes.get("id") not in targets:
            attributes.pop("id", None)  # other figures have the same, "axes_1"
        if "style" in attributes:
            attributes["style"] = _recoloured(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
    for name in ("width", "height", "version"):
        root.attrib.pop(name)
    root.attrib.update({"role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Return a name without its namespace, as SVG has it in a page."""
    return name.rpartition("}")[2]


def _recoloured(style: str) -> str:
    for stand_in, color in zip(_PAGE, _OF_THE_PAGE, strict=True):
        style = style.replace(stand_in, color)
    return style


def _save(figure: Figure, stream: io.BytesIO, **how: Any) -> None:
    with warnings.catch_warnings():
        # A PNG shows boxes for a script that the font lacks; the tables show the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, **how)


@contextmanager
def _plain_style(palette: Palette) -> Iterator[None]:
    """Use Matplotlib's defaults in these colours; a user's matplotlibrc may ask for TeX."""
    import matplotlib as mpl
    from matplotlib import style

    settings: dict[Any, Any] = {
        "font.size": FONT_SIZE,
        "axes.titlesize": "medium",
        **dict.fromkeys(_COLORS, palette.ink),
        "grid.color": palette.grid,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "svg.fonttype": "none",
    }
    with style.context("default"), mpl.rc_context(settings):
        yield
