"""A real MLflow server with users: who may do what, what the others read, and no password anywhere.

Every password holds the word Secret, and every file that the server and the users leave is searched
for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_pool import FakePool, fails, trains, weights
from mlflow import MlflowClient
from mlflow.server import get_app_client

import experiments.engine.processes
import experiments.sweep
import tracking.best
import tracking.predict
import tracking.promote
from benchmarks import processes
from cnn.config import TrainConfig
from cnn.data import load
from experiments.engine.base import Event
from tracking.run_search import model_uri
from tracking.selection import best_run

REPOSITORY = Path(__file__).parents[1]
USERS = ("admin", "alice", "bob", "carol")
NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*starlette.middleware.wsgi is deprecated"),
]

Command = Callable[..., int]


def password(user: str) -> str:
    return f"{user}-Secret-0"


def wrong(user: str) -> str:
    return f"wrong-Secret-{user}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of this module works: the server in one folder of it, the users in another."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "server").mkdir()
    (folder / "work").mkdir()
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Run the server; yield its address without `http://`."""
    port = processes.free_port()
    settings = folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        "admin_username = admin\nauth_cache_ttl_seconds = 60\n"
    )
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password("admin"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the pages that make users",
    }
    server = processes.start_mlflow(
        folder / "server", port, "--app-name", "basic-auth", environment=environment
    )
    yield f"127.0.0.1:{port}"
    processes.stop_group(server)


@pytest.fixture(scope="module")
def users(address: str) -> None:
    """Make the users; what alice makes, bob may read, and carol not even that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NAME, "admin")
        patch.setenv(PASSWORD, password("admin"))
        admin = get_app_client("basic-auth", f"http://{address}")
        for user in USERS[1:]:
            admin.create_user(user, password(user))
        experiment = MlflowClient(f"http://{address}").create_experiment("not-for-carol")
        admin.grant_user_permission("alice", "experiment", experiment, "MANAGE")
        admin.grant_user_permission("carol", "experiment", experiment, "DENY")
        admin.grant_user_permission("carol", "registered_model", "cnn-digits", "DENY")


@pytest.fixture(scope="module")
def swept(folder: Path, address: str, users: None) -> subprocess.CompletedProcess[str]:
    """A sweep by alice, as she would type it."""
    load("digits", data_dir=folder / "work" / "data", seed=0)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    sweep = ["experiments.sweep", "--trials", "2", "--epochs", "1", "--workers", "1"]
    return subprocess.run(
        [sys.executable, "-m", *sweep, "--experiment", "not-for-carol", "--study", "real"],
        cwd=folder / "work",
        env={
            **clean,
            "PYTHONPATH": str(REPOSITORY),
            "MLFLOW_TRACKING_URI": f"http://{address}",
            NAME: "alice",
            PASSWORD: password("alice"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def world(
    folder: Path,
    address: str,
    swept: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[None]:
    """Let the test be alice, and look for passwords in what it printed and in all files there."""
    monkeypatch.chdir(folder / "work")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
    become(monkeypatch, "alice")
    yield
    assert "Secret" not in "".join(capfd.readouterr())
    assert leaks(folder) == []


def leaks(folder: Path) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    return [str(file) for file in files if b"Secret" in file.read_bytes()]


def become(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv(NAME, user)
    monkeypatch.setenv(PASSWORD, password(user))


def all_but_the_first(job: int, config: TrainConfig) -> Iterator[Event]:
    """Train; the first trial fails, and leaves a traceback."""
    *epochs, _ = trains(lambda job, _: 0.9 - job / 100)(job, config)
    yield from epochs if job else fails(job, config)
    if job:
        yield weights(job, num_classes=10)


def fake_sweep(*options: str) -> int:
    """Run the command line of a sweep, of two trials that nobody trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            experiments.engine.processes,
            "ProcessPool",
            lambda *_, **__: FakePool(all_but_the_first),
        )
        command = ["--trials", "2", "--epochs", "1", "--workers", "1", "--pruner", "none"]
        return experiments.sweep.main([*command, "--tracking-timeout", "0", *options])


def best(*options: str) -> int:
    return tracking.best.main(["--experiment", "not-for-carol", *options])


def predict(*options: str) -> int:
    return tracking.predict.main(["digits:test", "--model", "models:/cnn-digits@champion"])


def promote(*options: str) -> int:
    return tracking.promote.main(["cnn-digits", "--version", "1", *options])


def sweep(*options: str) -> int:
    return fake_sweep("--experiment", "not-for-carol", "--study", "refused", *options)


COMMANDS = (best, predict, promote, sweep)


def the_line(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert "error: " in line
    assert "Secret" not in out + err
    return line


def test_a_user_sweeps_predicts_and_promotes(
    world: None, swept: subprocess.CompletedProcess[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert (swept.returncode, swept.stderr) == (0, "")
    assert "registered:        version 1 of cnn-digits: the champion, as" in swept.stdout
    assert "View run" not in swept.stdout
    assert "Secret" not in swept.stdout
    assert best() == 0
    assert "best of 2 finished runs of experiment 'not-for-carol'" in capfd.readouterr().out
    assert predict() == 0
    assert "predicted 359 images" in capfd.readouterr().out
    assert Path("predictions.csv").stat().st_size > 10_000
    assert promote() == 0
    assert "version 1 of cnn-digits" in capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_password_is_one_line_that_says_where_to_look(
    world: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(PASSWORD, wrong("alice"))
    assert command() == 2
    line = the_line(capfd)
    assert "knows no user 'alice' with this password (401)" in line
    assert line.endswith(f": check {NAME} and {PASSWORD}")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_password_is_one_line_that_says_what_to_set(
    world: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(PASSWORD)
    assert command() == 2
    assert the_line(capfd).endswith(f" asks who you are (401): set {NAME} and {PASSWORD}")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_user_may_not_see_is_one_line(
    world: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    become(monkeypatch, "carol")
    assert command() == 2
    assert "does not permit user 'carol' to do this (403, mlflow" in the_line(capfd)


def promote_the_second(*options: str) -> int:
    second = tracking.selection.choose("not-for-carol", top=2).ranked[1]
    return tracking.promote.main(["cnn-digits", "--run-id", second.info.run_id, *options])


@pytest.mark.parametrize("command", [promote_the_second, sweep])
def test_what_a_user_may_only_read_is_not_changed_and_that_is_one_line(
    world: None,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    become(monkeypatch, "bob")
    assert command() == 2
    assert "does not permit user 'bob' to do this (403, mlflow" in the_line(capfd)


def test_who_may_not_register_loses_no_run(
    world: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    become(monkeypatch, "bob")
    assert fake_sweep("--experiment", "bobs", "--study", "bobs") == 0
    out, err = capfd.readouterr()
    assert "registered:        not as cnn-digits: the MLflow server " in out
    assert "does not permit user 'bob' to do this (403, mlflow/model-versions/create)" in out
    assert err == ""
    assert tracking.predict.main(["digits:test", "--experiment", "bobs"]) == 0
    client = MlflowClient()
    experiment = client.get_experiment_by_name("bobs")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    outcomes = sorted(run.data.tags["outcome"] for run in runs)
    assert outcomes == ["complete", "complete", "failed"]  # two trials and the sweep's own
    versions = client.search_model_versions("name = 'cnn-digits'")
    assert [int(version.version) for version in versions] == [1]


def test_a_user_in_the_address_is_not_repeated_anywhere(
    world: None,
    folder: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(NAME)
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:{password('alice')}@{address}")
    options = ["--experiment", "address", "--study", "address", "--register", "address"]
    assert fake_sweep(*options) == 0
    out = capfd.readouterr().out
    assert "registered:        version 1 of address: the champion" in out
    assert f"open http://{address}/#/experiments/" in out
    assert any((folder / "server").rglob("traceback.txt"))
    assert best("--experiment", "address") == 0
    assert predict() == 0
    # As an artifact of the server, which is an address as well.
    experiment = MlflowClient().get_experiment_by_name("not-for-carol")
    assert experiment is not None
    model_id = model_uri(best_run("not-for-carol")).removeprefix("models:/")
    path = f"{experiment.experiment_id}/models/{model_id}/artifacts"
    store = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow-artifacts/artifacts"
    assert tracking.predict.main(["digits:test", "--model", f"{store}/{path}"]) == 0
    assert f"model http://alice:***@{address}/api" in capfd.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://alice:{wrong('alice')}@{address}")
    for command in COMMANDS:
        capfd.readouterr()
        assert command() == 2
        assert the_line(capfd).endswith("(401): check the address")


def test_a_name_that_the_server_does_not_go_by_is_one_line(
    world: None, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # What such a server answers; `localhost` is always one of ours.
    import requests

    real = requests.Session.request

    def request(self: requests.Session, method: str, url: str, **options: object) -> object:
        options["headers"] = {**options["headers"], "Host": "elsewhere.example"}  # type: ignore[dict-item]
        return real(self, method, url, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(requests.Session, "request", request)
    assert best() == 2
    assert the_line(capfd).endswith(" takes no requests by this name: see its --allowed-hosts")
