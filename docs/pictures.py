"""The README's pictures of the terminal and of MLflow: `python docs/pictures.py`.

Runs a sweep in a new folder, in a terminal of tmux; renders this terminal while trials run, and
MLflow's page of its runs, in Chromium. Both come from Debian: `apt install tmux chromium`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "images"
COMMAND = "python -m experiments.sweep"
WIDTH, HEIGHT = 146, 26
ENDED_IN_PICTURE = 14
"""How many trials have ended, at most, when the picture is taken: two others run then."""

TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #292929; display: inline-block }}
pre {{ margin: 0; padding: 14px 18px; color: #c5c8c6; font: 13px/1.4 "DejaVu Sans Mono" }}
</style><pre>$ {command}\n{code}</pre>"""


def main() -> None:
    """Take all pictures."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        screen = sweep()
        with browser() as page:
            page.set_content(TERMINAL.format(command=COMMAND, code=as_html(screen)))
            page.locator("body").screenshot(path=OUT / "terminal.png")
        show_runs()


def tmux(*arguments: str) -> str:
    """Return what tmux prints, of a server of our own."""
    command = ["tmux", "-L", f"pictures-{os.getpid()}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sweep() -> str:
    """Run a sweep in a terminal to its end, and return what that showed while trials ran."""
    size = ("-x", str(WIDTH), "-y", str(HEIGHT))
    command = f"PYTHONPATH={ROOT} {sys.executable} -m experiments.sweep; sleep 1; touch done"
    tmux("new-session", "-d", "-s", "sweep", *size, command)
    picture = ""
    while not Path("done").exists():
        try:
            screen = tmux("capture-pane", "-p", "-e", "-t", "sweep")
        except subprocess.CalledProcessError:  # it is over
            break
        ended = sum(" epochs " in line for line in screen.splitlines())
        running = sum("━" in line and " epoch " in line for line in screen.splitlines())
        if ended <= ENDED_IN_PICTURE and running == 2:
            picture = screen
        time.sleep(0.2)
    return picture.rstrip()


def as_html(screen: str) -> str:
    """Return what a terminal shows as HTML."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(screen))
    html = console.export_html(theme=SVG_EXPORT_THEME, inline_styles=True, code_format="{code}")
    return html.rstrip()


@contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium, and hand out a page."""
    from playwright.sync_api import sync_playwright

    from benchmarks.pages import chromium

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started.new_page(viewport={"width": 1280, "height": 620})
        started.close()


def show_runs() -> None:
    """Take the pictures of the sweep in MLflow: its trials, its own run, its report."""
    import mlflow

    from benchmarks.pages import look_at_sweep, served

    with served("sqlite:///mlflow.db") as address:
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name("cnn-sweep").experiment_id
        (sweep,) = client.search_runs([experiment], "tags.role = 'sweep'")
        look_at_sweep(address, sweep.data.tags["study"], OUT)


if __name__ == "__main__":
    main()
