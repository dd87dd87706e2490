"""Sphinx's configuration, and the directives that generate pages from the code.

Build the site with warnings as errors:

    python -m sphinx -W -n -b html docs docs/_build
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "cnn-loss-sweep"
author = ""
copyright = ""  # noqa: A001 (Sphinx reads this name)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "lessons.directives"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_block"]
myst_heading_anchors = 4
default_role = "code"  # docstrings have names in single backticks

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "cnn-loss-sweep"
html_static_path = ["_static"]
html_css_files = ["site.css", "lessons.css"]
html_js_files = [("lessons.js", {"defer": "defer"})]
html_math_renderer = "mathml"  # drawn by the browser, without the network
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_sidebars: dict[str, list[str]] = {"index": [], "tutorial": [], "contributing": []}
html_theme_options: dict[str, Any] = {
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "footer_start": [],
    "footer_end": [],
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


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


def introduction(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield in Markdown what a command does, and its usage."""
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=76)
    parser.color = False  # type: ignore[attr-defined]  # of Python 3.14
    yield from (escaped(parser.description or ""), "")
    first, *rest = parser.format_usage().removeprefix("usage: ").splitlines()
    yield from ("```text", first, *(f"    {line.strip()}" for line in rest), "```", "")
    yield f":::{{program}} {parser.prog}\n:::\n"


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield in Markdown a command's options, group by group, and its notes."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = (group.title or "").capitalize()
        yield from (f"## {title}", "", escaped(group.description or ""), "")
        for action in actions:
            text = (action.help or "") % {**vars(action), "prog": parser.prog}
            yield f"::::{{option}} {invocation(action)}\n{escaped(text)}\n::::\n"
    yield "## Notes\n"
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(parser.epilog or "")):
        yield from (escaped(" ".join(paragraph.split())), "")


def files_table(package: str) -> Iterator[str]:
    """Yield in Markdown the files of a package, each with the first paragraph of its docstring."""
    yield "| File | Its one job |"
    yield "| --- | --- |"
    for file in sorted((ROOT / package).glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        if text and file.name != "__init__.py":
            job = " ".join(text.partition("\n\n")[0].split()).rstrip(".:")
            yield f"| `{package}/{file.name}` | {escaped(job)} |"


class Generated(SphinxDirective):
    """Markdown that is generated from the code, in the place of the directive."""

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        self.env.note_reread()  # the code may have changed, where the page has not
        return self.parse_text_to_nodes("\n".join(self.lines()), allow_section_headings=True)


class Usage(Generated):
    """`{usage} experiments.sweep`: what a command does, and its usage."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        return introduction(importlib.import_module(self.arguments[0]).build_parser())


class Options(Generated):
    """`{options} experiments.sweep`: its options and notes, in sections."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        return options(importlib.import_module(self.arguments[0]).build_parser())


def losses_table() -> Iterator[str]:
    """Yield a table of the losses, in Markdown."""
    from cnn.losses import LOSSES

    yield "| `--losses` | what it is | probabilities | source |"
    yield "| --- | --- | --- | --- |"
    for loss in LOSSES.values():
        first = (inspect.getdoc(loss.function) or "").partition("\n\n")[0]
        cells = [f"`{loss.name}`", first, f"`{loss.outputs_to_probabilities}`", loss.source]
        yield "| " + " | ".join(escaped(" ".join(cell.split())) for cell in cells) + " |"


class Files(Generated):
    """`{files} cnn`: the files of a package, each with its one job."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        return files_table(self.arguments[0])


def notebook(file: Path) -> Iterator[str]:
    """Yield in Markdown the cells of an executed notebook, without its title."""
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield from (re.sub(r"\A# .*\n", "", source), "")
            continue
        yield from ("```python", source, "```", "")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text")})
            if "image/png" in data:
                picture = "".join(data["image/png"]).strip()
                yield from (
                    "```{raw} html",
                    f'<img src="data:image/png;base64,{picture}">',
                    "```",
                    "",
                )
            elif "text/html" in data:
                yield from ("```{raw} html", "".join(data["text/html"]), "```", "")
            else:
                yield from ("```text", "".join(data["text/plain"]).rstrip("\n"), "```", "")


class Notebook(Generated):
    """`{notebook} notebook.ipynb`: the cells of a notebook in the page's folder, executed."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        return notebook(Path(self.env.doc2path(self.env.docname)).parent / self.arguments[0])


class Losses(Generated):
    """`{losses}`: the table of all losses."""

    def lines(self) -> Iterator[str]:
        """Yield the Markdown."""
        return losses_table()


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
    app.add_directive("usage", Usage)
    app.add_directive("options", Options)
    app.add_directive("losses", Losses)
    app.add_directive("files", Files)
    app.add_directive("notebook", Notebook)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    return {"parallel_read_safe": True}
