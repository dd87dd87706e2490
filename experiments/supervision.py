"""Run a server: start, watch, restart and stop it.

If the process that started it is killed, Linux stops the server (`setpriv --pdeathsig`). The next
start finds what still runs by a file with the process's id.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tracking.cli import OutputError
from tracking.errors import TransientError

STOP_SECONDS = 60
LOOK_SECONDS = 0.2
RESTARTS, FIRST_PAUSE_SECONDS = 5, 1.0
"""How often a dead server is restarted; the pause doubles each time."""
STEADY_SECONDS = 600
"""After running this long, a server has all its restarts again."""


class Server:
    """A server that runs: see `running`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        stop_signal: signal.Signals,
        **popen: Any,
    ) -> None:
        self.name, self.log, self.stop_signal = name, log, stop_signal
        self.pid_file = pid_file(log)
        self.restarts = 0
        self._arguments, self._popen = _stopped_with_us(arguments, stop_signal), popen
        self._start_at: float | None = None
        """Set during the pause before a restart."""
        self._start()

    def check(self) -> None:
        """Raise TransientError if it has ended."""
        if self._has_ended():
            raise TransientError(f"{self._what_happened()}: see {self.log}")

    def keep_running(self) -> None:
        """Restart it if it has died; to be called several times a second.

        Raises:
            TransientError: no restarts are left.
        """
        if self._start_at is not None:
            if time.monotonic() >= self._start_at:
                self._start()
            return
        if not self._has_ended():
            return
        self._reap()
        if time.monotonic() > self._started + STEADY_SECONDS:
            self.restarts = 0
        if self.restarts == RESTARTS:
            happened = f"{self._what_happened()} again, after {RESTARTS} restarts"
            raise TransientError(f"{happened}: see {self.log}")
        pause = FIRST_PAUSE_SECONDS * 2**self.restarts
        self.restarts += 1
        self._start_at = time.monotonic() + pause
        say(f"{self._what_happened()}: it restarts in {pause:g} s, see {self.log}")

    def stop(self) -> None:
        """Shut it down; kill it if that takes too long."""
        if self.process.returncode is None:
            self.process.send_signal(self.stop_signal)
            deadline = time.monotonic() + STOP_SECONDS
            while not self._has_ended() and time.monotonic() < deadline:
                time.sleep(0.02)
            self._reap()
        self.pid_file.unlink(missing_ok=True)

    def _start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._arguments,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                umask=0o077,
                start_new_session=True,  # Ctrl-C reaches us only, and we stop them in order
                **self._popen,
            )
        self._started, self._start_at = time.monotonic(), None
        self._handle = psutil.Process(self.process.pid)
        self.pid_file.write_text(json.dumps([self.process.pid, self._handle.create_time()]))

    def _has_ended(self) -> bool:
        """Return whether it has ended, without reaping it: its process id stays taken."""
        if self.process.returncode is not None:
            return True
        return bool(self._handle.status() == psutil.STATUS_ZOMBIE)

    def _reap(self) -> None:
        """Kill the rest of its process group, and reap it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _what_happened(self) -> str:
        return f"{self.name} has ended (exit code {self.process.wait()})"


@contextmanager
def running(
    name: str, arguments: Sequence[str], log: Path, stop_signal: signal.Signals, **popen: Any
) -> Iterator[Server]:
    """Run a server while the block lasts; `stop_signal` shuts it down."""
    log.touch(mode=0o600)
    server = Server(name, arguments, log, stop_signal, **popen)
    try:
        yield server
    finally:
        server.stop()


def pid_file(log: Path) -> Path:
    """Return the file with the id of a server's process, beside its log."""
    return log.with_suffix(".pid")


def stop_orphaned(name: str, log: Path, stop_signal: signal.Signals) -> None:
    """Stop the processes of a server that an earlier start left, and say so."""
    file = pid_file(log)
    orphaned = _orphaned(file)
    if orphaned:
        numbers = ", ".join(str(process.pid) for process in orphaned)
        say(f"{name} still runs from an earlier start (process {numbers}): stopping it first")
        for process in orphaned:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(stop_signal)
        _, left = psutil.wait_procs(orphaned, timeout=STOP_SECONDS)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)
    file.unlink(missing_ok=True)


def _orphaned(file: Path) -> list[psutil.Process]:
    """Return the processes of a server: those of its group in its folder."""
    try:
        number, created = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) != number:
                continue
            if process.pid == number and abs(process.create_time() - created) > 1:
                return []  # another process has the id now
            if Path(process.cwd()).is_relative_to(file.parent):
                found.append(process)
    return found


def check_port(option: str, host: str, port: int) -> None:
    """Raise ValueError if a server can't listen there."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        who = _listener(port) if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"--host {host}, {option} {port}: {error.strerror}{who}") from error


def _listener(port: int) -> str:
    """Return which process listens at a port, if this user may see it."""
    with suppress(psutil.Error):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f" by process {each.pid} ({psutil.Process(each.pid).name()})"
    return ""


def say(line: str) -> None:
    """Print a line, if it can be printed: the servers run on without a terminal."""
    with suppress(OSError, OutputError):
        print(line, file=sys.stderr, flush=True)


def _stopped_with_us(arguments: Sequence[str], number: signal.Signals) -> list[str]:
    """Return a command that gets a signal when this process is killed, if the system can do it."""
    if (setpriv := shutil.which("setpriv")) is None:
        return list(arguments)
    return [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), *arguments]
