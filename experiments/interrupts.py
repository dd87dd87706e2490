"""Signals as requests to stop, which a sweep polls."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tracking.cli import SIGNALS, handling

DUPLICATE_SIGNAL_SECONDS = 1.0
RERAISE_SECONDS = 0.5
"""A block that should end at once gets the exception again after this time."""


class InterruptionError(KeyboardInterrupt):
    """A signal ended a block that it may end at once.

    It is a KeyboardInterrupt, because libraries catch an Exception in optional steps.
    """


class Interrupts:
    """Notes the first of `SIGNALS` in a `with` block; the second raises KeyboardInterrupt.

    A second one within `DUPLICATE_SIGNAL_SECONDS` is ignored: after a Ctrl-C, which this process
    gets from the terminal, `mlflow run` sends it SIGTERM as well.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self._raises = False

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.first is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end this block, which takes long and records nothing.

        Raises:
            InterruptionError: a signal arrived, in the block or before it.
        """
        if self.first is not None:
            raise InterruptionError
        self._raises = True
        try:
            yield
        except Exception as error:
            if self.first is None:
                raise
            # The signal cut an import short, which then raised something else.
            raise InterruptionError from error
        finally:
            self._raises = False
            if self.first is not None:  # else there is no timer of ours
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
            # Some modules catch every exception while they are imported, so it is raised again.
            signal.setitimer(signal.ITIMER_REAL, RERAISE_SECONDS)
            raise InterruptionError
