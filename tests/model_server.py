"""MLflow's real server for models, as docs/how-to/serve.md says to start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """Serve a model of the store in a folder; gives the address for images."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model]
    command += ["--env-manager", "local", "--port", str(port)]
    # MLflow starts `uvicorn` by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    address = f"http://127.0.0.1:{port}"
    with (
        (folder / "server.log").open("wb") as log,
        subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | environment,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            _wait_for(address, process, folder / "server.log")
            yield f"{address}/invocations"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{address}/ping", timeout=10).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()}")
