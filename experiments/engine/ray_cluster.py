"""A Ray cluster: the connection to it, and its resources."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import ray
from ray._private import worker as private
from ray.exceptions import RayError, RayTaskError

import cnn
import experiments
from cnn.devices import num_cores

CONNECT_SECONDS = 5.0

TOKENS = "RAY_AUTH_MODE, token or disabled, and the token must be those of its nodes"


@contextmanager
def connected(address: str | None, modules: Sequence[str] = ()) -> Iterator[Cluster]:
    """Connect to a cluster, or start our own on this machine, which ends with the block.

    Args:
        address: `auto`, `ray://HOST:PORT`, `HOST:PORT`, or None for our own.
        modules: files and folders of a user's own modules, which workers can import as well.

    Raises:
        ValueError: there is no such cluster, or it can't be used, in one line.
    """
    _check_reachable(address)
    own: dict[str, Any] = {"num_cpus": num_cores(), "include_dashboard": False}
    code = [str(Path(next(iter(package.__path__)))) for package in (cnn, experiments)]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with _log() as log:
        try:
            with _stderr_in(log):
                ray.init(
                    address or "local",
                    # Nodes use our code, not a version that they have installed.
                    runtime_env={"py_modules": [*code, *modules], "excludes": ["__pycache__"]},
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    **({} if address else own),
                )
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            where = _where(log)
            if address is None:
                raise ValueError(f"Ray can't be started: {one_line(error)}{where}") from error
            line = f"no Ray cluster can be used at --ray-address {address}: {one_line(error)}"
            # A ValueError is about the address itself.
            hint = "" if isinstance(error, ValueError) else f" ({TOKENS})"
            raise ValueError(f"{line}{hint}{where}") from error
        except SystemExit as error:  # from Ray's handler of SIGTERM
            raise KeyboardInterrupt from error
        finally:
            for number, handler in handlers.items():  # Ray's own would abort this process
                signal.signal(number, handler)
        try:
            with _messages_in(log):
                yield Cluster()
        finally:
            ray.shutdown()
            if where := _where(log):
                print(f"note: messages of Ray{where}", file=sys.stderr)


@contextmanager
def _log() -> Iterator[IO[bytes]]:
    """Open a temporary file for Ray's dozens of messages, and remove it if it is empty.

    A file with messages stays.
    """
    with NamedTemporaryFile(prefix="ray-", suffix=".log", delete=False, buffering=0) as log:
        try:
            yield log
        finally:
            if not _where(log):
                Path(log.name).unlink(missing_ok=True)


def _where(log: IO[bytes]) -> str:
    """Return a hint at Ray's own messages, if there are any, to end a message of ours."""
    return f": see {log.name}" if os.fstat(log.fileno()).st_size else ""


@contextmanager
def _stderr_in(log: IO[bytes]) -> Iterator[None]:
    """Redirect the standard error of this process, with Ray's C++, to a file."""
    if sys.__stderr__ is None:  # it was closed, and its number may be another file's now
        yield
        return
    kept = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _messages_in(log: IO[bytes]) -> Iterator[None]:
    """Redirect Ray's messages from its nodes, which a thread would print, to a file."""
    printed = private.print_to_stdstream

    def write(data: Mapping[str, Any], ignore_prefix: bool) -> None:  # noqa: ARG001
        log.write("".join(f"{line}\n" for line in data["lines"]).encode())

    private.print_to_stdstream = write
    try:
        yield
    finally:
        private.print_to_stdstream = printed


def _check_reachable(address: str | None) -> None:
    """Raise ValueError at once if nobody listens; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, or another form that Ray may know
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = one_line(error)
        raise ValueError(f"no Ray cluster answers at --ray-address {address}: {reason}") from error


class Cluster:
    """The current state of the cluster that this process is connected to."""

    @property
    def nodes(self) -> list[Mapping[str, float]]:
        """The resources of each node."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return [node["Resources"] for node in nodes if node["Alive"]]

    @property
    def gpus(self) -> float:
        """The number of GPUs of all nodes."""
        return sum(node.get("GPU", 0.0) for node in self.nodes)

    def __str__(self) -> str:
        kinds = Counter(
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in self.nodes
        )
        counted = [
            f"{number} node{'s' * (number > 1)} with {kind}" for kind, number in kinds.items()
        ]
        return ", ".join(counted) or "no nodes"


def one_line(error: BaseException) -> str:
    """Return the message of a Ray error, in one line."""
    if isinstance(error, RayTaskError):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
