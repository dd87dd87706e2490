from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from fake_pool import FakePool, trains
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from optuna.trial import TrialState
from small_sweep import small_settings

from cnn.data import Dataset
from experiments.study.controller import sweep
from experiments.study.opening import open_study
from tracking.retries import (
    ArtifactStoreError,
    RetryingClient,
    RetryPolicy,
    TrackingAwayError,
    is_away,
)
from tracking.tracker import Tracker


def away() -> MlflowException:
    """Return what MLflow raises where nobody answers."""
    error = MlflowException("API request failed")
    error.__cause__ = requests.ConnectionError("refused")
    return error


class Server:
    """Fails so often, and then answers."""

    def __init__(self, failures: list[BaseException]) -> None:
        self.failures = failures
        self.calls = 0

    def call(self, *_: Any) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"

    log_batch = call
    create_run = call


def test_a_call_is_repeated_until_there_is_an_answer() -> None:
    server = Server([away(), requests.Timeout("slow")])
    assert RetryPolicy(seconds=5).call(server.call) == "answer"
    assert server.calls == 3


def test_patience_has_an_end() -> None:
    start = time.monotonic()
    with pytest.raises(TrackingAwayError, match="doesn't answer"):
        RetryPolicy(seconds=0.5).call(Server([away() for _ in range(99)]).call)
    assert time.monotonic() - start < 5


def test_without_patience_there_is_one_call() -> None:
    server = Server([away()])
    with pytest.raises(TrackingAwayError):
        RetryPolicy().call(server.call)
    assert server.calls == 1


def test_another_error_is_not_waited_out() -> None:
    server = Server([MlflowException("no such run")])
    with pytest.raises(MlflowException, match="no such run"):
        RetryPolicy(seconds=60).call(server.call)
    assert server.calls == 1


def test_who_wants_to_stop_has_no_patience() -> None:
    with pytest.raises(TrackingAwayError):
        RetryPolicy(seconds=60, should_stop=lambda: True).call(Server([away()]).call)


def test_a_locked_database_and_a_gateway_without_a_server_are_away() -> None:
    assert is_away(MlflowException("(sqlite3.OperationalError) database is locked"))
    assert is_away(MlflowException("API request to x failed with error code 503 != 200."))
    assert not is_away(MlflowException("API request to x failed with error code 404 != 200."))


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_is_away_is_known_after_the_clients_own_retries(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")

    class Unavailable(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = MlflowClient(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(MlflowException, match=f"too many {status} error") as raised:
            client.create_run("1")
        server.shutdown()
    assert is_away(raised.value)


def test_a_client_repeats_what_can_be_repeated_only() -> None:
    server = Server([away()])
    client = RetryingClient(server, RetryPolicy(seconds=5))  # type: ignore[arg-type]
    assert client.log_batch("id") == "answer"
    server.failures = [away()]
    with pytest.raises(MlflowException):
        client.create_run("id")


def test_a_run_that_was_made_though_the_answer_was_lost_is_not_made_twice(
    mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open("tests", retries=RetryPolicy(seconds=5))
    create_run, lost = MlflowClient.create_run, [away()]

    def losing(*args: Any, **kwargs: Any) -> Any:
        run = create_run(*args, **kwargs)
        if lost:
            raise lost.pop()
        return run

    monkeypatch.setattr(MlflowClient, "create_run", losing)
    run = tracker.start_run("once")
    (only,) = MlflowClient().search_runs([tracker.experiment_id])
    assert only.info.run_id == run.run_id


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def real_server(folder: Path, port: int, *flags: str) -> Iterator[None]:
    environment = os.environ | {"MLFLOW_TRACKING_URI": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", *flags]
    with (
        (folder / "server.log").open("ab") as log,
        subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            yield
        finally:
            os.killpg(process.pid, 9)


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_again_loses_no_metric(
    mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    retries = RetryPolicy(seconds=120)
    with real_server(tmp_path, port):
        retries.call(lambda: MlflowClient().search_experiments())
        run = Tracker.open("tests", retries=retries).start_run("run")
        run.log_metrics({"val/accuracy": 0.1}, step=1)
    with pytest.raises(TrackingAwayError):
        RetryPolicy().call(lambda: MlflowClient().get_run(run.run_id))
    with real_server(tmp_path, port):
        run.log_metrics({"val/accuracy": 0.2}, step=2)  # while it starts
        run.end("complete")
        history = run.client.get_metric_history(run.run_id, "val/accuracy")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.1), (2, 0.2)]


def of_artifacts(text: str = "too many 500 error responses") -> MlflowException:
    return MlflowException(f"API request to /api/2.0/mlflow-artifacts/artifacts/1/a failed: {text}")


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_server_that_can_store_nothing_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, is_reset: bool
) -> None:
    def error() -> MlflowException:
        refused = of_artifacts()
        if is_reset:
            refused.__cause__ = requests.ConnectionError("Connection reset by peer")
        return refused

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:5000")
    monkeypatch.setattr("tracking.retries._is_well", lambda _: True)
    with pytest.raises(ArtifactStoreError, match="^the MLflow server http://h:5000 answers, but"):
        RetryPolicy(seconds=60).call(Server([error() for _ in range(99)]).call)
    # One that has just been started again is not.
    if is_reset:
        assert RetryPolicy(seconds=60).call(Server([error(), error()]).call) == "answer"
    # Nor is one that is away, or another error.
    monkeypatch.setattr("tracking.retries._is_well", lambda _: False)
    with pytest.raises((MlflowException, TrackingAwayError)):
        RetryPolicy(seconds=0.2).call(Server([error() for _ in range(99)]).call)


@pytest.mark.slow
def test_a_sweep_on_a_server_that_can_store_nothing_is_refused_at_its_start(
    mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coloured_noise: Dataset
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    (tmp_path / "a_file").touch()
    with real_server(tmp_path, port, "--artifacts-destination", str(tmp_path / "a_file" / "x")):
        RetryPolicy(seconds=120).call(lambda: MlflowClient().search_experiments())
        settings = small_settings(f"sqlite:///{tmp_path / 'optuna.db'}", tracking_timeout=60)
        with pytest.raises(ValueError, match="answers, but can't store artifacts: its log says"):
            list(sweep(settings, coloured_noise, FakePool(trains(lambda job, _: 0.9))))
    trials = open_study(settings, coloured_noise).get_trials()
    assert TrialState.RUNNING not in {trial.state for trial in trials}
