"""What all commands share: parser, signals, output, errors as one line, exit codes.

    0    done
    1    a transient failure (full disk, locked database, server away), a part of the work failed,
         or the output could not be written
    2    bad input
    3    done, except for some images (`tracking.predict`)
    130  stopped by a signal

`import tracking.cli` is quick: the commands import what is slow.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tracking.errors import is_transient, without_passwords
from tracking.store import DEFAULT_METRIC, default_store, environment
from tracking.text import printable

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals that stop a command: Ctrl-C, `kill`, a closed terminal, Ctrl-\\, a scheduler."""

# A shell lets what it starts in the background ignore these.
_BY_SHELLS = (signal.SIGINT, getattr(signal, "SIGQUIT", None))

INTERRUPTED = 130


class OutputError(Exception):
    """Standard output or error can't be written to: the disk is full, or the reader is gone.

    It is no OSError, so that no code takes it for an error of a server or a database.
    """


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are ValueErrors."""

    def __init__(self, *, allow_abbrev: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=allow_abbrev, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options; the error for an unknown flag names similar ones."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            similar = [flag for word in flags for flag in self._similar(word)]
            hint = f" (did you mean {' or '.join(dict.fromkeys(similar))}?)" if similar else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return options

    def _similar(self, word: str) -> list[str]:
        """Return the flags that a word may mean, by its letters or as an abbreviation."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if close := difflib.get_close_matches(word, known, n=2, cutoff=0.7):
            return close
        if not (letters := word.strip("-").lower()):
            return []
        initials = {flag: "".join(part[:1] for part in flag.split("-")) for flag in known}
        return [flag for flag in known if initials[flag].startswith(letters) or letters in flag][:3]


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
    *,
    resume: str = "",
    exits_at_once: bool = False,
) -> int:
    """Run a command, and return the exit code; an error is one line on standard error.

    Args:
        parser: of the command line.
        run: does the work, and returns an exit code, or None for 0.
        argv: the command line; None for that of this process.
        resume: how to resume stopped work, say "the same command continues".
        exits_at_once: a signal ends the process, until `run` handles signals itself. Before
            anything is recorded, this is quicker and safer than an exception during an import.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    interrupted = f"interrupted: {resume}" if resume else "interrupted"
    begun = ""  # after --help there is nothing to resume
    with environment(default_store()), _standard_streams():
        try:
            with _signals(interrupted, exits_at_once=exits_at_once):
                try:
                    options = parser.parse_args(argv)
                except SystemExit as done:  # --help
                    code = int(done.code or 0)
                else:
                    begun = resume
                    code = run(options) or 0
                _flush()
        except OutputError as error:
            _discard_output()
            # A reader like `head` may end early: that is no error, unless it stopped the work.
            if begun or not isinstance(error.__cause__, BrokenPipeError):
                _complain(_stopped(f"can't write the output: {error}", begun))
            return 1
        except ValueError as error:
            line = printable(without_passwords(" ".join(str(error).splitlines())))
            is_stopped = begun and is_transient(error)
            _complain(_stopped(line, begun) if is_stopped else f"{parser.prog}: error: {line}")
            return 1 if is_transient(error) else 2
        except MemoryError:
            _complain(_stopped("this machine has not enough memory for it", begun))
            return 1
        except KeyboardInterrupt:
            _complain(interrupted)
            return INTERRUPTED
        return code


def confirm(question: str, *, otherwise: str) -> bool:
    """Ask a yes-or-no question on the terminal; no answer means no.

    Raises:
        ValueError: there is no terminal to ask on. The message is `otherwise`.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(otherwise)
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _stopped(reason: str, resume: str) -> str:
    return f"stopped: {reason}; {resume}" if resume else f"stopped: {reason}"


# Signals


@contextmanager
def handling(handlers: dict[int, Any]) -> Iterator[None]:
    """Handle signals during the block; do nothing outside the main thread.

    An ignored signal stays ignored (`nohup` ignores SIGHUP), except SIGINT and SIGQUIT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if number in _BY_SHELLS or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signal(line: str) -> Any:
    """Let signals end the process with a line and exit code 130 during the block.

    An exception during an import could abort the process instead.
    """

    def leave(*_: object) -> None:
        with suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{line}\n".encode())
        os._exit(INTERRUPTED)

    return handling(dict.fromkeys(SIGNALS, leave))


def _signals(line: str, *, exits_at_once: bool) -> Any:
    def stop(*_: object) -> None:
        for number in SIGNALS:  # a second signal ends a block that does not stop
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    return exit_on_signal(line) if exits_at_once else handling(dict.fromkeys(SIGNALS, stop))


# Output


class _Stream:
    """A text stream that escapes what it can't encode, and turns OSError into OutputError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                shown = text.encode(encoding, "backslashreplace").decode(encoding)
                return self._stream.write(shown)
        except OSError as error:
            raise OutputError(error.strerror or str(error)) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error.strerror or str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Provide all three standard streams during the block.

    If one is closed (`>&-`), the next opened file gets its number: prints would go into a database.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    with Path(os.devnull).open("w") as nowhere:
        out, err = (_Stream(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield


def _flush() -> None:
    sys.stdout.flush()
    with suppress(OutputError):
        sys.stderr.flush()


def _discard_output() -> None:
    """Discard unwritten output: the interpreter would try to write it again at its end."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a file
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, sys.stdout.fileno())
        os.close(number)


def _complain(line: str) -> None:
    with suppress(OutputError):
        print(line, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process at once: a normal exit takes two seconds with MLflow and PyTorch."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if multiprocessing := sys.modules.get("multiprocessing.util"):
        # From Python 3.14 on, its tracker prints a warning of semaphores that are left, as tqdm's.
        multiprocessing._run_finalizers(0)
    os._exit(code)


FILTERS = ("dataset", "study", "loss", "where")


def add_choice_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags of the search for the best run: the experiment, `FILTERS` and the metric."""
    flags = {
        "--experiment": (
            "NAME",
            "use the best finished run of this MLflow experiment (default: that of `mlflow run` or "
            "MLFLOW_EXPERIMENT_NAME, else cnn-sweep)",
        ),
        "--dataset": (
            "NAME",
            "only runs on this data set: its name, its folder, or the first 8 digits or more of "
            "its digest (default: that of the run that was started last)",
        ),
        "--study": ("NAME", "only runs of this Optuna study"),
        "--loss": ("NAME", "only runs with this loss"),
        "--where": (
            "CONDITION",
            "only runs for which this holds, in MLflow's search syntax, say "
            "\"params.batch_size = '64' and metrics.`val/loss` < 0.5\"",
        ),
    }
    for flag, (metavar, text) in flags.items():
        parser.add_argument(flag, metavar=metavar, help=text)
    parser.add_argument(
        "--metric",
        default=DEFAULT_METRIC,
        metavar="NAME",
        help="the best run has the highest last value of this metric, the lowest if the name ends "
        "in loss (default: %(default)s)",
    )


def choice_filters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags `FILTERS`, as `choose` takes them."""
    return {name: getattr(options, name) for name in FILTERS}
