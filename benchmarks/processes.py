"""Commands and servers that benchmarks and tests start, and end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.common import REPOSITORY

START_SECONDS = 600
"""After this time, a server is taken to hang."""


def start(
    command: Sequence[str],
    folder: Path,
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a folder and a session of its own, without the user's MLflow variables.

    Args:
        command: and its arguments.
        folder: its working folder.
        log: the file that its output is appended to (default: `log.txt` in the folder).
        environment: variables to add.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with (log or folder / "log.txt").open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=clean | {"PYTHONPATH": str(REPOSITORY)} | dict(environment or {}),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait up to some seconds for a process to end, and return whether it has."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def stop_group(leader: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal to a process and its children, and wait until it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
    if not ended(leader, 30):
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_server(
    command: Sequence[str],
    folder: Path,
    port: int,
    *,
    health: str = "/health",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a server on a port, and wait until it answers at the path `health`.

    Its output is in a file beside the folder, which may be full.
    """
    log = folder.with_suffix(".server.txt")
    server = start([*command, "--port", str(port)], folder, log=log, environment=environment)
    deadline = time.monotonic() + START_SECONDS
    while True:
        address = f"http://127.0.0.1:{port}{health}"
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return server
        assert time.monotonic() < deadline, "the server doesn't start"
        assert not ended(server, 0.1), log.read_text()


def start_mlflow(
    folder: Path, port: int, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start an MLflow server with its store in a folder, and wait until it answers."""
    command = [*mlflow_command(f"sqlite:///{folder}/mlflow.db"), *options]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    return start_server(command, folder, port, environment={**QUIET, **(environment or {})})


def mlflow_command(store: str) -> list[str]:
    """Return the command of an MLflow server with one worker."""
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    return [*server, "--backend-store-uri", store]


# Without MLflow's job runners, eight processes that no benchmark and no test needs.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def serving(
    command: Sequence[str], *, health: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server in the working folder, on a free port, and give its address."""
    port = free_port()
    server = start_server(command, Path.cwd(), port, health=health, environment=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_group(server)
