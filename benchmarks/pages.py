"""Pages of MLflow and of Optuna's dashboard in a real browser: `python -m benchmarks.pages --help`.

Starts a real `mlflow server` on what was recorded of a comparison, or `optuna-dashboard` on a
study, goes through the pages in Chromium, fails where one doesn't show what it should, and keeps a
picture of each: those in docs/ are from here. A test does the same with a small comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

FIGURES = Path(__file__).parent / "figures"
START_SECONDS = 180
PAGE_MILLISECONDS = 60_000
SETTLED_MILLISECONDS = 1_500
"""For what is drawn after its text is there."""


def main() -> None:
    """Go through the pages."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of the comparison; with --dashboard, of a study")
    parser.add_argument("--store", default="sqlite:///mlflow.db", metavar="URI")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR")
    parser.add_argument(
        "--dashboard",
        metavar="URL",
        help="the storage of the study: look at Optuna's dashboard (pip install optuna-dashboard) "
        "instead of MLflow's pages",
    )
    options = parser.parse_args()
    if options.dashboard:
        with dashboard(options.dashboard) as address:
            pages = look_at_study(address, options.name, options.out)
    else:
        with served(options.store) as address:
            pages = look(address, options.name, options.out)
    print(*(f"{page}: {picture}" for page, picture in pages.items()), sep="\n")


def chromium() -> str | None:
    """Return where Debian's Chromium is, or another; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def served(store: str) -> AbstractContextManager[str]:
    """Start MLflow's server on a store, in the working folder, and hand out its address."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    return started([*command, "--workers", "1"], health="/health")


def dashboard(storage: str) -> AbstractContextManager[str]:
    """Start Optuna's dashboard of a storage, and hand out its address.

    A password is for `PGPASSWORD`, and not for the URL: a command line can be read by all.
    """
    command = str(Path(sys.executable).with_name("optuna-dashboard"))
    return started([command, "--server", "wsgiref", storage], health="/dashboard")


@contextmanager
def started(
    command: list[str], *, health: str, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server on a free port, wait until it answers, and hand out its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment |= settings or {}
    with Path("server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(server, f"{address}{health}")
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(address):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no server: {Path('server.log').read_text()[-2000:]}")
        time.sleep(0.2)


@dataclass
class Ids:
    """What the pages' addresses are made of."""

    name: str
    """Of the comparison."""
    experiment: str
    parent: str
    stages: dict[str, str]
    """Runs of the stages, by name."""
    confirmed: list[str]
    """Runs of the repeats."""


def find(address: str, name: str) -> Ids:
    """Return the runs of a comparison."""
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.comparison = '{name}'", max_results=1000)
    by_role: dict[str, list[Any]] = {"comparison": [], "sweep": [], "trial": []}
    for run in runs:
        by_role[run.data.tags["role"]].append(run)
    (parent,) = by_role["comparison"]
    return Ids(
        name=name,
        experiment=parent.info.experiment_id,
        parent=parent.info.run_id,
        stages={run.info.run_name: run.info.run_id for run in by_role["sweep"]},
        confirmed=[
            run.info.run_id for run in by_role["trial"] if run.data.tags["stage"] == "confirm"
        ],
    )


def look(address: str, name: str, out: Path) -> dict[str, Path]:
    """Go through MLflow's pages of a comparison, and return the picture of each.

    Raises:
        playwright.sync_api.Error: a page doesn't show what it should.
    """
    ids = find(address, name)
    looks = {
        "runs": _runs,
        "comparison": _comparison,
        "report": _report,
        "compare": _compare,
        "trial": _trial,
    }
    pictures = {}
    with _browser() as page:
        page.add_init_script(_NO_ASSISTANT)
        for which, visit in looks.items():
            visit(page, f"{address}/#", ids)
            pictures[which] = _picture(page, out / f"mlflow-{which}.png")
    return pictures


def look_at_study(address: str, name: str, out: Path) -> dict[str, Path]:
    """Go through a study's pages in Optuna's dashboard, and return the picture of each.

    Raises:
        playwright.sync_api.Error: a page doesn't show what it should.
    """
    pictures = {}
    looks = {
        "history": ("History", ["Objective 0", "Best Trial", "learning_rate"]),
        "analytics": ("Analytics", ["Hyperparameter Relationships", "Contour"]),
    }
    with _browser() as page:
        page.goto(f"{address}/dashboard")
        page.get_by_text(f". {name}").click()
        for which, (link, texts) in looks.items():
            page.get_by_role("link", name=link).click()
            page.get_by_text(f"{name} (id=").wait_for()
            for text in texts:
                page.get_by_text(text).first.wait_for()
            pictures[which] = _picture(page, out / f"optuna-{which}.png")
    return pictures


@contextmanager
def _browser() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PAGE_MILLISECONDS)
        yield page
        browser.close()


def _picture(page: Page, file: Path) -> Path:
    """Take a picture once all is drawn."""
    page.wait_for_timeout(SETTLED_MILLISECONDS)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=file)
    return file


# MLflow's assistant takes a third of the page, unless it was closed before.
_NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""


def _runs(page: Page, base: str, ids: Ids) -> None:
    """The list: the comparison, and below it its stages."""
    page.goto(f"{base}/experiments/{ids.experiment}/runs")
    name = page.get_by_text(ids.name, exact=True).first
    name.wait_for()
    name.locator("xpath=ancestor::*[@role='gridcell']").get_by_role("button").first.click()
    for stage in ids.stages:
        page.get_by_text(stage, exact=True).first.wait_for()


def _comparison(page: Page, base: str, ids: Ids) -> None:
    """The comparison's own page: the answer, and links to its stages."""
    page.goto(f"{base}/experiments/{ids.experiment}/runs/{ids.parent}")
    page.get_by_text(ids.name, exact=True).first.wait_for()
    page.get_by_text("The whole report is among the artifacts").wait_for()
    for stage in ids.stages:
        page.get_by_text(stage[:30]).first.wait_for()


def _report(page: Page, base: str, ids: Ids) -> None:
    """The report, as an artifact that is shown, with its interactive plots."""
    page.goto(f"{base}/experiments/{ids.experiment}/runs/{ids.parent}/artifacts/report/report.html")
    report = page.frame_locator("iframe")
    report.get_by_role("heading", level=1).wait_for()
    report.locator(".plot .main-svg").first.wait_for()  # drawn by its scripts


def _compare(page: Page, base: str, ids: Ids) -> None:
    """Runs compared: the chart of parallel coordinates, and what they have in common below it."""
    runs, experiments = json.dumps(ids.confirmed), json.dumps([ids.experiment])
    page.goto(f"{base}/compare-runs?runs={runs}&experiments={experiments}")
    page.get_by_text(f"Comparing {len(ids.confirmed)} Runs").wait_for()
    page.locator("svg").get_by_text("loss", exact=True).first.wait_for()
    for param in ("batch_size", "learning_rate", "val/accuracy"):
        page.get_by_text(param, exact=True).first.wait_for(state="attached")


def _trial(page: Page, base: str, ids: Ids) -> None:
    """A repeat: its metrics, its data set, and its model."""
    page.goto(f"{base}/experiments/{ids.experiment}/runs/{ids.confirmed[0]}")
    for text in ("val/accuracy", "test/accuracy", "model"):
        page.get_by_text(text, exact=True).first.wait_for()


if __name__ == "__main__":
    main()
