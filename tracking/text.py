"""Foreign texts (file names, class names, names of runs), made safe to show."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# A spreadsheet runs a cell that starts so as a formula (OWASP, CSV injection); with Japanese input,
# full-width signs too. A leading apostrophe is escaped as well, so that reading can undo it.
_FORMULA = "^[=+\\-@＝＋－＠\t\r\n']"

# Characters of a name in a figure, and in a list of names.
_LONGEST_NAME, _LONGEST_LISTED = 24, 80


def printable(text: str) -> str:
    """Return a text with an escape for each character that a terminal may obey or not show.

    These are line ends, control characters (ESC), marks that reverse the direction of the text
    (U+202E), separators except the space, and bytes of a file name that are not UTF-8.
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name on one line of at most `longest` characters: the middle is left out."""
    text = printable(name)
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return up to `limit` names in quotes, and how many more there are."""
    every = list(names)
    shown = ", ".join(repr(shortened(name, _LONGEST_LISTED)) for name in every[:limit])
    more = len(every) - limit
    return (shown or "nothing") + (f" and {more} more" if more > 0 else "")


def escaped(text: str) -> str:
    """Return a text on one line, with Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>|$~&#])", r"\\\1", printable(text))


def escaped_in_notes(text: str) -> str:
    """Return a text on one line for MLflow's descriptions, whose Markdown has fewer escapes."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(printable(text), quote=False))


def escape_formula(text: str) -> str:
    """Return a text that no spreadsheet runs: an apostrophe precedes a formula."""
    return f"'{text}" if re.match(_FORMULA, text) else text


def escape_formulas(texts: pa.Array | pa.ChunkedArray) -> Any:
    """Return texts escaped as by `escape_formula`, in Arrow: fast enough for millions."""
    from pyarrow import compute

    risky = compute.match_substring_regex(texts, _FORMULA)
    return compute.if_else(risky, compute.binary_join_element_wise("'", texts, ""), texts)
