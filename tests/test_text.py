"""Texts of others, as they are shown: in a terminal, a spreadsheet, Markdown."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tracking.text import escape_formula, escape_formulas, escaped, escaped_in_notes, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 猫, ½", "plain, é, 猫, ½"),
        ("red\x1b[2J\x1b]0;title\x07", "red\\x1b[2J\\x1b]0;title\\x07"),
        ("one\ntwo\r\x85\u2028", "one\\ntwo\\r\\x85\\u2028"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\x9b31m\x00\x7f", "\\x9b31m\\x00\\x7f"),
        ("r\udce9d", "r\\udce9d"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert escaped(text).count("\n") == 0


def test_what_a_description_would_read_is_escaped() -> None:
    assert escaped_in_notes("R&D <b>|_x_ [y](z)\n`#~*\\") == (
        r"R&amp;D &lt;b&gt;\|\_x\_ \[y\](z)\\n\`\#\~\*\\"
    )


@pytest.mark.parametrize("sign", list("=+-@\t\r\n'＝＋－＠"))
def test_no_cell_is_a_formula(sign: str) -> None:
    assert escape_formula(f"{sign}1+1") == f"'{sign}1+1"
    assert escape_formula(f"a{sign}1") == f"a{sign}1"


def test_many_cells_are_escaped_as_one_is() -> None:
    texts = ["=1", "a", "", "'", "＝1", "é=", "\n"]
    assert escape_formulas(pa.array([*texts, None])).to_pylist() == [
        *map(escape_formula, texts),
        None,
    ]
