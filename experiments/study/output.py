"""How a command shows what happens: on a terminal, as plain lines, as JSON, or hardly at all.

It is quick to import, so that the first line is there before PyTorch and Optuna are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from datetime import UTC, datetime
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, Self

from tracking.progress import asking_the_terminal, can_change_lines

if TYPE_CHECKING:
    from experiments.study.events import SweepEvent
    from experiments.study.progress import Row, WholeWork
    from experiments.study.settings import Settings


class Mode(Enum):
    """The ways to show it."""

    LIVE = "live"
    PLAIN = "plain"
    QUIET = "quiet"
    JSON = "json"


class Display(Protocol):
    """Shows the events of a sweep, in a `with` block."""

    def show(self, event: SweepEvent) -> None:
        """Show an event."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Output(AbstractContextManager["Output"]):
    """What a command prints while it works, in a `with` block.

    As JSON, standard output has a JSON object a line, and all other prints go to standard error.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._out = sys.stdout
        self._stack = ExitStack()
        if as_json:
            self.mode = Mode.JSON
        elif quiet:
            self.mode = Mode.QUIET
        else:
            self.mode = Mode.LIVE if _is_live() else Mode.PLAIN

    def __enter__(self) -> Self:
        if self.mode == Mode.JSON:
            self._stack.enter_context(redirect_stdout(sys.stderr))
        elif sys.stdout.isatty():
            self._stack.enter_context(asking_the_terminal())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, text: str) -> None:
        """Say what is done before the first event."""
        if self.mode == Mode.JSON:
            self.record("starting", step=text)
        elif self.mode != Mode.QUIET:
            print(text, flush=True)

    def record(self, event: str, **fields: Any) -> None:
        """Print an event as a line of JSON: only if that is asked for."""
        if self.mode == Mode.JSON:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps(
                {"event": event, "time": now, **_plain(fields)}, ensure_ascii=False, allow_nan=False
            )
            print(line, file=self._out, flush=True)

    def result(self, text: str) -> None:
        """Print lines of the result: not as JSON, which has an event for it."""
        if self.mode != Mode.JSON:
            print(text, flush=True)

    def rows(self, settings: Settings, rows: Sequence[Row]) -> None:
        """Print rows of trials as a part of the result."""
        if self.mode == Mode.JSON:
            return
        if _is_live():
            from experiments.study.terminal import print_rows
        else:
            from experiments.study.lines import print_rows
        print_rows(settings, rows)

    @property
    def width(self) -> int | None:
        """The width of the terminal; None where lines can have any length."""
        if self.mode == Mode.JSON or not sys.stdout.isatty():
            return None
        from rich.console import Console

        return Console().width

    def display(self, settings: Settings, whole: WholeWork | None = None) -> Display:
        """Return what shows the events of a sweep, which may be a part of a whole."""
        if self.mode == Mode.LIVE:
            from experiments.study.terminal import Terminal

            return Terminal(settings, whole)
        from experiments.study.lines import JsonLines, PlainLines, ProblemLines

        if self.mode == Mode.JSON:
            return JsonLines(settings, whole, self.record)
        return (ProblemLines if self.mode == Mode.QUIET else PlainLines)(settings, whole)


def _is_live() -> bool:
    """Return whether lines can change: on a terminal, or in a notebook that has widgets."""
    if "ipykernel" in sys.modules:
        from importlib.util import find_spec

        return find_spec("ipywidgets") is not None  # without it, rich warns
    return can_change_lines(sys.stdout)


def _plain(value: Any) -> Any:
    """Return a value in JSON's types; NaN and infinity are null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, Real) or hasattr(value, "item"):
        number = value.item() if hasattr(value, "item") else float(value)
        return None if isinstance(number, float) and not math.isfinite(number) else number
    return str(value)
