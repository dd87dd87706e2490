from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
from fake_pool import diverges, script_of_ten, use_pool
from mlflow import MlflowClient
from tracking_helpers import new_store

from benchmarks import pages
from cnn.config import PRECISIONS
from cnn.losses import LOSSES
from cnn.optimizers import OPTIMIZERS, SCHEDULES
from experiments.compare import SEARCHES, build_parser, main
from experiments.comparison import plan
from experiments.study.settings import Settings

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    *("--losses", "mse", "cross_entropy", "--searches", "2", "--trials", "2", "--epochs", "2"),
    *("--repeats", "2", "--workers", "1", "--study", "c"),
]


@pytest.fixture(autouse=True)
def small_world(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> None:
    """Each test has its own folder, which the decoded digits are in already."""
    (Path.cwd() / "data").symlink_to(digits_cache)
    use_pool(monkeypatch, script_of_ten)


@pytest.fixture(scope="module")
def printed(
    tmp_path_factory: pytest.TempPathFactory, traced_once: None, digits_cache: Path
) -> tuple[Path, str]:
    """A folder in which a comparison was made, and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "data").symlink_to(digits_cache)
    out = io.StringIO()
    with new_store(folder), redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        use_pool(patch, script_of_ten)
        assert main(SMALL) == 0
    return folder, out.getvalue()


@pytest.fixture
def compared(printed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Work where a comparison was made; give what it printed. Nothing there is to be changed."""
    folder, out = printed
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return out


def test_the_help_names_every_choice() -> None:
    text = build_parser().format_help()
    for names in (LOSSES, SEARCHES, OPTIMIZERS, SCHEDULES, PRECISIONS):
        for name in names:
            assert re.search(rf"\b{name}\b", text), name


def test_every_way_to_search_can_be_asked_for() -> None:
    assert SEARCHES == plan.SEARCHES


def test_every_setting_is_an_option_but_those_that_a_comparison_has_of_its_own() -> None:
    own = {"search", "training", "configurations", "tags", "worker_device"}
    own |= {"pruner", "timeout", "register", "patience", "min_delta", "sampler"}
    assert set(Settings.__dataclass_fields__) - own <= set(vars(build_parser().parse_args([])))


def test_a_comparison_ends_with_its_answer_and_a_report(compared: str) -> None:
    out = compared
    assert re.search(r"^in all +14 trainings +28 epochs$", out, re.M)
    assert re.search(r"^takes about \d+:\d\d, if no training is known already$", out, re.M)
    assert "\nexplore · 0 of 14\n" in out
    assert re.search(r"\nthe chosen configurations, each on a fresh seed · 8 of 14, .* left\n", out)
    assert re.search(r"^  mse, seed 1999: \d", out, re.M)
    assert "  report:            reports/c/report.html" in out
    (predict,) = re.findall(
        r"^  predict: +python -m tracking.predict digits:test --run-id (\w+)", out, re.M
    )
    assert MlflowClient().get_run(predict).data.params["seed"] == "1"
    assert Path("reports/c/report.html").stat().st_size > 10_000
    (run,) = MlflowClient().search_runs(["1"], "tags.role = 'comparison'")
    note = run.data.tags["mlflow.note.content"]
    answer, *_ = note.split("\n")
    assert answer in out
    assert f"/runs/{run.info.run_id}/artifacts/report/report.html" in note
    assert set(run.data.metrics) == {"mse/test_accuracy", "cross_entropy/test_accuracy"}
    stored = {each.path for each in MlflowClient().list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/report.md", "report/data"} <= stored
    assert Path("reports/c/figures/examples.png").exists()
    assert predict in Path("reports/c/report.md").read_text().partition("## Images\n")[2]


def test_the_links_open_all_its_trainings_and_its_answer(compared: str) -> None:
    client = MlflowClient()
    (run,) = client.search_runs(["1"], "tags.role = 'comparison'")
    key = run.data.tags["comparison_id"][:8]
    page = "http://127.0.0.1:5000/#/experiments/1/runs"
    assert f"then open {page}?viewStateShareKey={key}\n" in compared
    assert f"the answer there:  {page}/{run.info.run_id}\n" in compared
    tags = client.get_experiment("1").tags
    views = [each for each in tags if each.startswith("mlflow.sharedViewState.")]
    assert views == [f"mlflow.sharedViewState.{key}"]  # and none of its stages
    state = json.loads(json.loads(tags[views[0]])["state"])
    assert len(client.search_runs(["1"], state["searchFilter"])) == 14
    assert "comparison c, the best first" in tags["mlflow.note.content"]
    for stage in client.search_runs(["1"], "tags.role = 'sweep'"):
        assert "best/val_accuracy" not in stage.data.metrics


@pytest.mark.slow
def test_the_same_command_again_looks_at_nothing_twice(
    compared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Path("reports/c/report.md").read_text()
    assert main(SMALL) == 0
    assert "seed 1999:" not in capsys.readouterr().out
    assert Path("reports/c/report.md").read_text() == first
    (run,) = MlflowClient().search_runs(["1"], "tags.role = 'comparison'")
    history = MlflowClient().get_metric_history(run.info.run_id, "mse/test_accuracy")
    assert len(history) == 1


def test_where_no_loss_ends_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, diverges)
    assert main(SMALL) == 1
    assert capsys.readouterr().err == "stopped: no loss has a complete repeat\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats", "0"], "--repeats must be ≥ 1, not 0"),
        (["--searches", "0"], "--searches must be ≥ 1, not 0"),
        (["--search", "qmc"], "invalid choice: 'qmc' (choose from"),
        (["--min-effect", "-1"], "--min-effect must be points from 0 to 100, not -1"),
        (["--losses", "hinge"], "unknown loss 'hinge'"),
        (["--trials", "none"], "invalid int value: 'none'"),
        (["--out", "mlflow.db"], "can't write --out: there is no folder"),
        (["--out", "mlflow.db/reports"], "can't write --out: there is no folder"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m experiments.compare: error: ")
    assert message in line


TIMELESS = (
    *("budget.csv", "confusions.csv", "curves.csv", "importances.csv", "learning_curves.csv"),
    *("pairs.csv", "table.csv"),
)


def in_a_process(folder: Path, *, until: str = "") -> None:
    """Run the command in a folder, to its end or until a line begins so, when it is killed."""
    command = [sys.executable, "-u", "-m", "experiments.compare", *SMALL, "--data-dir", "../data"]
    command += ["--trials", "5"]  # with a step that refines
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until and line.lstrip().startswith(until):
                process.kill()
                return
    assert not until, f"no line begins with {until!r}"
    assert process.returncode == 0


@pytest.mark.slow
def test_a_comparison_that_is_killed_in_every_stage_ends_with_the_same_report(
    tmp_path: Path,
) -> None:
    for name in ("calm", "stormy"):
        (tmp_path / name).mkdir()
    in_a_process(tmp_path / "calm")
    for stage in (
        "1/26",
        "6/26",
        "refine",
        "19/26",
        "the chosen",
        "22/26",
        "the configuration",
        "the test",
        "mse,",
    ):
        in_a_process(tmp_path / "stormy", until=stage)
    in_a_process(tmp_path / "stormy")
    calm, stormy = (tmp_path / name / "reports" / "c" / "data" for name in ("calm", "stormy"))
    for file in TIMELESS:
        assert (stormy / file).read_bytes() == (calm / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.skipif(pages.chromium() is None, reason="there is no Chromium")
def test_mlflows_pages_show_a_comparison_in_a_browser(compared: str, tmp_path: Path) -> None:
    with pages.served(os.environ["MLFLOW_TRACKING_URI"]) as address:
        pictures = pages.look(address, "c", tmp_path / "pictures")
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        f"mlflow-{name}.png" for name in pictures
    }
    assert min(file.stat().st_size for file in pictures.values()) > 20_000


@pytest.mark.parametrize("text", ["batch_size=16..64", "learning_rate=0.1..0.2", "loss=mse,l1"])
def test_the_three_of_its_figures_have_their_own_flags(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["--repeats", "2", "--vary", text]) == 2
    assert f", not --vary {text.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_another_parameter_is_searched_named_and_reported() -> None:
    assert main([*SMALL, "--vary", "weight_decay=1e-4..1e-2:log"]) == 0
    report = Path("reports/c/report.md").read_text()
    (heads,) = (line for line in report.splitlines() if line.startswith("| loss | learning rate"))
    assert "| batch size | weight decay |" in heads
    trials = pd.read_csv("reports/c/data/trials.csv")
    assert trials["weight_decay"].between(1e-4, 1e-2).all()
    runs = MlflowClient().search_runs(["1"], "tags.role = 'trial'")
    for run in runs:
        rate = float(run.data.params["weight_decay"])
        assert f" wd={rate:.2g}" in run.info.run_name
    repeats = [run for run in runs if run.data.tags["stage"] == "repeat"]
    winners = {run.data.params["weight_decay"] for run in repeats}
    assert len(repeats) == 4
    assert {float(winner) for winner in winners} <= set(trials["weight_decay"])
