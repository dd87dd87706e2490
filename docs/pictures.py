"""The pictures of terminals, MLflow and predictions: `python docs/pictures.py [NAME…]`.

Runs sweeps and a comparison in a new folder, in terminals of tmux of several widths; renders what
they show while trials run, and MLflow's page of the runs, in Chromium; and predicts with the best
run. Tmux and Chromium come from Debian: `apt install tmux chromium`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A command in a terminal, and when to take the picture."""

    command: str
    width: int
    ended: int
    """How many trials have ended in the picture, at most: two others run then."""
    height: int = 26


SWEEP = "python -m experiments.sweep"
SMALL = f"{SWEEP} --trials 12 --epochs 6"
COMPARISON = "python -m experiments.compare --losses mse l1 --searches 1 --trials 6 --epochs 4"
TERMINALS = {
    "terminal": Shown(command=SWEEP, width=100, ended=14),
    "terminal-146": Shown(command=SMALL, width=146, ended=8, height=18),
    "terminal-60": Shown(command=SMALL, width=60, ended=8, height=18),
    "terminal-40": Shown(command=SMALL, width=40, ended=8, height=18),
    "terminal-compare": Shown(command=COMPARISON, width=100, ended=10),
}
"""The README shows the first one; the pictures of MLflow and of predictions are of its runs."""

TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #292929; display: inline-block }}
pre {{ margin: 0; padding: 14px 18px; color: #c5c8c6; font: 13px/1.4 "DejaVu Sans Mono" }}
</style><pre>$ {command}\n{code}</pre>"""


def main(names: Sequence[str]) -> None:
    """Take the pictures of these names, or all."""
    OUT.mkdir(exist_ok=True)
    for name, shown in TERMINALS.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder, chdir(folder), browser() as page:
            screen = run(shown)
            page.set_content(TERMINAL.format(command=shown.command, code=as_html(screen, shown)))
            page.locator("body").screenshot(path=OUT / f"{name}.png")
            if shown.command == SWEEP:
                predict_images(show_runs())


def tmux(*arguments: str) -> str:
    """Return what tmux prints, of a server of our own."""
    command = ["tmux", "-L", f"pictures-{os.getpid()}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(shown: Shown) -> str:
    """Run a command in a terminal to its end, and return what that showed while trials ran."""
    size = ("-x", str(shown.width), "-y", str(shown.height))
    command = shown.command.replace("python", f"PYTHONPATH={ROOT} {sys.executable}", 1)
    tmux("new-session", "-d", "-s", "shown", *size, f"{command}; sleep 1; touch done")
    picture = ""
    while not Path("done").exists():
        try:
            screen = tmux("capture-pane", "-p", "-e", "-t", "shown")
        except subprocess.CalledProcessError:  # it is over
            break
        rows = re.sub(r"\x1b\[[\d;]*m", "", screen).splitlines()
        ended = sum(
            bool(re.match(r" *\d+ +(complete|pruned|diverged|failed) ", row)) for row in rows
        )
        running = [row for row in rows if re.match(r" *\d+ +(epoch )?[1-9]\d*/\d", row)]
        if ended <= shown.ended and len(running) == 2:
            picture = screen
        time.sleep(0.2)
    return picture.rstrip()


def as_html(screen: str, shown: Shown) -> str:
    """Return what a terminal shows as HTML."""
    console = Console(record=True, width=shown.width, file=io.StringIO())
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


def show_runs() -> str:
    """Take the pictures of the sweep in MLflow, its trials, run and report; return its best run."""
    import mlflow

    from benchmarks.pages import look_at_sweep, served

    with served("sqlite:///mlflow.db") as address:
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name("cnn-sweep").experiment_id
        (sweep,) = client.search_runs([experiment], "tags.role = 'sweep'")
        look_at_sweep(address, sweep.data.tags["study"], OUT)
    return str(sweep.data.tags["best.run_id"])


def predict_images(run_id: str) -> None:
    """Predict test images with a run's model, and keep the sheet of its report."""
    predict = "digits:test --out predictions.csv --report report --run-id"
    command = [sys.executable, "-m", "tracking.predict", *predict.split(), run_id]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    shutil.copy("report/examples.png", OUT)


if __name__ == "__main__":
    main(sys.argv[1:])
