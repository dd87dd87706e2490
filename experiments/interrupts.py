"""Signals as a request to stop, which a sweep asks for and ends in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tracking.cli import SIGNALS, handling

DUPLICATE_SIGNAL_SECONDS = 1.0
RERAISE_SECONDS = 0.5
"""A block that should end at once, and has not after so long, is told again."""


class InterruptionError(KeyboardInterrupt):
    """There was a signal within a block that it may end at once.

    A KeyboardInterrupt, for libraries go on after an Exception in what they can do without.
    """


class Interrupts:
    """Notes the first of `SIGNALS` in a `with` block; the second raises KeyboardInterrupt.

    Unless it comes with the first: `mlflow run` hands on a Ctrl-C as SIGTERM to a process that has
    had it from the terminal already.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self._raises = False

    def __call__(self) -> bool:
        """Return whether there was one."""
        return self.first is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have a signal end this block: one in which nothing is recorded, and which takes long.

        Raises:
            InterruptionError: there was a signal, in the block or before it.
        """
        if self.first is not None:
            raise InterruptionError
        self._raises = True
        try:
            yield
        except Exception as error:
            if self.first is None:
                raise
            # What is left of an import that was cut short by it is no error of its own.
            raise InterruptionError from error
        finally:
            self._raises = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> Interrupts:
        handlers = dict.fromkeys(SIGNALS, self._receive) | {signal.SIGALRM: self._raise_again}
        self._handling = handling(handlers)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _receive(self, *_: object) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self._raise_again()
        elif now > self.first + DUPLICATE_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def _raise_again(self, *_: object) -> None:
        if self._raises:
            # Some code that is being imported goes on after whatever was raised in it.
            signal.setitimer(signal.ITIMER_REAL, RERAISE_SECONDS)
            raise InterruptionError
