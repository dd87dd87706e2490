"""What commands print, from the first line to the last: as lines, as JSON, quietly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_pool import diverges, script_of_ten, use_pool

from experiments import compare, sweep

REPOSITORY = Path(__file__).parents[1]
SMALL = ["--trials", "2", "--epochs", "2", "--workers", "1", "--pruner", "none"]
COMPARED = [
    *("--losses", "mse", "cross_entropy", "--searches", "1", "--trials", "2", "--epochs", "2"),
    *("--repeats", "2", "--workers", "1", "--study", "c"),
]


@pytest.fixture(autouse=True)
def small_world(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> None:
    """Each test has its own folder, which the decoded digits are in already."""
    (Path.cwd() / "data").symlink_to(digits_cache)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    use_pool(monkeypatch, script_of_ten)


def records(out: str) -> list[dict[str, Any]]:
    """Read lines of JSON, without the NaN and Infinity that Python takes as well."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def documented() -> dict[str, set[str]]:
    """Return the fields of each event that the documentation names."""
    page = (REPOSITORY / "docs" / "reference" / "output.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", page, re.M)
    return {event: set(re.findall(r"`(\w+)`", fields)) - {"null"} for event, fields in rows}


def assert_documented(found: list[dict[str, Any]]) -> None:
    fields, common = documented(), {"event", "time"}
    for record in found:
        assert set(record) - common - {"study"} == fields[record["event"]] - {"study"}, record


def test_a_sweep_as_json_has_each_of_its_events_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sweep.main([*SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    found = records(out)
    assert err == ""
    assert [record["event"] for record in found] == [
        *("starting", "starting", "sweep_started"),
        *("trial_started", "epoch_ended", "epoch_ended", "trial_ended") * 2,
        *("best_registered", "sweep_ended", "result"),
    ]
    assert_documented(found)
    assert (found[-1]["trial"], found[-1]["val_accuracy"]) == (0, 0.9)
    (first, *_) = (record for record in found if record["event"] == "trial_started")
    assert found[-1]["run_id"] == first["run_id"]


def test_what_diverges_has_null_where_json_has_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pool(monkeypatch, diverges)
    assert sweep.main([*SMALL, "--json"]) == 1
    out, err = capsys.readouterr()
    found = records(out)
    assert_documented(found)
    losses = [each["metrics"]["val/loss"] for each in found if each["event"] == "epoch_ended"]
    assert losses == [pytest.approx(0.8), None] * 2
    assert re.fullmatch(r"no trial of study \S+ is complete\n", err)


def test_a_comparison_as_json_has_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*COMPARED, "--json"]) == 0
    out, err = capsys.readouterr()
    found = records(out)
    assert err == ""
    assert_documented(found)
    events = [record["event"] for record in found]
    assert events[:4] == ["starting", "starting", "comparison_planned", "stage_started"]
    assert events[-2:] == ["comparison_ended", "comparison_result"]
    (planned,) = (record for record in found if record["event"] == "comparison_planned")
    assert planned["trainings"] == {"mse": 3, "cross_entropy": 3}
    assert (planned["total"], planned["epochs"]) == (8, 2)
    assert planned["expected_seconds"] > 0
    stages = [record["title"] for record in found if record["event"] == "stage_started"]
    assert (stages[0], stages[-1]) == ("explore", "the test split")
    last = [record for record in found if record["event"] == "trial_ended"][-1]
    assert (last["done"], last["total"]) == (8, 8)
    assert events.count("model_tested") == 4
    assert "mse" in found[-1]["answer"]
    assert Path(found[-1]["report"]).exists()
    assert compare.main([*COMPARED, "--json"]) == 0
    again = records(capsys.readouterr().out)
    assert_documented(again)
    assert "trial_started" not in {record["event"] for record in again}
    assert again[-1]["answer"] == found[-1]["answer"]
    assert all(record["study"] for record in again if record["event"] == "sweep_ended")


@pytest.mark.parametrize("argv", [SMALL, pytest.param(COMPARED, marks=pytest.mark.slow)])
def test_quiet_is_the_end_of_what_is_printed_otherwise(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = sweep.main if argv == SMALL else compare.main
    assert main([*argv, "--quiet"]) == 0
    quiet, err = capsys.readouterr()
    assert err == ""
    assert main(argv) == 0  # there is nothing left to do
    loud = capsys.readouterr().out
    registered = r"  registered: .*\n"
    assert re.sub(registered, "", loud).endswith(re.sub(registered, "", quiet))
    assert not re.search("already finished|starting|explore", quiet)
    assert re.search(r"best: trial 0|`mse`", quiet)


def test_only_one_of_quiet_and_json_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--quiet", "--json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: argument --json: not allowed with argument --quiet")


def test_of_many_trials_the_ten_best_are_shown_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--trials", "12", "--epochs", "1", "--workers", "1", "--register", "none", "--quiet"]
    assert sweep.main(argv) == 0
    _, title, *rows = capsys.readouterr().out.partition("\n\nbest: ")[0].splitlines()
    assert title == "the best 10 of 12 trials, the best first:"
    assert [int(row.split()[0]) for row in rows] == list(range(10))


# The first line

FIRST_LINE = """
import io, runpy, sys
class Out(io.StringIO):
    def write(self, text):
        slow = {"torch", "optuna", "mlflow", "pandas", "rich"} & set(sys.modules)
        sys.__stdout__.write(f"{text.strip()} {sorted(slow)}")
        sys.__stdout__.flush()
        import os
        os._exit(0)
sys.stdout = Out()
name = sys.argv.pop(1)
runpy.run_module(name, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("experiments.sweep", "starting workers, opening digits []"),
        ("experiments.compare", "starting workers, opening digits []"),
        ("experiments.rerun 0123", "reading run 0123, opening its data set []"),
    ],
)
def test_the_first_line_is_there_before_the_slow_imports(command: str, line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LINE, *command.split()],
        cwd=Path.cwd(),
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == (line, "")


# A real terminal

SWEEP_OF_200 = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
import pytest
from fake_pool import epoch, use_pool, weights
def script(job, config):
    yield epoch(job, 1, (job % 90) / 100, diverged=job % 20 > 0)
    yield weights(job, 10)
from experiments import sweep
with pytest.MonkeyPatch.context() as patch:
    use_pool(patch, script)
    sweep.main(["--trials", "200", "--epochs", "1", "--workers", "64", "--sampler", "random",
                "--losses", "l1", "mse", "cross_entropy", "label_smoothing"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_no_line_of_200_trials_wraps_in_a_terminal_of_60_columns(tmp_path: Path) -> None:
    def tmux(*words: str) -> str:
        command = ["tmux", "-L", tmp_path.name, "-f", os.devnull, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (tmp_path / "sweep.py").write_text(
        SWEEP_OF_200.format(repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"))
    )
    # The history of a pane is as long as the option says when it is made.
    tmux("start-server", ";", "set", "-g", "history-limit", "9999", ";", "new-session", "-d")
    try:
        run = f"cd {tmp_path}; {sys.executable} sweep.py; touch done; sleep 60"
        tmux("new-session", "-d", "-s", "sweep", "-x", "60", "-y", "24", run)
        deadline = time.monotonic() + 600
        while not (tmp_path / "done").exists():
            assert time.monotonic() < deadline, tmux("capture-pane", "-p", "-t", "sweep")
            time.sleep(0.5)
        history = ("capture-pane", "-p", "-S", "-", "-t", "sweep")
        lines, joined = (tmux(*words).splitlines() for words in (history, (*history, "-J")))
    finally:
        tmux("kill-server")
    # -J joins what the terminal has wrapped. An address is in one piece, so that it can be clicked.
    wrapped = [line for line in joined if len(line.rstrip()) > 60]
    assert [line.split()[:2] for line in wrapped] == [["then", "open"]]
    rows = [line for line in lines if re.match(r" *\d+ +(complete|diverged) ", line)]
    assert len(rows) == 200 + 10
    assert not [line for line in lines if "━" in line or "epoch 1/" in line]  # no live line stays
    assert "the best 10 of 200 trials, the best first:" in lines
