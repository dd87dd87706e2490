"""A digest of the code in `cnn`."""

import ast
import hashlib
from functools import cache
from pathlib import Path

import cnn


@cache
def source_digest() -> str:
    """Return 32 hex digits of the code in `cnn`, without comments and docstrings.

    It covers what no other digest sees: initial weights, the training loop, image order. A commit
    does not cover uncommitted changes, and may be missing.
    """
    digest = hashlib.sha256()
    for folder in cnn.__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n{_statements(file)}\n".encode())
    return digest.hexdigest()[:32]


def _statements(file: Path) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    # Unparsed: a tree's dump changes with the version of Python.
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    """Return whether a statement is only a text: a docstring."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
