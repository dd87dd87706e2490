"""What all figures here share: Matplotlib's own style, and how they become PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from matplotlib.figure import Figure

DOTS_PER_INCH = 120

# Of Okabe and Ito (2008): colour-blind readers can tell them apart.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


@contextmanager
def plain_style() -> Iterator[None]:
    """Use Matplotlib's own defaults: a user's matplotlibrc may require TeX."""
    from matplotlib import style

    with style.context("default"):
        yield


def save(figure: Figure, file: Path | BinaryIO) -> None:
    """Save a figure as PNG, made without pyplot."""
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; the tables have the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
