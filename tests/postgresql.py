"""A real PostgreSQL server for tests, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.servers import find_programs as find_programs


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that the user who runs the server can pass through.

    TMPDIR may be root's alone, as that of .ci/run is.
    """
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if subprocess.run(["test", "-x", place], check=False, user=_user()).returncode == 0:
            break
    else:
        raise FileNotFoundError("the user postgres can enter no folder for temporary files")
    folder = Path(tempfile.mkdtemp(prefix="postgresql", dir=place))
    try:
        folder.chmod(0o711)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _user() -> str | None:
    """Return who runs the server: it refuses to be run by root."""
    return "postgres" if os.getuid() == 0 else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server that is reached by a socket in a folder of its own; yield the URL of it."""
    programs = find_programs()
    assert programs is not None
    with temporary_folder() as folder:
        if user := _user():
            shutil.chown(folder, user)
        data = str(folder / "data")

        def run(*command: str) -> None:
            subprocess.run(
                [str(programs / command[0]), *command[1:]],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
                user=user,
            )

        run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync")
        start(folder)
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            stop(folder)


def start(folder: Path) -> None:
    """Start the server whose socket is in a folder."""
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    _control(folder, "-o", options, "-l", str(folder / "log"), "-w", "start")


def stop(folder: Path) -> None:
    """Stop that server, whoever is connected."""
    _control(folder, "-m", "immediate", "stop")


def _control(folder: Path, *command: str) -> None:
    programs = find_programs()
    assert programs is not None
    subprocess.run(
        [str(programs / "pg_ctl"), "-D", str(folder / "data"), *command],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        user=_user(),
    )
