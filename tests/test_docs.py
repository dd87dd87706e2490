"""The examples of README and docs: options exist, Python runs, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import experiments.__main__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.name == "README.md" or "how-to" in page.parts]
GUIDES += [ROOT / "docs" / "tutorial.md", ROOT / "docs" / "contributing.md"]
GUIDES += sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
COMMANDS = set(experiments.__main__.COMMANDS)
OF_OTHERS = {"pytest", "sphinx", "venv"}
SMALL = {
    "experiments.sweep": "--trials 3 --epochs 2",
    "experiments.compare": "--trials 2 --repeats 2 --epochs 1",
}
"""What makes the tutorial's commands quick: the last of two equal flags counts."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a page's shell blocks, and in its `code` of one line."""
    texts = blocks(page, "sh") + re.findall(r"`(python -m [^`\n]+)`", page.read_text())
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for is_operator, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&;")):
            if not is_operator:
                yield list(words)


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Return the module that `python -m` starts, and what it is told; "" for other commands."""
    words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
    if len(words) < 3 or not words[0].endswith(("python", "python3")) or words[1] != "-m":
        return "", []
    rest = words[3:]
    return words[2], rest[: rest.index(">")] if ">" in rest else rest


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_have_the_options_that_it_names(page: Path) -> None:
    for words in commands(page):
        module, arguments = module_and_arguments(words)
        if module in COMMANDS and arguments not in ([], ["NAME"], ["…"]):
            parser = importlib.import_module(module).build_parser()
            parser.parse_args(without_config(arguments))
        elif module.startswith("benchmarks."):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), words
        else:
            assert module in COMMANDS | OF_OTHERS | {""}, words


def without_config(arguments: list[str]) -> list[str]:
    """Return a command line without `--print-config`, which exits, and without a file to read."""
    kept = [word for word in arguments if word != "--print-config"]
    if "--config" in kept:
        del kept[kept.index("--config") : kept.index("--config") + 2]
    return kept


def test_the_check_of_options_finds_those_that_are_not_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\nls | python -m tracking.predict - --outt photos.csv  # a list\n```\n")
    with pytest.raises(ValueError, match="--outt"):
        test_the_commands_of_a_page_have_the_options_that_it_names(page)


def test_mlflow_run_is_given_entry_points_and_parameters_that_there_are() -> None:
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    runs = [words for page in GUIDES for words in commands(page) if words[:2] == ["mlflow", "run"]]
    assert runs
    for words in runs:
        flags = list(itertools.pairwise(words))
        name = dict(flags).get("-e", "main")
        given = {value.partition("=")[0] for flag, value in flags if flag == "-P"}
        assert given <= set(entry_points[name].get("parameters", {})), words


def test_python_in_the_pages_compiles_and_what_it_imports_is_there() -> None:
    code = [block for page in PAGES for block in blocks(page, "python")]
    assert code
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(block)) for block in code):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


def test_links_in_the_pages_lead_to_files_that_are_there() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            target = link.partition("#")[0]
            if target and not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page}: {link}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    pages = {page.stem for page in (ROOT / "docs/reference/commands").glob("*.md")}
    assert pages - {"index"} == COMMANDS


@pytest.mark.parametrize("file", [*(ROOT / "docs").rglob("*.ipynb")], ids=lambda file: file.name)
def test_a_notebook_is_executed_in_order(file: Path) -> None:
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(cell["outputs"] for cell in code)
    assert "Traceback" not in file.read_text()


@pytest.mark.slow
def test_the_notebooks_run(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        notebooks = importlib.import_module("notebooks")
    finally:
        sys.path.pop(0)
    for file in notebooks.NOTEBOOKS:
        cells = json.loads(file.read_text())["cells"]
        before = [bool(cell.get("outputs")) for cell in cells]
        folder = tmp_path / file.stem
        folder.mkdir()
        notebooks.execute(cells, folder)  # raises what a cell raises
        assert [bool(cell.get("outputs")) for cell in cells] == before


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    tutorial = ROOT / "docs/tutorial.md"
    printed = ""
    for block in blocks(tutorial, "sh"):
        for line in block.splitlines():
            module, arguments = module_and_arguments(shlex.split(line, comments=True))
            if module in COMMANDS:
                printed += run("-m", module, *arguments, *shlex.split(SMALL.get(module, "")))

    # What README and tutorial say that it prints: the labels of the last lines.
    for page in (ROOT / "README.md", tutorial):
        (summary,) = (block for block in blocks(page, "text") if block.startswith("best: "))
        labels = re.findall(r"^ *([a-z ]+:) ", summary, re.MULTILINE)
        assert len(labels) == 4
        for label in labels:
            assert label in printed, f"{page.name}: {label}"

    pages = [
        "tutorial",
        "how-to/reproduce",
        "how-to/choose-a-run",
        "how-to/predict",
        "how-to/serve",
    ]
    python = [block for name in pages for block in blocks(ROOT / f"docs/{name}.md", "python")]
    assert len(python) >= len(pages)
    run("-c", f"for block in {python!r}: exec(block, {{}})")
