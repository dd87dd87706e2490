"""Drafts that a killed process can resume: `.NAME.partial` beside the file NAME.

The sidecar `.NAME.partial.json` says what the draft is of, and how many of its bytes are valid.
Only the finished file gets the name NAME.
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

# Bytes of a sidecar: it has the names of all classes and three counts of each.
_LARGEST_SIDECAR = 2**26


class Draft:
    """An open draft: see `open_draft`."""

    def __init__(
        self, target: Path, stream: BinaryIO, identity: Mapping[str, Any], progress: dict[str, Any]
    ) -> None:
        self.target = target
        self.stream = stream
        self.identity = identity
        self.rows: int = progress["rows"]
        self.state: Mapping[str, Any] = progress["state"]
        """The argument of the last `append`."""

    def append(self, content: bytes, *, rows: int, state: Mapping[str, Any]) -> None:
        """Write rows and note them in the sidecar: a resumed draft has both or neither."""
        with writing():
            self.stream.write(content)
            self.stream.flush()
            progress = {"rows": self.rows + rows, "bytes": self.stream.tell(), "state": state}
            new = _beside(self.target, ".json.new")
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
    """Open the draft of a file; at the end of the `with` block it becomes the file.

    After a kill, Ctrl-C or a full disk, the draft stays and can be resumed. After any other failure
    it is removed.

    Args:
        target: the file.
        identity: everything that the bytes of the draft depend on, in JSON's types.
        resume: continue an existing draft; else it is dropped.
        begin: returns the first bytes.
        finish: returns the finished file of a draft.

    Raises:
        ValueError: the draft to resume is of something else, or another process writes it.
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
                line = f"note: {draft.rows} rows are kept: --resume continues the same command"
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
        os.fsync(content.fileno())  # else a power cut may leave the name with an empty file
    whole.replace(target)
    _remove(target)


def draft_file(target: Path) -> Path:
    """Return the path of the draft of a file."""
    return _beside(target)


def whole_file(draft: Path) -> Path:
    """Return the path at which a format that can't be appended to writes the finished file."""
    return draft.with_name(f"{draft.name}.whole")


def draft_files(target: Path) -> list[Path]:
    """Return all files that may be written and removed beside a file."""
    return [_sidecar(target), *(_beside(target, end) for end in (".json.new", ".whole", ""))]


def check_drafts(target: Path) -> None:
    """Raise unless the drafts of a file can be written beside it.

    Raises:
        ValueError: one of their names belongs to something else: see `tracking.files.check_own`.
        OSError: a name is too long, for example.
    """
    for file in draft_files(target):
        check_own(file)


def _sidecar(target: Path) -> Path:
    return _beside(target, ".json")


def _beside(target: Path, ending: str = "") -> Path:
    return target.with_name(f".{target.name}.partial{ending}")


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
            # Another process may have renamed the draft to the target since it was opened.
            mine = os.path.samestat(os.fstat(stream.fileno()), file.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ValueError(f"another process is writing {str(target)!r}")
        yield stream


def _found(target: Path, identity: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """Return the progress of an existing draft, if it is resumed and complete, else zero."""
    nothing = {"rows": 0, "bytes": 0, "state": {}}
    try:
        kept = json.loads(read_own(_sidecar(target), most=_LARGEST_SIDECAR))
        if not resume:
            print(f"note: dropped {kept['rows']} rows that --resume would keep", file=sys.stderr)
            return nothing
        differing = [key for key in identity if kept["identity"].get(key) != identity[key]]
        progress = {key: kept[key] for key in nothing}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return nothing  # there is no sidecar, or it is damaged
    if differing:
        raise ValueError(
            f"can't resume {str(target)!r}: its draft was made with another "
            f"{' and another '.join(differing)} (without --resume, it starts again)"
        )
    whole = draft_file(target).stat().st_size >= progress["bytes"]
    return progress if whole else nothing
