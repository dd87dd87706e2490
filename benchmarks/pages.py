"""Pictures of MLflow's pages of a comparison or a sweep, in a browser: `benchmarks.pages --help`.

It starts `mlflow server` on the records, and opens the pages in Chromium. It fails if one does not
show what it should, and keeps a picture of each for the documentation. Tests do the same with a
small comparison and a small sweep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import make_parser
from benchmarks.processes import QUIET, mlflow_command, serving

if TYPE_CHECKING:
    from playwright.sync_api import Page

FIGURES = Path("benchmarks/figures")
PAGE_MILLISECONDS = 60_000
DRAWING_MILLISECONDS = 1_500
"""For what is drawn after its text is there."""

# MLflow's assistant takes a third of the page, unless it was closed before.
NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""


def main() -> None:
    """Make the pictures."""
    parser = make_parser("pages", __doc__)
    parser.add_argument("name", help="of the comparison, or of the sweep's study")
    parser.add_argument("--sweep", action="store_true", help="it is a sweep")
    parser.add_argument("--store", default="sqlite:///mlflow.db", help="MLflow's database")
    parser.add_argument("--out", type=Path, default=FIGURES, help="the folder for the pictures")
    options = parser.parse_args()
    with served(options.store) as address:
        look_at = look_at_sweep if options.sweep else look
        pictures = look_at(address, options.name, options.out)
    print(*(f"{page}: {picture}" for page, picture in pictures.items()), sep="\n")


def chromium() -> str | None:
    """Return where Debian's Chromium is, or another; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def served(store: str) -> AbstractContextManager[str]:
    """Run MLflow's server on a store, in the working folder, and give its address."""
    return serving(mlflow_command(store), health="/health", environment=QUIET)


def find(address: str, name: str) -> tuple[Any, list[Any], list[Any]]:
    """Return the runs of a comparison: its own, those of its stages, those of its repeats."""
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.comparison = '{name}'", max_results=1000)
    (parent,) = (run for run in runs if run.data.tags["role"] == "comparison")
    stages = [run for run in runs if run.data.tags["role"] == "sweep"]
    trials = [run for run in runs if run.data.tags["role"] == "trial"]
    of_stage = {
        stage: [run for run in trials if run.data.tags["stage"] == stage]
        for stage in ("repeat", "confirm")  # the searches of each loss; or of random and tpe
    }
    return parent, stages, of_stage["repeat"] or of_stage["confirm"]


def look(address: str, name: str, out: Path) -> dict[str, Path]:
    """Open MLflow's pages of a comparison, and return the picture of each.

    Raises:
        playwright.sync_api.Error: a page doesn't show what it should.
    """
    parent, stages, confirmed = find(address, name)
    experiment = parent.info.experiment_id
    runs = f"{address}/#/experiments/{experiment}/runs"
    pictures = {}
    with browser() as page:
        page.add_init_script(NO_ASSISTANT)

        def show(url: str, *texts: str, exact: bool = True) -> None:
            page.goto(url)
            for text in texts:
                page.get_by_text(text, exact=exact).first.wait_for()

        def keep(which: str) -> None:
            pictures[which] = _picture(page, out / f"mlflow-{which}.png")

        # The list: the comparison, and below it its stages.
        show(runs, name)
        row = page.get_by_text(name, exact=True).first
        row.locator("xpath=ancestor::*[@role='gridcell']").get_by_role("button").first.click()
        for stage in stages:
            page.get_by_text(stage.info.run_name, exact=True).first.wait_for()
        keep("runs")

        # The comparison's own page: the answer, and links to its stages.
        links = [stage.info.run_name[:30] for stage in stages]
        answer = "The whole report is among the artifacts"
        show(f"{runs}/{parent.info.run_id}", name, answer, *links, exact=False)
        keep("comparison")

        # The report, an artifact, with its interactive plots, which its scripts draw.
        show(f"{runs}/{parent.info.run_id}/artifacts/report/report.html")
        report = page.frame_locator("iframe")
        report.get_by_role("heading", level=1).wait_for()
        report.locator(".plot .main-svg").first.wait_for()
        keep("report")

        # Runs side by side: the parallel coordinates, and the table below them.
        ids = json.dumps([run.info.run_id for run in confirmed])
        title = f"Comparing {len(confirmed)} Runs"
        url = f"{address}/#/compare-runs?runs={ids}&experiments={json.dumps([experiment])}"
        show(url, title, exact=False)
        page.locator("svg").get_by_text("loss", exact=True).first.wait_for()
        for param in ("batch_size", "learning_rate", "val/accuracy"):
            page.get_by_text(param, exact=True).first.wait_for(state="attached")
        keep("compare")

        # A repeat: its metrics, and its model.
        show(f"{runs}/{confirmed[0].info.run_id}", "val/accuracy", "test/accuracy", "model")
        keep("trial")
    return pictures


def look_at_sweep(address: str, study: str, out: Path) -> dict[str, Path]:
    """Open MLflow's pages of a sweep, and return the picture of each.

    Raises:
        playwright.sync_api.Error: a page doesn't show what it should.
    """
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.study = '{study}' and tags.role = 'sweep'")
    tags = parent.data.tags
    best = client.get_run(tags["best.run_id"]).info.run_name
    runs = f"{address}/#/experiments/{parent.info.experiment_id}/runs"
    view = f"{runs}?viewStateShareKey={tags['study_id'][:8]}"
    pictures = {}
    with browser(width=1280, height=620) as page:
        page.add_init_script(NO_ASSISTANT)

        def keep(which: str) -> None:
            pictures[which] = _picture(page, out / f"{which}.png")

        page.goto(view)
        page.get_by_text(best, exact=True).first.wait_for()
        page.get_by_text("val/accuracy", exact=True).first.wait_for()
        keep("mlflow")

        page.set_viewport_size({"width": 1280, "height": 800})
        page.goto(f"{view}&compareRunsMode=CHART")
        page.get_by_text("Parallel Coordinates").first.wait_for()
        page.locator("svg").get_by_text("learning_rate", exact=True).first.wait_for()
        keep("mlflow-charts")

        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{runs}/{parent.info.run_id}")
        page.get_by_text("All trials, the best first").first.wait_for()
        page.get_by_text("Show more").first.click()
        page.get_by_text("python -m experiments.rerun").first.wait_for()
        keep("mlflow-sweep")

        page.goto(f"{runs}/{parent.info.run_id}/artifacts/report/report.html")
        report = page.frame_locator("iframe")
        report.locator("#plot-rates .main-svg").first.wait_for()
        report.locator("#rates").evaluate("section => section.scrollIntoView()")
        pictures["mlflow-report"] = _picture(page, out / "mlflow-report.png", of="iframe")
    return pictures


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Start Chromium, as a person does who was never here before, and give a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = started.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PAGE_MILLISECONDS)
        yield page
        started.close()


def _picture(page: Page, file: Path, of: str = "body") -> Path:
    """Take a picture of a part of the page once everything is drawn."""
    page.wait_for_timeout(DRAWING_MILLISECONDS)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.locator(of).first.screenshot(path=file)
    return file


if __name__ == "__main__":
    main()
