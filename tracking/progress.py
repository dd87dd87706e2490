"""The progress of long work: a bar with what is done, the rate and the time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from tracking.wording import clock

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

QUICK_SECONDS = 1.0
"""Work that takes no longer shows no bar."""
REFRESHES = 4
"""How often a second lines are drawn again."""
COLOUR = "#009E73"
_BAR = (8, 40)
"""The shortest and the longest bar."""


def can_change_lines(stream: object) -> bool:
    """Return whether a stream is a terminal on which lines can change."""
    is_terminal: bool = getattr(stream, "isatty", lambda: False)()
    return is_terminal and os.environ.get("TERM", "") not in ("dumb", "unknown")


@contextmanager
def asking_the_terminal() -> Iterator[None]:
    """Let rich ask the terminal for its size: the environment may have that of an earlier one."""
    names = ("COLUMNS", "LINES")  # readline exports them
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def say_start(text: str) -> None:
    """Say on a terminal what is done first: imports take seconds."""
    if can_change_lines(sys.stderr):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(
    noun: str, total: int | None = None, *, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show on standard error how much is done; yield what to call with the size of each step.

    Only on a terminal, and only of work that takes longer than `QUICK_SECONDS`.

    Args:
        noun: what is counted, in the plural.
        total: how many there are, if that is known.
        done: how many were done before.
    """
    if not can_change_lines(sys.stderr):
        yield lambda _: None
        return
    bar = _Bar(noun, total, done)
    with ExitStack() as stack:

        def advance(count: int) -> None:
            bar.done += count
            if not bar.is_shown and bar.seconds > QUICK_SECONDS:
                bar.is_shown = True
                stack.enter_context(asking_the_terminal())
                stack.enter_context(bar.live())

        yield advance


class _Bar:
    """One line, drawn again several times a second."""

    def __init__(self, noun: str, total: int | None, done: int) -> None:
        self.noun, self.total, self.done, self.done_before = noun, total, done, done
        self.start = time.monotonic()
        self.is_shown = False

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.start

    def live(self) -> AbstractContextManager[object]:
        """Return the block in which it is drawn."""
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        return Live(self, console=console, transient=True, refresh_per_second=REFRESHES)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the line."""
        rate = (self.done - self.done_before) / self.seconds
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        if self.total is None:
            yield f"{self.done:,} {self.noun}  {speed}"
            return
        count = f"{self.done:,}/{self.total:,} {self.noun}"
        left = f"{clock((self.total - self.done) / rate)} left" if rate else ""
        choices = [(count, speed, left), (count, left), (count,)]
        yield bar_line(self.done, self.total, choices, options.max_width)


def bar_line(done: int, total: int, choices: Sequence[Sequence[str]], width: int) -> Table:
    """Return a bar and the first of several texts that leaves room for it, in one line.

    Each text is in parts, of which some may be empty.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    for parts in choices:
        text = "  ".join(filter(None, parts))
        if len(text) + 2 + _BAR[0] <= width:
            break
    bar = max(1, min(_BAR[1], width - len(text) - 2))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    shown = ProgressBar(
        total=total, completed=done, width=bar, complete_style=COLOUR, finished_style=COLOUR
    )
    table.add_row(shown, Text(text, no_wrap=True, overflow="ellipsis"))
    return table
