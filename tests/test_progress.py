"""What a sweep shows while it runs: on terminals of all widths, as lines, as JSON."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from small_sweep import small_settings

from experiments.study.events import (
    SweepEnded,
    SweepEvent,
    SweepStarted,
    TrialEnded,
    TrialNote,
    TrialProgressed,
    TrialReused,
    TrialStarted,
)
from experiments.study.lines import JsonLines, PlainLines, ProblemLines
from experiments.study.output import Output
from experiments.study.progress import SweepProgress, sparkline
from experiments.study.settings import Settings
from experiments.study.terminal import STYLES, LockedConsole, Terminal
from tracking.progress import asking_the_terminal

WIDTHS = (200, 146, 100, 80, 60, 40)
LONG = "RuntimeError: the size of tensor a (32) must match the size of tensor b (64) at dimension 1"


def settings(**changes: Any) -> Settings:
    given = {"trials": 24, "epochs": 10, "batch_sizes": (16, 32, 64, 128)}
    return small_settings("sqlite:///none.db", **given | changes)


def begun(**changes: Any) -> SweepStarted:
    given = {
        "study": "digits-7ac57a98",
        "experiment": "cnn-sweep",
        "experiment_id": "1",
        "parent_run_id": "a",
        "runs_page": "#/experiments/1/runs",
        "num_before": 0,
        "best_before": None,
    }
    return SweepStarted(**given | changes)


def started(trial: int, *, of: Settings | None = None, **changes: Any) -> TrialStarted:
    space = (of or settings()).space()
    names = ("resumed_after",)
    values = {"loss": "cross_entropy", "learning_rate": 0.000296} | changes
    config = space.example(**{k: v for k, v in values.items() if k not in names})
    others = {k: v for k, v in values.items() if k in names}
    return TrialStarted(trial=trial, run_id=f"run {trial}", config=config, **others)


def progressed(trial: int, number: int, accuracy: float) -> TrialProgressed:
    return TrialProgressed(trial=trial, number=number, metrics={"val/accuracy": accuracy})


def ended(trial: int, outcome: str = "complete", **changes: Any) -> TrialEnded:
    given = {"accuracy": 0.9638, "epochs": 10, "seconds": 6.9, "reason": ""}
    return TrialEnded(trial=trial, outcome=outcome, **given | changes)


def whole_sweep() -> Iterator[SweepEvent]:
    """Yield the events of a sweep in which everything happens."""
    yield begun(num_before=2, best_before=(0.91, 1), unfinished={2: 4, 3: 0}, notes=("a note",))
    yield started(2, resumed_after=4)
    yield started(3, resumed_after=0, loss="l1")
    for number in range(1, 11):
        yield progressed(2, number, number / 12)
    yield ended(2)
    yield progressed(3, 1, 0.1)
    yield TrialNote(trial=3, text=f"resumes on another worker: {LONG}")
    yield ended(3, "failed", accuracy=0.1, epochs=1, reason=LONG)
    yield started(4, loss="mse")
    yield progressed(4, 1, 0.4)
    yield ended(4, "pruned", accuracy=0.4, epochs=1)
    yield started(5)
    yield ended(5, "diverged", accuracy=None, epochs=0, reason="not finite in epoch 1")
    yield TrialReused(
        trial=6, run_id="r", config=started(6).config, outcome="complete", accuracy=1.0
    )
    yield started(7)
    yield progressed(7, 1, 0.5)
    yield ended(7, "interrupted", accuracy=0.5, epochs=1)
    yield SweepEnded(outcome="interrupted", reason="")


def shown(
    events: Iterable[SweepEvent],
    width: int,
    *,
    of: Settings | None = None,
    height: int = 24,
    **options: Any,
) -> tuple[list[str], list[str]]:
    """Return the lines that stay on a terminal, and those that are live after the last event."""
    file = io.StringIO()
    given = {"force_terminal": True, "highlight": False, "legacy_windows": False}
    console = LockedConsole(file=file, width=width, height=height, **given | options)
    display = Terminal(of or settings(), None, console)
    with display:
        for event in events:
            display.show(event)
        live = console.render_lines(display, pad=False)
        display.is_shown = False
    stay = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    return stay, ["".join(segment.text for segment in line) for line in live]


def rows_in(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if re.match(r" ?\d+ ", line)]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_row_is_longer_than_the_terminal_is_wide(width: int) -> None:
    events = list(whole_sweep())
    for last in range(1, len(events) + 1):
        stay, live = shown(events[:last], width)
        assert max(map(cell_len, [*stay, *live]), default=0) <= width
    found = [tuple(row.split()[:3]) for row in dict.fromkeys(rows_in(stay)) if "/" not in row]
    assert found == [
        ("2", "complete", "96.38%"),
        ("3", "failed", "10.00%"),
        ("4", "pruned", "40.00%"),
        ("5", "diverged", "–"),
        ("6", "complete", "100.00%"),
        ("7", "interrupted" if width > 40 else "interru…", "50.00%"),
    ]


def test_the_least_important_columns_go_first() -> None:
    events = [begun(), started(12), progressed(12, 1, 0.5), ended(12, epochs=1)]
    rows = {width: rows_in(shown(events, width)[0])[-1] for width in (200, 80, 60, 59, 40)}
    assert rows[200] == (
        "12  complete      96.38%  cross_entropy  lr 0.000296  bs 16     1 epoch    6.9 s  ▅"
    )
    assert rows[80] == rows[200].removesuffix("  ▅")
    assert rows[60] == "12  complete      96.38%  cross_entropy  lr 0.000296  bs 16"
    assert rows[59] == "12 complete     96.38% cross_entropy lr 0.000296 bs 16"
    assert rows[40] == "12 complete  96.38% cros…tropy  0.000296"


def test_a_long_name_is_shortened(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text("def mine(outputs, labels): ...")
    name = f"{tmp_path / 'losses.py'}:mine"
    of = settings(losses=("mse", name))
    (row,) = rows_in(shown([begun(), started(1, of=of, loss=name), ended(1)], 100, of=of)[0])
    assert f"  {name[:9]}…es.py:mine  lr" in row


def test_a_line_of_a_running_trial_has_its_accuracy_and_its_curve() -> None:
    events = [begun(), started(5), *(progressed(5, n, n / 10) for n in (1, 2, 3))]
    _, live = shown(events, 100)
    assert live[0].startswith(" 5  epoch 3/10    30.00%  cross_entropy  lr 0.000296  bs 16")
    assert live[0].endswith("  ▁▂▃")
    assert shown(events, 80)[1][0].endswith("  bs 16   ▁▂▃")  # where the times would not fit


def test_best_and_time_left_are_at_the_bottom_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("experiments.study.progress.time.monotonic", lambda: now[0])

    def events() -> Iterator[SweepEvent]:
        yield begun()
        for trial in range(7):
            now[0] += 10
            yield started(trial)
            yield progressed(trial, 1, 0.5 + trial / 100)
            yield ended(trial, accuracy=0.5 + trial / 100)

    for width, best in {100: "best 56.00% (trial 6)", 40: "best 56.00%"}.items():
        now[0] = 0.0
        stay, live = shown(events(), width)
        assert live[-1].endswith(f"  7/24  {best}  28:20 left")
        assert not any("best" in row or "left" in row for row in rows_in(stay))


def test_the_time_left_is_that_of_the_epochs_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("experiments.study.progress.time.monotonic", lambda: now[0])
    progress = SweepProgress(settings(trials=4))
    progress.follow(begun())
    assert progress.seconds_left() is None
    progress.follow(started(0, resumed_after=2))
    for number in range(1, 5):
        progress.follow(progressed(0, number, 0.5))
    now[0] = 20.0  # for two epochs: the first two were repeated in no time
    assert progress.seconds_left() == 10 * (3 * 10 + 6)
    progress.follow(ended(0, "pruned", epochs=4))
    assert progress.seconds_left() == 10 * (3 * 4)


def test_more_running_trials_than_lines_are_counted() -> None:
    events = [begun(), *(started(trial) for trial in range(64))]
    _, live = shown(events, 100, of=settings(workers=64, trials=200), height=24)
    assert len(live) == 23
    assert live[-2] == "and 43 more running"
    assert [int(line.split()[0]) for line in live[:-2]] == list(range(21))


def test_the_width_is_that_of_the_moment() -> None:
    console = LockedConsole(file=io.StringIO(), width=100, height=24, force_terminal=True)
    display = Terminal(settings(), None, console)
    for event in (begun(), started(1), progressed(1, 1, 0.5)):
        display.show(event)
    console.width = 40
    lines = console.render_lines(display, pad=False)
    assert max(sum(cell_len(segment.text) for segment in line) for line in lines) <= 40


def test_an_old_width_in_the_environment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "999")
    with asking_the_terminal():
        assert Console(file=io.StringIO()).width != 999
    assert os.environ["COLUMNS"] == "999"


def outcomes() -> list[SweepEvent]:
    events: list[SweepEvent] = [begun()]
    for trial, outcome in enumerate(STYLES):
        events += [started(trial), ended(trial, outcome)]
    return events


def printed(*, no_color: bool) -> LockedConsole:
    console = LockedConsole(
        file=io.StringIO(),
        width=100,
        force_terminal=True,
        color_system="truecolor",
        record=True,
        _environ={"NO_COLOR": "1"} if no_color else {},
        highlight=False,
    )
    with Terminal(settings(), None, console) as display:
        for event in outcomes():
            display.show(event)
    return console


def test_outcomes_have_colours_that_colour_blind_people_can_tell_apart_and_words() -> None:
    okabe_ito = {"#009E73", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#0072B2", "#F0E442"}
    assert set(STYLES.values()) <= okabe_ito
    assert len(set(STYLES.values())) == len(STYLES)
    page = printed(no_color=False).export_html(inline_styles=True)
    for outcome, colour in STYLES.items():
        assert re.search(f"color: {colour.lower()};[^>]*>  {outcome}", page), outcome


def test_no_color_is_respected() -> None:
    console = printed(no_color=True)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert not re.search(r"\x1b\[[\d;]*\b38;", text)
    assert all(outcome in text for outcome in STYLES)


def test_a_terminal_without_unicode_gets_rows_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "encoding", "ascii")
    stay, live = shown(list(whole_sweep())[:-2], 40)
    assert max(map(cell_len, [*stay, *live])) <= 40
    for line in [*rows_in(stay), *live]:
        line.encode("ascii")


def test_a_resumed_study_says_what_resumes_and_after_which_epoch() -> None:
    stay, _ = shown(list(whole_sweep()), 100)
    text = "\n".join(stay)
    assert "24 trials of 10 epochs, 2 already finished; 1 worker;" in text
    assert "trial 2 resumes after epoch 4; trial 3 starts again" in text
    assert any(row.endswith("resumed after epoch 4") for row in rows_in(stay))


@pytest.mark.parametrize("width", WIDTHS)
def test_one_is_no_plural_and_no_number_is_nan(width: int) -> None:
    nan = float("nan")
    events = [*whole_sweep(), started(9), progressed(9, 1, nan), ended(9, accuracy=nan, epochs=1)]
    of = settings(epochs=1, trials=1, workers=1)
    for lines in shown(events, width, of=of):
        text = " ".join(" ".join(lines).split())
        assert not re.search(r"\b1 (epochs|trials|workers)\b|nan", text)


def test_a_trial_that_failed_says_why_on_a_narrow_terminal_too() -> None:
    events = [begun(), started(3), ended(3, "failed", epochs=3, reason=LONG)]
    stay, _ = shown(events, 59)
    place = next(i for i, line in enumerate(stay) if line.startswith(" 3 failed"))
    assert stay[place + 1] == "  RuntimeError: the size of tensor a (32) must match the s…"


def test_control_characters_of_others_are_escaped() -> None:
    events = [begun(study="\x1b[2J"), started(3), ended(3, "failed", reason="\x1b[31mred")]
    stay, _ = shown(events, 100)
    assert "\\x1b[2J" in " ".join(stay)
    assert "\\x1b[31mred" in " ".join(stay)


@pytest.mark.parametrize(
    ("accuracies", "width", "text"),
    [
        ([], 5, ""),
        ([0.0, 0.5, 1.0], 5, "▁▅█"),
        ([0.1 * n for n in range(10)], 4, "▁▃▅█"),
    ],
)
def test_a_curve_goes_from_0_to_100_percent(accuracies: list[float], width: int, text: str) -> None:
    assert sparkline(accuracies, width) == text


# Lines


def test_plain_output_is_a_line_an_event_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with PlainLines(settings()) as lines:
        for event in whole_sweep():
            lines.show(event)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.replace("\n", "").isprintable()
    first, resumes, note, *others = out.splitlines()
    assert first.startswith("study digits-7ac57a98: 24 trials of 10 epochs, 2 already finished; ")
    assert resumes == "trial 2 resumes after epoch 4; trial 3 starts again"
    assert note == "note: a note"
    assert [re.sub(" +", " ", line) for line in others] == [
        " 3/24 trial 2 complete 96.38% cross_entropy lr 0.000296 bs 16 10 epochs 6.9 s "
        "resumed after epoch 4",
        f"note: trial 3 resumes on another worker: {LONG}",
        f" 4/24 trial 3 failed 10.00% l1 lr 0.000296 bs 16 1 epoch 6.9 s {LONG}, started again",
        " 5/24 trial 4 pruned 40.00% mse lr 0.000296 bs 16 1 epoch 6.9 s",
        " 6/24 trial 5 diverged – cross_entropy lr 0.000296 bs 16 0 epochs 6.9 s "
        "not finite in epoch 1",
        " 7/24 trial 6 complete 100.00% cross_entropy lr 0.000296 bs 16 10 epochs "
        "reused, not trained again",
        " 7/24 trial 7 interrupted 50.00% cross_entropy lr 0.000296 bs 16 1 epoch 6.9 s",
    ]


def test_quiet_output_is_problems_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with ProblemLines(settings()) as lines:
        for event in whole_sweep():
            lines.show(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "note: a note",
        f"note: trial 3 resumes on another worker: {LONG}",
        f"trial 3 failed: {LONG}",
    ]


def strict(line: str) -> dict[str, Any]:
    """Read a line as JSON, without the NaN and Infinity that Python takes as well."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def test_every_event_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    events = list(whole_sweep())
    with Output(as_json=True) as output, output.display(settings()) as display:
        assert isinstance(display, JsonLines)
        print("of a library")
        for event in events:
            display.show(event)
    out, err = capsys.readouterr()
    assert err == "of a library\n"
    records = [strict(line) for line in out.splitlines()]
    assert len(records) == len(events)
    assert {record["study"] for record in records} == {"digits-7ac57a98"}
    last = next(each for each in reversed(records) if each["event"] == "trial_ended")
    assert last["outcome"] == "interrupted"
    assert (last["done"], last["total"]) == (7, 24)


def test_numbers_that_json_has_not_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(as_json=True) as output:
        output.record("x", values=[float("nan"), float("inf"), 1.5], rate=float("-inf"))
    record = strict(capsys.readouterr().out)
    assert (record["values"], record["rate"]) == ([None, None, 1.5], None)


def test_a_text_of_rich_is_not_markup() -> None:
    events = [begun(study="[red]x[/red]"), started(1), ended(1, "failed", reason="[bold]why")]
    stay, _ = shown(events, 120)
    assert "[red]x[/red]" in " ".join(stay)
    assert "[bold]why" in " ".join(stay)
