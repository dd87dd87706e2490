"""The report of a comparison as a page and as Markdown, with CSV and PNG files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import pyarrow as pa
from markupsafe import Markup

from experiments.reporting.parts import Gallery, Picture, Report
from experiments.reporting.sections import FIGURES, TABLES
from experiments.reporting.small_multiples import SmallMultiples, draw_legend, draw_png
from tracking.files import open_folder, writing
from tracking.prediction.formats import to_csv
from tracking.text import escaped, printable

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment
    from experiments.comparison.results import Results

TEMPLATES = Path(__file__).parent / "templates"

FILES = (
    *(f"data/{name}.csv" for name in TABLES),
    *(f"figures/{name}.png" for name in FIGURES),
    "report.md",
    "report.html",
)
"""All files that a report may have, in the order in which they are replaced."""

_EMBEDDED_BYTES = 500_000
"""The page includes the data of tables up to this size."""


def contents(report: Report) -> dict[str, bytes]:
    """Return those of `FILES` that a report has."""
    tables = {f"data/{name}.csv": csv(table) for name, table in report.tables.items()}
    shown = [report.figure, *(item for section in report.sections for item in section.items)]
    pictures = {
        f"figures/{item.multiples.name}.png": draw_png(item.multiples)
        for item in shown
        if isinstance(item, Gallery)
    }
    sheets = {f"figures/{item.name}.png": item.png for item in shown if isinstance(item, Picture)}
    pages = {"report.md": markdown(report).encode(), "report.html": html(report).encode()}
    return tables | pictures | sheets | pages


def csv(table: pd.DataFrame) -> bytes:
    """Return a table as CSV in which a spreadsheet finds no formula."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [
        field.with_type(pa.string()) if field.type in _TEXTS else field for field in arrow.schema
    ]
    arrow = arrow.replace_schema_metadata().cast(pa.schema(fields))
    return to_csv(arrow)


_TEXTS = (pa.large_string(), pa.string_view(), pa.null())


def html(report: Report) -> str:
    """Return a page that loads nothing, and whose policy forbids it to."""
    from plotly.offline import get_plotlyjs

    data = {name: _embedded(table) for name, table in report.tables.items()}
    environment = _environment(autoescape=True)
    environment.filters |= {
        "codes": _codes_in_html,
        "printable": printable,
        "unbroken": _unbroken,
        "words": _words,
        "legend": _legend,
        "base64": lambda content: base64.b64encode(content).decode(),
    }
    # The browser computes a script's digest with these line ends.
    scripts = [text.replace("\r\n", "\n") for text in (get_plotlyjs(), _source("report.js"))]
    assert not any("</script" in text.lower() or "<!--" in text for text in scripts)
    has_plots = any(item.kind == "plot" for part in report.sections for item in part.items)
    return environment.get_template("report.html").render(
        report=report,
        data=data,
        style=_source("report.css"),
        scripts=scripts if has_plots else [],
        digests=[_digest(script) for script in scripts if has_plots],
    )


def markdown(report: Report) -> str:
    """Return the report as Markdown, with its figures and data beside it."""
    environment = _environment(finalize=_finalized)
    environment.filters |= {
        "file": _Verbatim,
        "codes": _codes_in_markdown,
        "code_block": _code_block,
    }
    text = environment.get_template("report.md").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text)


def _legend(multiples: SmallMultiples) -> Markup:
    return Markup(draw_legend(multiples))  # noqa: S704 - Matplotlib escapes its content


def _unbroken(text: str) -> str:
    """Return a cell in which an interval stays on one line."""
    return text.replace(" to ", "\u00a0to\u00a0")


def _words(command: str) -> Markup:
    """Return a command whose lines end between words; else they end after a hyphen of a flag."""
    words = printable(command).split(" ")
    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in words)


class _Verbatim(str):
    """A text that is Markdown already."""


def _finalized(value: Any) -> str:
    return value if isinstance(value, _Verbatim) else escaped(str(value))


def _codes_in_html(text: str) -> Markup:
    """Return a text whose parts between backticks are code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if is_code else part
        for part, is_code in _codes(text)
    )


def _codes_in_markdown(text: str) -> str:
    parts = (f"`{part}`" if is_code else escaped(part) for part, is_code in _codes(text))
    return _Verbatim("".join(parts))


def _code_block(command: str) -> str:
    """Return a command as a block of code in a list of Markdown."""
    fence = "`" * (1 + max(map(len, re.findall("`+", command)), default=2))
    return _Verbatim(f"{fence}sh\n  {printable(command)}\n  {fence}")


def _codes(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text, and whether each was between backticks."""
    yield from zip(re.split(r"`([^`]+)`", printable(text)), cycle((False, True)))


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(  # noqa: S701 - the page has autoescape, Markdown `_finalized`
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(table: pd.DataFrame) -> str:
    content = csv(table)
    return base64.b64encode(content).decode() if len(content) <= _EMBEDDED_BYTES else ""


def write_report(results: Results, assessment: Assessment, folder: Path) -> None:
    """Write report.html, report.md, and the data and figures of both, to a folder.

    The same results give the same bytes. A new folder appears with all files or not at all. In an
    existing one, each file is replaced as a whole, and other files stay.

    Raises:
        TransientError: the disk is full or read-only.
    """
    from experiments.reporting.sections import make

    write(make(results, assessment), folder)


def write(report: Report, folder: Path) -> None:
    """Write a report: see `write_report`."""
    made = contents(report)
    with writing("the report"), open_folder(folder, FILES) as draft:
        for name, content in made.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)
