"""The report of a comparison as a page, as Markdown, and as tables and figures beside both."""

from __future__ import annotations

import base64
import hashlib
import re
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import pyarrow as pa
from markupsafe import Markup

from experiments.reporting.parts import Gallery, Report
from experiments.reporting.sections import FIGURES, TABLES
from experiments.reporting.small_multiples import SmallFigures, key, sheet
from tracking.files import open_folder, writing
from tracking.prediction.formats import Csv
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
"""All that a report may have. Each is whole by itself; the page comes last."""

_EMBEDDED_BYTES = 500_000
"""Of a table that is part of the page; a larger one is beside it only."""


def contents(report: Report) -> dict[str, bytes]:
    """Return those of `FILES` that a report has."""
    tables = {f"data/{name}.csv": csv(table) for name, table in report.tables.items()}
    pictures = {
        f"figures/{item.name}.png": sheet(item.small)
        for section in report.sections
        for item in section.items
        if isinstance(item, Gallery)
    }
    pages = {"report.md": markdown(report).encode(), "report.html": html(report).encode()}
    return tables | pictures | pages


def csv(table: pd.DataFrame) -> bytes:
    """Return a table as CSV of which a spreadsheet takes no text for a formula."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [
        field.with_type(pa.string()) if field.type in _TEXTS else field for field in arrow.schema
    ]
    arrow = arrow.replace_schema_metadata().cast(pa.schema(fields))
    return Csv().begin(arrow.schema) + Csv().rows(arrow)


_TEXTS = (pa.large_string(), pa.string_view(), pa.null())


def html(report: Report) -> str:
    """Return a page that needs nothing but itself: it forbids itself to load anything."""
    from plotly.offline import get_plotlyjs

    data = {name: _embedded(table) for name, table in report.tables.items()}
    environment = _environment(autoescape=True)
    environment.filters |= {"codes": _codes_in_html, "printable": printable, "key": _key}
    # Line ends as the browser sees them, whose digest of a script it is that counts.
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
    environment.filters |= {"file": _Verbatim, "codes": _codes_in_markdown}
    text = environment.get_template("report.md").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text)


def _key(small: SmallFigures) -> Markup:
    return Markup(key(small))  # noqa: S704 - Matplotlib escapes what is in it


class _Verbatim(str):
    """A text that goes into Markdown as it is."""


def _finalized(value: Any) -> str:
    return value if isinstance(value, _Verbatim) else escaped(str(value))


def _codes_in_html(text: str) -> Markup:
    """Return a text with what is between backticks as code."""
    parts = _CODE.split(printable(text))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if is_code else part
        for part, is_code in zip(parts, cycle((False, True)))
    )


def _codes_in_markdown(text: str) -> str:
    parts = _CODE.split(printable(text))
    return _Verbatim(
        "".join(
            f"`{part}`" if is_code else escaped(part)
            for part, is_code in zip(parts, cycle((False, True)))
        )
    )


_CODE = re.compile(r"`([^`]+)`")


def _environment(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(  # noqa: S701 - the page has autoescape, Markdown its own
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

    The same results give the same bytes. If there is no folder yet, it is there with all files or
    not at all; in one that is there, each file is replaced as a whole, and others stay.

    Raises:
        TransientError: the disk said no.
    """
    from experiments.reporting.sections import make

    made = contents(make(results, assessment))
    with writing("the report"), open_folder(folder, FILES) as draft:
        for name, content in made.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)
