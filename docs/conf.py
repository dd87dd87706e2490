"""Sphinx's configuration, and the directives that generate pages from the code.

Build the site with warnings as errors:

    python -m sphinx -W -n -b html docs docs/_build
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "cnn-loss-sweep"
author = ""
copyright = ""  # noqa: A001 (Sphinx reads this name)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4
default_role = "code"  # docstrings have names in single backticks

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "cnn-loss-sweep"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_sidebars: dict[str, list[str]] = {"index": [], "tutorial": [], "contributing": []}
html_theme_options: dict[str, Any] = {
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "footer_start": [],
    "footer_end": [],
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

COMMANDS = (
    "experiments.sweep",
    "experiments.compare",
    "experiments.report",
    "experiments.servers",
    "tracking.predict",
    "tracking.best",
    "tracking.promote",
    "tracking.report",
)


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
    return parser


def escaped(text: str) -> str:
    """Return plain text as Markdown that shows it as it is, but for `code` in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|#~{}$])", r"\\\1", part)
        for part in parts
    )


def invocation(action: argparse.Action) -> str:
    """Return how an option is typed: its names and its values."""
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = str(action.metavar or choices or action.dest.upper())
    if action.nargs == "+":
        value = f"{value} [{value} …]"
    return f"{names} {value}".strip()


def command_page(module: str) -> Iterator[str]:
    """Yield the lines, in Markdown, of a command's page: usage, options, exit codes."""
    parser = parser_of(module)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=76)
    parser.color = False  # type: ignore[attr-defined]  # of Python 3.14
    yield from (escaped(parser.description or ""), "")
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    yield from ("```text", *inspect.cleandoc(usage).splitlines(), "```", "")
    yield f":::{{program}} {parser.prog}\n:::\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        if not actions:
            continue
        yield from (f"## {(group.title or '').capitalize()}", "", escaped(group.description or ""), "")
        for action in actions:
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            yield f"::::{{option}} {invocation(action)}\n{escaped(text)}\n::::\n"
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(parser.epilog or "")):
        yield from (escaped(" ".join(paragraph.split())), "")


class Command(SphinxDirective):
    """`{command} experiments.sweep`: what `--help` says, as a page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getfile(importlib.import_module(self.arguments[0])))
        text = "\n".join(command_page(self.arguments[0]))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def losses_table() -> Iterator[str]:
    """Yield a table of the losses, in Markdown."""
    from cnn.losses import LOSSES

    yield "| `--losses` | what it is | probabilities | source |"
    yield "| --- | --- | --- | --- |"
    for loss in LOSSES.values():
        first = (inspect.getdoc(loss.function) or "").partition("\n\n")[0]
        cells = [f"`{loss.name}`", first, f"`{loss.outputs_to_probabilities}`", loss.source]
        yield "| " + " | ".join(escaped(" ".join(cell.split())) for cell in cells) + " |"


class Losses(SphinxDirective):
    """`{losses}`: the table of all losses."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(losses_table()))


_attributes: dict[str, list[str]] = {}


def before_napoleon(
    _app: Sphinx, what: str, name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Escape what docstrings mean literally, and hide from napoleon what it would misread."""
    lines[:] = [re.sub(r"([|*])", r"\\\1", line) for line in lines]
    if what == "attribute":  # napoleon takes what is before a colon for a type
        _attributes[name] = lines[:]
        lines.clear()


def after_napoleon(
    _app: Sphinx, what: str, name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Bring back what was hidden."""
    if what == "attribute":
        lines[:] = _attributes.pop(name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("command", Command)
    app.add_directive("losses", Losses)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    return {"parallel_read_safe": True}
