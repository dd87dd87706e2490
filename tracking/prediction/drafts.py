"""A file that is written to the side, and can go on after a kill: `.NAME.partial` in its folder.

Beside it, `.NAME.partial.json` says what it is of, and up to which byte it is whole. Only a whole
file gets the name that was asked for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tracking.errors import is_transient
from tracking.files import check_own, create, open_own, read_own, writing

# Of a sidecar: the names of all classes and some counts of each.
_LARGEST_SIDECAR = 2**26


class Draft:
    """A draft that is being written. `open_draft` makes one."""

    def __init__(
        self, target: Path, stream: BinaryIO, identity: Mapping[str, Any], progress: dict[str, Any]
    ) -> None:
        self.target = target
        self.stream = stream
        self.identity = identity
        self.rows: int = progress["rows"]
        """How many are written."""
        self.state: Mapping[str, Any] = progress["state"]
        """What was handed to `append` with the last of them."""

    def append(self, content: bytes, *, rows: int, state: Mapping[str, Any]) -> None:
        """Write rows, and remember that they are written: both, or a resumed draft has neither."""
        with writing():
            self.stream.write(content)
            self.stream.flush()
            progress = {"rows": self.rows + rows, "bytes": self.stream.tell(), "state": state}
            new = _new_sidecar(self.target)
            new.unlink(missing_ok=True)
            with create(new) as stream:
                stream.write(json.dumps({"identity": self.identity, **progress}).encode())
            new.replace(_sidecar(self.target))
        self.rows, self.state = self.rows + rows, state


@contextmanager
def open_draft(
    target: Path,
    identity: Mapping[str, Any],
    *,
    resume: bool,
    begin: Callable[[], bytes],
    finish: Callable[[Path], Path],
) -> Iterator[Draft]:
    """Open the draft of a file, which gets its name when the `with` block is done.

    If that is cut off by a kill, by Ctrl-C or by a full disk, the draft stays, to be resumed; after
    any other failure it is removed.

    Args:
        target: the file.
        identity: what the draft is of, in JSON's types: all that its bytes depend on.
        resume: go on with a draft that is there; else it is dropped.
        begin: returns the first bytes.
        finish: returns a whole file, made of the draft that it is handed.

    Raises:
        ValueError: the draft to be resumed is of something else, or another process writes it.
    """
    with _locked(target) as stream:
        with writing():
            draft = _started(target, stream, identity, resume=resume, begin=begin)
        try:
            yield draft
            with writing():
                _published(finish(draft_file(target)), target)
        except BaseException as error:
            if draft.rows and (isinstance(error, KeyboardInterrupt) or is_transient(error)):
                line = f"note: {draft.rows} rows are kept: the same command goes on with --resume"
                print(line, file=sys.stderr)
            else:
                _remove(target)
            raise


def _started(
    target: Path,
    stream: BinaryIO,
    identity: Mapping[str, Any],
    *,
    resume: bool,
    begin: Callable[[], bytes],
) -> Draft:
    progress = _found(target, identity, resume=resume)
    stream.truncate(progress["bytes"])
    stream.seek(progress["bytes"])
    if not progress["bytes"]:
        _sidecar(target).unlink(missing_ok=True)
        stream.write(begin())
        stream.flush()
    return Draft(target, stream, identity, progress)


def _published(whole: Path, target: Path) -> None:
    with whole.open("rb") as content:
        os.fsync(content.fileno())  # before it gets its name: a power cut may come in between
    whole.replace(target)
    _remove(target)


def draft_file(target: Path) -> Path:
    """Return where the draft of a file is."""
    return target.with_name(f".{target.name}.partial")


def whole_file(draft: Path) -> Path:
    """Return where a format that can't be appended to makes the whole file of a draft."""
    return draft.with_name(f"{draft.name}.whole")


def draft_files(target: Path) -> list[Path]:
    """Return all files that may be written beside a file, and removed."""
    draft = draft_file(target)
    return [_sidecar(target), _new_sidecar(target), whole_file(draft), draft]


def check_drafts(target: Path) -> None:
    """Raise unless the drafts of a file can be written beside it.

    Raises:
        ValueError: one of their names is that of something else: see `tracking.files.check_own`.
        OSError: the file's name leaves no room for theirs, say.
    """
    for file in draft_files(target):
        check_own(file)


def _new_sidecar(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial.json.new")


def _sidecar(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial.json")


def _remove(target: Path) -> None:
    for file in draft_files(target):
        file.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[BinaryIO]:
    """Open the draft for this process alone."""
    import fcntl

    file = draft_file(target)
    with writing():
        stream = open_own(file)
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have given it the file's own name since it was opened.
            mine = os.path.samestat(os.fstat(stream.fileno()), file.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ValueError(f"another process is writing {str(target)!r}")
        yield stream


def _found(target: Path, identity: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """Return how far a draft is that is there, if it is to be resumed and holds as much."""
    nothing = {"rows": 0, "bytes": 0, "state": {}}
    try:
        kept = json.loads(read_own(_sidecar(target), most=_LARGEST_SIDECAR))
        if not resume:
            print(f"note: dropped {kept['rows']} rows that --resume would keep", file=sys.stderr)
            return nothing
        differing = [key for key in identity if kept["identity"].get(key) != identity[key]]
        progress = {key: kept[key] for key in nothing}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return nothing  # nothing was there, or it is damaged
    if differing:
        raise ValueError(
            f"can't resume {str(target)!r}: what is there was made with another "
            f"{' and another '.join(differing)} (without --resume, it starts again)"
        )
    whole = draft_file(target).stat().st_size >= progress["bytes"]
    return progress if whole else nothing
