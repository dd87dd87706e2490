"""Files made and opened without harm to others: no link is followed, nobody else's is written to.

Names of drafts and locks can be foreseen, and a folder may be one that others write to: under such
a name there may be a link to another file, a second name of one, or a named pipe.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from tracking.errors import TransientError, one_line

_CREATE = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
# Opening a named pipe would wait for somebody at its other end.
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def create(file: Path, *, mode: int = 0o666) -> BinaryIO:
    """Make a new regular file, and open it for writing.

    Args:
        file: raises FileExistsError if anything has that name already, a link to nowhere included.
        mode: what `umask` leaves of it are the file's permissions.
    """
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_EXCL | _CREATE, mode), "wb")


@contextmanager
def replacing(file: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a file that takes its place as a whole when the `with` block is done, or not at all.

    It is drafted beside it, under a name that can't be foreseen. What had the file's name is
    replaced; if that was a link, what it led to stays as it was.
    """
    draft = file.with_name(f".draft-{secrets.token_hex(8)}")
    with create(draft, mode=mode) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # before it gets its name: a power cut may come in between
            draft.replace(file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def open_own(file: Path, *, is_shared: bool = False, buffering: int = -1) -> BinaryIO:
    """Open a draft or a lock to read it and append to it; one that isn't there is made.

    What is there stays as it is: an earlier process may have left it, or another be at work on it.

    Args:
        file: see `check_own`.
        is_shared: whether it may be another user's.
        buffering: as `open` takes it.

    Raises:
        ValueError: what has that name is no such file.
        OSError: it can't be opened.
    """
    check_own(file, is_shared=is_shared)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | _CREATE | _OPEN, 0o666)
    stream = os.fdopen(descriptor, "a+b", buffering)
    try:  # again: what was looked at may have been exchanged
        _check(file, os.fstat(descriptor), is_shared=is_shared)
    except BaseException:
        stream.close()
        raise
    return stream


def read_own(file: Path, *, most: int) -> bytes:
    """Return what is in a file of that kind, or raise: see `open_own`. ValueError if it's more."""
    check_own(file)
    with os.fdopen(os.open(file, os.O_RDONLY | _OPEN), "rb") as stream:
        _check(file, os.fstat(stream.fileno()), is_shared=False)
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{str(file)!r} has more than {most:,} bytes")
    return content


def check_own(file: Path, *, is_shared: bool = False) -> None:
    """Raise ValueError if a name that we give to drafts or locks is that of something else.

    Ours is a regular file that is no link, has no other name, and belongs to this user.
    """
    with suppress(FileNotFoundError):
        _check(file, file.lstat(), is_shared=is_shared)


def _check(file: Path, status: os.stat_result, *, is_shared: bool) -> None:
    what = None
    if stat.S_ISLNK(status.st_mode):
        what = "a link"
    elif stat.S_ISDIR(status.st_mode):
        what = "a folder"
    elif not stat.S_ISREG(status.st_mode):
        what = "a named pipe or a device"
    elif status.st_nlink > 1:
        what = "a second name of another file (a hard link)"
    elif not is_shared and status.st_uid != os.geteuid():
        what = "another user's"
    if what:
        raise ValueError(
            f"{str(file)!r} would be written to, and is {what}: remove it, or write elsewhere"
        )


@contextmanager
def writing(what: str = "the predictions") -> Iterator[None]:
    """Have an error of the disk be one line, of a kind that passes."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise TransientError(f"can't write {what}: {reason}") from error


@contextmanager
def open_folder(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """Hand out a folder to write files to; when the `with` block is done, they are in `folder`.

    If that wasn't there, it is made with all of them at once. Else each of them takes its place as
    a whole, in the order of `files`, and what else is there stays.

    Args:
        folder: in one that exists.
        files: all that may be written; those that were not, but are there from before, are removed.

    Raises:
        ValueError: a folder in it is a link, so that other files would be replaced than it seems.
    """
    folder = folder.resolve()
    for inner in {(folder / name).parent for name in files} - {folder}:
        if inner.is_symlink():
            raise ValueError(f"{str(inner)!r} would be written to, and is a link: remove it")
    # On the same disk: in the folder itself, if it is there, as another may be mounted there.
    place = folder if folder.exists() else folder.parent
    with TemporaryDirectory(prefix=".draft-", dir=place) as scratch:
        draft = Path(scratch, "folder")
        draft.mkdir()
        yield draft
        if not folder.exists():
            draft.rename(folder)
            return
        for name in files:
            if (draft / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (draft / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def check_folder(folder: Path, *, option: str, source: str = "") -> None:
    """Raise ValueError if a report can't be written to a folder.

    Args:
        folder: which need not exist, but the one that it is in.
        option: what names it, for the message.
        source: what is labelled: no figure may get among its images.
    """
    try:
        target = folder.resolve()
        place = target if target.exists() else target.parent
        if not place.is_dir():
            raise ValueError(f"can't write {option}: there is no folder {str(place)!r}")
        # The mode too: for root everything is writable, also what was made read-only on purpose.
        if not (os.access(place, os.W_OK) and place.stat().st_mode & 0o222):
            raise ValueError(f"can't write {option}: {str(place)!r} is read-only")
        for images in filter(None, (source, source.rpartition(":")[0])):
            if Path(images).is_dir() and target.is_relative_to(Path(images).resolve()):
                raise ValueError(
                    f"can't write {option}: {str(folder)!r} is in {images!r}, and the figures "
                    "would be among its images"
                )
    except (OSError, RuntimeError) as error:  # the latter for links that lead in a circle
        raise ValueError(f"can't write {option} {str(folder)!r}: {one_line(error)}") from error
