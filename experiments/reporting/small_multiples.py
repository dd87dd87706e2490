"""Small figures, one a loss: as SVG in the colours of a page that they are in, or together as PNG.

All have the same axes, so fourteen losses can be told apart without fourteen colours; and each is
as wide as a phone, so that none has to be scaled down for one.
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
_SHEET_COLUMNS, _KEY_COLUMNS = 3, 3


class Palette(NamedTuple):
    """The colours of a figure that depend on what it is shown on."""

    ink: str
    grid: str
    accent: str
    others: str


PAPER = Palette(ink="#222222", grid="#dddddd", accent="#0072B2", others="#bbbbbb")
# Stand-ins, as Matplotlib knows no variables of CSS: `_inline` puts the page's own colours there.
_PAGE = Palette(ink="#010101", grid="#020202", accent="#030303", others="#040404")
_OF_THE_PAGE = Palette("currentColor", "var(--grid)", "var(--accent)", "var(--others)")


class SmallFigures(ABC):
    """A way to draw a small figure for each of some losses."""

    height = 250
    margins: tuple[int, int] = (56, 38)
    """What is left of the axes, and below them."""
    losses: Sequence[str]
    """Of which there is something to be drawn."""
    has_key: ClassVar[bool] = False

    @abstractmethod
    def draw(self, axes: Axes, loss: str, palette: Palette) -> None:
        """Draw the figure of a loss."""

    @abstractmethod
    def describe(self, loss: str) -> str:
        """Return what is to be seen in it, in words; or why there is none."""

    def key(self, palette: Palette) -> list[Line2D]:
        """Return what the markers of all of them are."""
        del palette
        return []


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A small figure that was drawn."""

    title: str
    description: str
    svg: str = ""
    """Empty where there is nothing to be drawn."""


def panels(small: SmallFigures, losses: Sequence[str], title: str) -> list[Panel]:
    """Return the small figures of losses as SVG.

    Args:
        small: how they are drawn.
        losses: all of which the reader expects one.
        title: of all of them, which no others on the page have.
    """
    return [
        Panel(
            title=loss,
            description=small.describe(loss),
            svg=_panel(small, loss, f"{title}: {loss}") if loss in small.losses else "",
        )
        for loss in losses
    ]


def _panel(small: SmallFigures, loss: str, label: str) -> str:
    from matplotlib.figure import Figure

    left, bottom = small.margins
    width, height = 1 - (left + 8) / _WIDTH, 1 - (bottom + 6) / small.height
    with _plain_style(_PAGE):
        figure = Figure(figsize=(_WIDTH / _PER_INCH, small.height / _PER_INCH))
        axes = figure.add_axes((left / _WIDTH, bottom / small.height, width, height))
        small.draw(axes, loss, _PAGE)
        return _inline(figure, label)


def key(small: SmallFigures) -> str:
    """Return what the markers of small figures are, as SVG."""
    from matplotlib.figure import Figure

    with _plain_style(_PAGE):
        entries = small.key(_PAGE)
        height = 18 * math.ceil(len(entries) / _KEY_COLUMNS) + 6
        figure = Figure(figsize=(_WIDTH / _PER_INCH, height / _PER_INCH))
        figure.legend(
            # Matplotlib goes column by column.
            handles=[
                entry for start in range(_KEY_COLUMNS) for entry in entries[start::_KEY_COLUMNS]
            ],
            loc="center",
            ncols=_KEY_COLUMNS,
            frameon=False,
            handlelength=1.6,
            columnspacing=1,
            handletextpad=0.4,
            borderpad=0,
        )
        return _inline(figure, f"Key: {', '.join(str(entry.get_label()) for entry in entries)}")


def sheet(small: SmallFigures) -> bytes:
    """Return all small figures as one PNG, on white."""
    from matplotlib.figure import Figure

    columns = min(_SHEET_COLUMNS, len(small.losses))
    rows = math.ceil(len(small.losses) / columns)
    stream = io.BytesIO()
    with _plain_style(PAPER):
        size = (columns * _WIDTH / _PER_INCH, rows * (small.height + 20) / _PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        for number, loss in enumerate(small.losses, start=1):
            axes = figure.add_subplot(rows, columns, number)
            small.draw(axes, loss, PAPER)
            axes.set_title(printable(loss), parse_math=False)
        if small.has_key:
            entries = small.key(PAPER)
            figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False)
        _save(figure, stream, format="png", dpi=2 * _PER_INCH, facecolor="white")
    return stream.getvalue()


def _inline(figure: Figure, label: str) -> str:
    """Return a figure as SVG that can be part of a page, beside others, in the page's colours.

    Args:
        figure: drawn in the colours of `_PAGE`.
        label: what it is, for those who don't see it; no other figure of the page has the same.
    """
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": label}):  # else its identifiers are random
        _save(figure, stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314 - it is Matplotlib's own
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    targets = set(re.findall(r"#([\w-]+)", values))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # the latter would be for a whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if attributes.get("id") not in targets:
            attributes.pop("id", None)  # "axes_1" is in each of them
        if "style" in attributes:
            attributes["style"] = _recoloured(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
    for name in ("width", "height", "version"):
        root.attrib.pop(name)
    root.attrib.update({"role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Return a name without its namespace: in a page, those of SVG have none."""
    return name.rpartition("}")[2]


def _recoloured(style: str) -> str:
    for stand_in, color in zip(_PAGE, _OF_THE_PAGE, strict=True):
        style = style.replace(stand_in, color)
    return style


def _save(figure: Figure, stream: io.BytesIO, **how: Any) -> None:
    with warnings.catch_warnings():
        # Of a script that the font lacks, a PNG shows boxes; the tables have the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, **how)


@contextmanager
def _plain_style(palette: Palette) -> Iterator[None]:
    """Use Matplotlib's own defaults meanwhile, in these colours: a matplotlibrc may ask for TeX."""
    import matplotlib as mpl
    from matplotlib import style

    settings: dict[Any, Any] = {
        "font.size": FONT_SIZE,
        "axes.labelsize": FONT_SIZE,
        "axes.titlesize": FONT_SIZE,
        "legend.fontsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE,
        "ytick.labelsize": FONT_SIZE,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.ink,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
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
