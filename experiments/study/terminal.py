"""A sweep on a terminal or in a notebook: rows of finished trials, and what runs, live below."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from experiments.study.events import SweepEvent, SweepStarted, TrialNote
from experiments.study.lines import introduction, note, rows_of
from experiments.study.progress import Row, SweepProgress, WholeWork
from experiments.study.rows import Cell
from experiments.study.settings import Settings
from tracking.cli import OutputError
from tracking.progress import COLOUR, REFRESHES, bar_line
from tracking.wording import clock, percent

STYLES = {
    "complete": COLOUR,
    "pruned": "#56B4E9",
    "diverged": "#E69F00",
    "failed": "#D55E00",
    "interrupted": "#CC79A7",
}
"""The colours of outcomes. Colour-blind people can tell them apart (Okabe and Ito 2008)."""


class LockedConsole(Console):
    """A console that prints for one thread at a time.

    Rich takes no lock over erasing live lines and drawing them: it would erase a row with them.
    """

    def __init__(self, **options: Any) -> None:
        self.lock = threading.RLock()
        super().__init__(**{"highlight": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        with self.lock:
            super().print(*objects, **options)


class Terminal:
    """Shows a sweep's events on a console; the width is that of the moment."""

    def __init__(
        self,
        settings: Settings,
        whole: WholeWork | None = None,
        console: LockedConsole | None = None,
    ) -> None:
        self.settings = settings
        self.progress = SweepProgress(settings, whole)
        self.rows = rows_of(settings)
        self.console = console or LockedConsole()
        self.live = Live(
            self, console=self.console, transient=True, auto_refresh=False, vertical_overflow="crop"
        )
        self.is_shown = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        self.live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.is_shown = False
        self.live.stop()

    def _refresh(self) -> None:
        """Draw the live lines again, as time goes on and the terminal may have another size."""
        with suppress(OutputError):  # the next row that is printed raises it as well
            while not self._is_over.wait(1 / REFRESHES):
                with self.console.lock:
                    self.live.refresh()

    def show(self, event: SweepEvent) -> None:
        """Show an event."""
        with self.console.lock:
            row = self.progress.follow(event)
        match event:
            case SweepStarted():
                for line in introduction(self.settings, event, self.progress.whole):
                    self.console.print(Text(line))
                self.is_shown = event.num_before < self.settings.trials
            case TrialNote():
                self.console.print(Text(note(event)))
        if row is not None:
            options = self.console.options
            lines = self.rows.lines(row, options.max_width)
            self.console.print(*(_line(cells, options, row) for cells in lines), sep="\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the live lines: a line for each running trial, and at the bottom all of them."""
        if not self.is_shown:
            return
        width = options.max_width
        with self.console.lock:
            running = list(self.progress.running.values())
            room = max(1, options.size.height - 2)  # for these and what else is in the last lines
            shown = running if len(running) <= room else running[: room - 1]
            lines = [_line(self.rows.lines(row, width)[0], options, row) for row in shown]
            if more := len(running) - len(shown):
                lines.append(_cropped(Text(f"and {more} more running", "dim"), width))
        yield from lines
        yield bar_line(self.progress.done, self.progress.total, self._beside_the_bar(), width)

    def _beside_the_bar(self) -> list[Sequence[str]]:
        """Return what can be said beside the bar, from all to little."""
        progress = self.progress
        count = f"{progress.done}/{progress.total}"
        seconds = progress.seconds_left()
        left = "" if seconds is None else f"{clock(seconds)} left"
        best = short = ""
        if progress.best is not None and progress.whole is None:
            short = f"best {percent(progress.best[0])}"
            best = f"{short} (trial {progress.best[1]})"
        return [(count, best, left), (count, short, left), (count, left), (count,)]


def print_rows(settings: Settings, rows: Sequence[Row]) -> None:
    """Print rows of trials."""
    console, arranged = Console(highlight=False), rows_of(settings)
    for row in rows:
        for cells in arranged.lines(row, console.width):
            console.print(_line(cells, console.options, row))


def _line(cells: Sequence[Cell], options: ConsoleOptions, row: Row) -> Text:
    """Return the cells of a row in their colours."""
    text = Text()
    for cell in cells:
        style = ""
        if cell.name == "outcome":
            style = STYLES.get(row.outcome, "")
        elif cell.name == "accuracy" and row.is_best:
            style = "bold"
        elif cell.name in ("trial", "epochs", "seconds"):
            style = "dim"
        shown = cell.text.translate(_ASCII) if options.ascii_only else cell.text
        text.append(shown, style)
    return _cropped(text, options.max_width)


_ASCII = str.maketrans("▁▂▃▄▅▆▇█–…", "_.-=+*%#-~")
"""For terminals that show no other signs."""


def _cropped(text: Text, width: int) -> Text:
    """Return a text that is never wrapped."""
    text.rstrip()
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text
