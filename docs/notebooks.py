"""Execute the notebooks of these pages, and store what they print: `python docs/notebooks.py`.

It needs no Jupyter. A cell is executed as Python, with one magic: `%%writefile FILE`. What its last
expression is, is shown as a picture or as HTML if it can be, else as text.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
import tempfile
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def execute(cells: list[dict[str, Any]], folder: Path) -> None:
    """Execute the cells of a notebook in a folder, and set their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    with chdir(folder):
        for number, cell in enumerate(code, 1):
            printed = io.StringIO()
            with redirect_stdout(printed), redirect_stderr(printed):
                value = _run("".join(cell["source"]), names)
            cell["execution_count"] = number
            cell["outputs"] = list(_outputs(printed.getvalue(), value, number))


def _run(source: str, names: dict[str, Any]) -> Any:
    """Execute the source of a cell, and return the value of its last expression."""
    first, _, rest = source.partition("\n")
    if first.startswith("%%writefile "):
        file = Path(first.split()[1])
        file.write_text(rest)
        print(f"Writing {file}")
        return None
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)  # noqa: S102 -- our own notebooks
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)  # noqa: S307


def _outputs(printed: str, value: Any, number: int) -> Any:
    if printed:
        yield {"output_type": "stream", "name": "stdout", "text": printed.splitlines(True)}
    if value is not None:
        data = {"text/plain": repr(value).splitlines(True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = [base64.b64encode(value._repr_png_()).decode()]
        elif hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(True)
        yield {
            "output_type": "execute_result",
            "execution_count": number,
            "data": data,
            "metadata": {},
        }


def main() -> None:
    """Execute all notebooks, each in an empty folder."""
    sys.path.insert(0, str(ROOT))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    warnings.simplefilter("ignore")
    for file in NOTEBOOKS:
        notebook = json.loads(file.read_text())
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook["cells"], Path(folder))
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            assert folder not in text, "a path of this machine"
        file.write_text(text)


if __name__ == "__main__":
    main()
