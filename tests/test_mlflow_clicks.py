"""How many clicks it takes to see the winner of a sweep in MLflow's pages, in a real browser."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_pool import script_of_ten, use_pool

from benchmarks import pages
from experiments.sweep import main

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pages.chromium() is None, reason="there is no Chromium"),
]

SWEEP = ["--epochs", "2", "--sampler", "random", "--pruner", "none", "--workers", "1"]


class Visitor:
    """A person who was never here before: MLflow shows its hints. Clicks are counted."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.clicks = 0

    def click(self, locator: Locator) -> None:
        locator.first.click()
        self.clicks += 1

    def click_to_new_tab(self, locator: Locator) -> None:
        """Click a link of a description: these open a tab of their own."""
        with self.page.context.expect_page() as opened:
            self.click(locator)
        self.page = opened.value

    def sees_the_winner(self) -> bool:
        """Return whether the first row of the list of runs is the best trial, with its accuracy."""
        words = self.first_row().split()  # their order is not that of the columns
        return {"000", "yes", "0.9"} <= set(words)

    def first_row(self) -> str:
        """Return the first row of the list of runs, once it is within the window."""
        row = self.page.locator("[role='row'][row-index='0']")
        row.get_by_text(re.compile(r"^\d{3} ")).first.wait_for()
        box = row.first.bounding_box()
        size = self.page.viewport_size
        assert box is not None
        assert size is not None
        assert 0 < box["y"] < box["y"] + box["height"] < size["height"]
        return " ".join(" ".join(row.all_inner_texts()).split())


@pytest.fixture
def link(
    mlflow_store: str,
    digits_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Sweep twice, the better one on other images before; return the link that is printed."""
    Path("data").symlink_to(digits_cache)
    use_pool(monkeypatch, script_of_ten)
    assert main([*SWEEP, "--trials", "4", "--study", "first", "--register", "none"]) == 0
    assert main([*SWEEP, "--trials", "6", "--study", "second", "--register", "none"]) == 0
    (page,) = re.findall(r"then open http://127\.0\.0\.1:5000/(\S+)", capsys.readouterr().out)[1:]
    return str(page)


def test_the_pages_of_a_sweep_show_what_they_should(link: str, tmp_path: Path) -> None:
    with pages.served(os.environ["MLFLOW_TRACKING_URI"]) as address:
        pictures = pages.look_at_sweep(address, "second", tmp_path / "pictures")
    assert min(file.stat().st_size for file in pictures.values()) > 20_000


def test_the_winner_is_seen_without_a_click_or_in_three(link: str) -> None:
    with pages.served(os.environ["MLFLOW_TRACKING_URI"]) as address:
        with pages.browser() as page:
            visitor = Visitor(page)
            page.goto(f"{address}/{link}")
            assert visitor.sees_the_winner()
            page.get_by_text("6 matching runs", exact=False).wait_for()
            assert visitor.clicks == 0
        with pages.browser() as page:
            visitor = Visitor(page)
            page.goto(address)
            visitor.click(page.get_by_role("link", name="cnn-sweep"))
            visitor.click(page.get_by_role("button", name="Got it"))  # to a hint of MLflow's
            visitor.click_to_new_tab(page.get_by_role("link", name="sweep second, the best first"))
            assert visitor.sees_the_winner()
            visitor.page.get_by_text("6 matching runs", exact=False).wait_for()
            assert visitor.clicks == 3
