"""Sphinx's extension of the pages that teach: their tables, their figures, and MathML.

A page names what it wants: `{lesson} example`, `{lesson} loss cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lessons.difference_figures import alike_figure, descent_figure, example_table
from lessons.loss_figures import loss_figure
from lessons.network_figures import field_figure, layers_table, scores_figure

TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "example": example_table,
    "layers": layers_table,
}
FIGURES: dict[str, Callable[..., str]] = {
    "loss": loss_figure,
    "alike": alike_figure,
    "descent": descent_figure,
    "field": field_figure,
    "scores": scores_figure,
}


class Lesson(SphinxDirective):
    """A table or a figure of a lesson, by its name."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return its nodes."""
        self.env.note_reread()  # the code may have changed, where the page has not
        name, *arguments = self.arguments
        if name in TABLES:
            return self.parse_text_to_nodes("\n".join(TABLES[name]()))
        return [nodes.raw("", FIGURES[name](*arguments), format="html")]


def visit_inline(self: Any, node: nodes.math) -> None:
    """Write a formula of a sentence."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula of its own line."""
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive, and how formulas are written: browsers draw MathML by themselves."""
    app.add_directive("lesson", Lesson)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True}
