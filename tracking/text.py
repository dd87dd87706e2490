"""Texts of others (file names, class names, runs' names) as they can be shown without harm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# A spreadsheet takes a cell that starts so for a formula (OWASP, CSV injection): full-width signs,
# too, where Japanese is written. The apostrophe is among them so that what is put before can be
# told from what was there.
_FORMULA = "^[=+\\-@＝＋－＠\t\r\n']"

# In a figure, and in a list of names.
_LONGEST_NAME, _LONGEST_LISTED = 24, 80


def printable(text: str) -> str:
    """Return a text with an escape for each sign that a terminal may obey, or that can't be seen.

    These are line ends, ESC and other control characters, signs that turn the direction of what
    follows (U+202E, say), separators but the space, and the bytes of a file name that are no UTF-8.
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a class name as it fits a figure: on one line, and without its middle if it's long."""
    text = printable(name)
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return names in quotes, as many as a line takes: some of them at most."""
    shown: list[str] = []
    more = 0
    for name in names:
        if len(shown) < limit:
            shown.append(repr(shortened(name, _LONGEST_LISTED)))
        else:
            more += 1
    return (", ".join(shown) or "nothing") + (f" and {more} more" if more else "")


def escaped(text: str) -> str:
    """Return a text that is no Markdown and no HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|$~&#])", r"\\\1", printable(text))


def escape_formula(text: str) -> str:
    """Return a text that a spreadsheet takes for no formula: an apostrophe is put before one."""
    return f"'{text}" if re.match(_FORMULA, text) else text


def escape_formulas(texts: pa.Array | pa.ChunkedArray) -> Any:
    """Return texts, each as `escape_formula` does it: Arrow's way, for millions of them."""
    from pyarrow import compute

    risky = compute.match_substring_regex(texts, _FORMULA)
    return compute.if_else(risky, compute.binary_join_element_wise("'", texts, ""), texts)
