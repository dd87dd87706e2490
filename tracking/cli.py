"""The one way into every command: its parser, its signals, its output, its errors, its exit code.

A module that is run by `python -m` has a parser, a function that does what was asked for, and
`run_command`, which turns what can happen into one line and an exit code:

    0    done
    1    something said no for now (a full disk, a locked database, a server that is away), a part
         of the work failed, or the output could not be written
    2    bad input
    3    done, but for some images (`tracking.predict`)
    130  stopped by a signal

`import tracking.cli` is quick: what is slow is imported by the command itself.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tracking.errors import is_transient, without_passwords
from tracking.store import default_store, environment
from tracking.text import printable

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""What asks a command to stop: Ctrl-C, `kill`, a terminal that is closed, Ctrl-\\, a scheduler."""

_BY_SHELLS = (signal.SIGINT, getattr(signal, "SIGQUIT", None))

INTERRUPTED = 130


class OutputError(Exception):
    """Standard output or error can't be written to: the disk is full, or its reader is gone.

    No OSError: what talks to a server or a database must not take it for an error of theirs.
    """


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, like all else that is wrong with what was typed."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return what was typed; a flag that is not known is told with those that are like it."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            similar = [flag for word in flags for flag in self._similar(word)]
            hint = f" (did you mean {' or '.join(dict.fromkeys(similar))}?)" if similar else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return options

    def _similar(self, word: str) -> list[str]:
        """Return the flags that a word may stand for: by its letters, or as an abbreviation."""
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
    """Do what a command line asks for, and return the exit code; an error is one line.

    Args:
        parser: of the command line.
        run: does what was asked for, and returns an exit code, or None for 0.
        argv: the command line; None for that of this process.
        resume: how the work goes on that something stopped, say "the same command continues".
        exits_at_once: a signal ends the process, until `run` takes the signals over: as long as
            nothing is recorded, that is quicker and safer than to raise amid imports.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with environment(default_store()), _standard_streams():
        return _run_command(parser, run, argv, resume=resume, exits_at_once=exits_at_once)


def _run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
    *,
    resume: str,
    exits_at_once: bool,
) -> int:
    begun = ""  # of --help, nothing goes on
    try:
        with _signals(_interrupted(resume), exits_at_once=exits_at_once):
            options = _parsed(parser, argv)
            if isinstance(options, int):
                code = options
            else:
                begun = resume
                code = run(options) or 0
            _flush()
    except OutputError as error:
        _discard_output()
        # `| head` has had enough: nobody is surprised, unless work was stopped by it.
        if begun or not isinstance(error.__cause__, BrokenPipeError):
            _complain(_stopped(f"can't write the output: {error}", begun))
        return 1
    except ValueError as error:
        if begun and is_transient(error):
            _complain(_stopped(_line(error), begun))
        else:
            _complain(f"{parser.prog}: error: {_line(error)}")
        return 1 if is_transient(error) else 2
    except MemoryError:
        _complain(_stopped("this machine has not enough memory for it", begun))
        return 1
    except KeyboardInterrupt:
        _complain(_interrupted(resume))
        return INTERRUPTED
    return code


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace | int:
    try:
        options: argparse.Namespace = parser.parse_args(argv)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    return options


def _stopped(reason: str, resume: str) -> str:
    return f"stopped: {reason}; {resume}" if resume else f"stopped: {reason}"


def _line(error: BaseException) -> str:
    """Return all that an error of ours says, in one line, as a terminal can be shown it."""
    return printable(without_passwords(" ".join(str(error).splitlines())))


def _interrupted(resume: str) -> str:
    return f"interrupted: {resume}" if resume else "interrupted"


# Signals


@contextmanager
def handling(handlers: dict[int, Any]) -> Iterator[None]:
    """Handle signals while the block lasts; elsewhere than in the main thread, leave them be.

    One that is ignored stays so (`nohup` has SIGHUP ignored), but for SIGINT and SIGQUIT, which a
    shell has ignored by whatever it starts in the background.
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
    """Have signals end the process with a line and exit code 130, while the block lasts.

    At any time at all: to raise something amid an import can end in an abort of what is imported.
    """

    def leave(*_: object) -> None:
        with suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{line}\n".encode())
        os._exit(INTERRUPTED)

    return handling(dict.fromkeys(SIGNALS, leave))


def _signals(line: str, *, exits_at_once: bool) -> Any:
    def stop(*_: object) -> None:
        # The next one is for a block that goes on nevertheless.
        for number in SIGNALS:
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    return exit_on_signal(line) if exits_at_once else handling(dict.fromkeys(SIGNALS, stop))


# Output


class _Stream:
    """A text stream that shows what it can't encode escaped, and raises OutputError alone."""

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

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error.strerror or str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Have all three standard streams, whatever was closed, while the block lasts.

    Where one is closed (`>&-`), the next file to be opened would take its number: what a library
    prints would go into a database.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    with Path(os.devnull).open("w") as nowhere:
        out, err = (_Stream(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield


def _flush() -> None:
    sys.stdout.flush()
    with suppress(OutputError):
        sys.stderr.flush()


def _discard_output() -> None:
    """Send what is still to be written nowhere: the interpreter would try again at its end."""
    with suppress(OSError, ValueError, AttributeError):  # of a stream without a file
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, sys.stdout.fileno())
        os.close(number)


def _complain(line: str) -> None:
    with suppress(OutputError):
        print(line, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process at once: taking MLflow and PyTorch apart would take two seconds more."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def add_choice_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags that say which runs to choose from: see `choice_filters`."""
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="choose among the runs on this data set only: its name, its folder, or the first 8 "
        "digits or more of its digest (default: that of the run that was started last)",
    )
    parser.add_argument(
        "--study", metavar="NAME", help="choose among the runs of this Optuna study only"
    )
    parser.add_argument("--loss", metavar="NAME", help="choose among the runs with this loss only")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="choose among the runs for which this holds, in MLflow's search syntax, say "
        "\"params.batch_size = '64' and metrics.`val/loss` < 0.5\"",
    )


def choice_filters(options: argparse.Namespace) -> dict[str, Any]:
    """Return what those flags say, as `choose` takes it."""
    return {
        "dataset": options.dataset,
        "study": options.study,
        "loss": options.loss,
        "where": options.where,
    }
