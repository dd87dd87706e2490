"""Optuna's dashboard of a sweep's kind of study, looked at in a real browser."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest

from benchmarks import pages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pages.chromium() is None, reason="there is no Chromium"),
    pytest.mark.skipif(find_spec("optuna_dashboard") is None, reason="there is no dashboard"),
]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(study_name="sweep", storage=url, direction="maximize")
    for accuracy in (0.2, 0.7, 0.5):
        trial = study.ask()
        trial.suggest_float("learning_rate", 0.001, 1.0, log=True)
        trial.suggest_categorical("batch_size", [32, 64])
        trial.report(accuracy, 1)
        study.tell(trial, accuracy)
    return url


def test_the_dashboard_shows_a_study(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import Error

    with pages.dashboard(storage) as address:
        pictures = pages.look_at_study(address, "sweep", tmp_path / "pictures")
        monkeypatch.setattr(pages, "PAGE_MILLISECONDS", 15_000)
        with pytest.raises(Error, match="waiting for get_by_text"):
            pages.look_at_study(address, "other", tmp_path / "pictures")
    assert [file.name for file in pictures.values()] == [
        "optuna-history.png",
        "optuna-analytics.png",
    ]
    assert min(file.stat().st_size for file in pictures.values()) > 20_000
