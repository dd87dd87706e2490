"""The servers of a team: real ones, as the command line starts them."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import optuna
import psutil
import pytest
from fake_pool import FakePool, script_of_ten
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from postgresql import find_programs, temporary_folder

import experiments.engine.processes
import experiments.servers
import experiments.supervision
import experiments.sweep
from benchmarks.processes import free_port
from experiments.accounts import OWNER, USER_CONNECTIONS, Passwords
from experiments.servers import build_parser, main
from experiments.supervision import Server, running, stop_orphaned
from tracking.errors import TransientError

REPOSITORY = Path(__file__).parents[1]
Test = TypeVar("Test", bound=Callable[..., object])
NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def with_real_servers(test: Test) -> Test:
    """Mark a test as one that needs them."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(find_programs() is None, reason="PostgreSQL is not installed"),
        # Of a study's connections, which are let go with it.
        pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        pytest.mark.filterwarnings("ignore:.*starlette.middleware.wsgi is deprecated"),
    ):
        test = mark(test)
    return test


@dataclass
class Started:
    """The command, once it has said what to type."""

    process: subprocess.Popen[str]
    said: str

    def __post_init__(self) -> None:
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        """All processes that it has started by then."""

    def server(self, word: str) -> psutil.Process:
        """Return one of both, by a word of its command line."""
        servers = psutil.Process(self.process.pid).children()
        (found,) = (each for each in servers if word in each.cmdline())
        return found

    def told(self) -> str:
        """Return the next line that it prints on standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def ended(self) -> Ending:
        """Wait for its end; nothing is left of it after that, whatever comes of it."""
        try:
            _, errors = self.process.communicate(timeout=120)
            _, left = psutil.wait_procs(self.family, timeout=10)
            return Ending(code=self.process.returncode, errors=errors, left=left)
        finally:
            self.process.kill()
            for each in self.family:
                with suppress(psutil.NoSuchProcess):
                    each.kill()


@dataclass
class Ending:
    code: int
    errors: str
    left: list[psutil.Process]


@dataclass
class Team:
    """Servers that run, for the third time on the same data."""

    folder: Path
    ports: tuple[int, int]
    said: str
    died: list[str]
    """What the command said of servers that were killed."""
    orphans: list[psutil.Process]
    """What was left of servers whose command was killed, once they are started again."""
    interrupted: Ending
    first_passwords: dict[str, str]

    def password(self, file: str) -> str:
        return (self.folder / file).read_text().strip()

    def passwords(self) -> dict[str, str]:
        return read_passwords(self.folder)

    def storage(self, user: str, database: str = "optuna") -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.ports[0]}/{database}"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"


def read_passwords(folder: Path) -> dict[str, str]:
    files = [*folder.glob("passwords/*"), *folder.glob("users/*")]
    return {str(file.relative_to(folder)): file.read_text().strip() for file in files}


def start(folder: Path, ports: tuple[int, int], *options: str) -> Started:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PG"))}
    where = ["--postgresql-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.servers", "--dir", str(folder), *where, *options],
        cwd=folder.parent,
        env={**clean, "PYTHONPATH": str(REPOSITORY), "MLFLOW_WORKERS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    while "Ctrl-C stops both" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        said += line
    return Started(process, said)


def as_earlier_versions_left_it(folder: Path, port: int) -> None:
    """Have the users' common role own their database and tables."""
    import psycopg

    for database, statements in {
        "postgres": [
            "ALTER DATABASE optuna OWNER TO optuna",
            "ALTER DATABASE optuna CONNECTION LIMIT -1",
            "ALTER ROLE alice CONNECTION LIMIT -1",
            "ALTER ROLE alice SET role TO optuna",
        ],
        "optuna": [f'REASSIGN OWNED BY "{OWNER}" TO optuna'],
    }.items():
        url = f"postgresql://postgres@127.0.0.1:{port}/{database}"
        password = read_passwords(folder)["passwords/postgres"]
        with psycopg.connect(url, password=password, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)


def wait_until_both_run(started: Started, look: list[str]) -> None:
    deadline = time.monotonic() + 180
    while (
        subprocess.run([*look, "-q", "-h", "127.0.0.1"], check=False).returncode
        or len(psutil.Process(started.process.pid).children()) < 2
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Start it, kill both servers, kill it; start it, interrupt it; start it with more users."""
    pytest.importorskip("psycopg")
    pytest.importorskip("uvloop")
    programs = find_programs()
    assert programs is not None
    with temporary_folder() as parent:
        folder, ports = parent / "servers", (free_port(), free_port())
        started = start(folder, ports, "--user", "alice", "carol")
        first_passwords = read_passwords(folder)
        as_earlier_versions_left_it(folder, ports[0])
        died = []
        for word in ("postgresql", "mlflow"):
            started.server(word).kill()
            died.append(started.told())
        wait_until_both_run(started, [str(programs / "pg_isready"), "-p", str(ports[0])])
        orphans = psutil.Process(started.process.pid).children(recursive=True)
        started.process.kill()
        started.process.communicate()
        started = start(folder, ports)
        _, orphans = psutil.wait_procs(orphans, timeout=0)
        # As a terminal does: to all of the group in front.
        os.killpg(started.process.pid, signal.SIGINT)
        interrupted = started.ended()
        (folder / "users" / "carol").unlink()
        started = start(folder, ports, "--user", "bob", "--user", "carol")
        try:
            yield Team(folder, ports, started.said, died, orphans, interrupted, first_passwords)
        finally:
            started.process.terminate()
            started.ended()


@pytest.fixture
def work(
    team: Team, tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A folder of a user's, who has nothing but the addresses."""
    (tmp_path / "data").symlink_to(digits_cache)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.address)
    monkeypatch.setattr(
        experiments.engine.processes, "ProcessPool", lambda *_, **__: FakePool(script_of_ten)
    )
    yield
    gc.collect()  # connections that were let go, within this test and not in another


def become(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv(NAME, user)
    monkeypatch.setenv(PASSWORD, password)
    monkeypatch.setenv("PGPASSWORD", password)


def sweep(team: Team, user: str, trials: int) -> int:
    command = ["--trials", str(trials), "--epochs", "1", "--workers", "1", "--study", "shared"]
    return experiments.sweep.main([*command, "--storage", team.storage(user)])


def connect(team: Team, user: str, password: str, database: str = "optuna") -> str:
    """Return as whom one works in a database, or why one may not."""
    import psycopg

    url = team.storage(user, database).replace("+psycopg", "")
    try:
        with psycopg.connect(url, password=password) as connection:
            (row,) = connection.execute("SELECT current_user").fetchall()
            return str(row[0])
    except psycopg.OperationalError as error:
        return str(error)


def asks_who_it_is(team: Team, user: str, password: str) -> bool:
    """Return whether MLflow refuses to list experiments."""
    import requests

    answer = requests.get(
        f"{team.address}/api/2.0/mlflow/experiments/search?max_results=1",
        auth=(user, password),
        timeout=60,
    )
    return answer.status_code == 401


@with_real_servers
def test_users_of_a_team_work_on_one_study(
    team: Team, work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trials, user in enumerate(("alice", "bob"), 1):
        become(monkeypatch, user, team.password(f"users/{user}"))
        assert sweep(team, user, trials) == 0
    (study,) = optuna.get_all_study_summaries(team.storage("bob"))
    assert (study.study_name, study.n_trials) == ("shared", 2)
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("cnn-sweep").experiment_id])  # type: ignore[union-attr]
    by_user = sorted((run.data.tags["role"], run.info.status) for run in runs)
    assert by_user == [("sweep", "FINISHED"), ("trial", "FINISHED"), ("trial", "FINISHED")]
    # Models went through the server, for the store is not theirs.
    assert any(team.folder.joinpath("artifacts").rglob("model.pt2"))
    assert not Path("mlruns").exists()
    assert not Path("mlartifacts").exists()
    assert_no_password_is_seen(team)


def assert_no_password_is_seen(team: Team) -> None:
    """Look for them where others can: in what is printed and logged, and in `ps`."""
    known = {*team.first_passwords.values(), *team.passwords().values()}
    assert len(known) == 8  # carol has had two
    logs = [file.read_text() for file in team.folder.glob("*.*") if file.is_file()]
    assert len(logs) == 6
    commands = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    assert any("mlflow@127.0.0.1" in each for each in commands)
    seen = [team.said, *team.died, team.interrupted.errors, *logs, *commands]
    assert [text for text in seen if any(password in text for password in known)] == []


@with_real_servers
def test_each_user_is_told_what_to_type(team: Team) -> None:
    for user in ("alice", "bob", "carol"):
        assert f"export MLFLOW_TRACKING_URI={team.address} {NAME}={user}\n" in team.said
        assert f"export {PASSWORD}=$(cat {team.folder / 'users' / user})\n" in team.said
        assert f"python -m experiments.sweep --storage {team.storage(user)}\n" in team.said
    assert "only this machine reaches 127.0.0.1" in team.said


@with_real_servers
def test_a_later_start_keeps_passwords_and_makes_those_that_are_not_there(team: Team) -> None:
    now = team.passwords()
    changed = {file for file, password in now.items() if team.first_passwords.get(file) != password}
    assert changed == {"users/bob", "users/carol"}
    assert set(team.first_passwords) == set(now) - {"users/bob"}


@with_real_servers
def test_a_wrong_password_is_refused(team: Team) -> None:
    for user, wrong in {
        "alice": team.password("users/bob"),
        "carol": team.first_passwords["users/carol"],  # which was removed
    }.items():
        assert "password authentication failed" in connect(team, user, wrong)
        assert asks_who_it_is(team, user, wrong)
    assert "no pg_hba.conf entry" in connect(team, "nobody", "")
    assert asks_who_it_is(team, "nobody", "")
    for user in ("alice", "bob", "carol"):
        assert connect(team, user, team.password(f"users/{user}")) == user
        assert not asks_who_it_is(team, user, team.password(f"users/{user}"))
    assert not asks_who_it_is(team, "admin", team.password("passwords/admin"))


@with_real_servers
@pytest.mark.parametrize(
    ("user", "file", "database"),
    [
        ("alice", "users/alice", "mlflow"),
        ("alice", "users/alice", "mlflow_users"),
        ("alice", "users/alice", "postgres"),
        ("mlflow", "passwords/mlflow", "optuna"),
        ("mlflow", "passwords/mlflow", "postgres"),
    ],
)
def test_a_role_gets_into_no_database_that_it_does_not_need(
    team: Team, user: str, file: str, database: str
) -> None:
    assert "no pg_hba.conf entry" in connect(team, user, team.password(file), database)


@with_real_servers
def test_a_user_can_neither_make_users_nor_rule_over_databases(team: Team) -> None:
    import psycopg

    url = team.storage("alice").replace("+psycopg", "")
    with psycopg.connect(url, password=team.password("users/alice"), autocommit=True) as connection:
        for role in ("alice", "optuna"):
            connection.execute(f"SET ROLE {role}")
            for statement in (
                "CREATE ROLE mallory",
                "CREATE DATABASE mine",
                "ALTER ROLE bob PASSWORD 'mine'",
                "ALTER ROLE bob CONNECTION LIMIT 0",
                "ALTER ROLE alice CONNECTION LIMIT -1",
                "COPY (SELECT 1) TO PROGRAM 'cat'",
                f'SET ROLE "{OWNER}"',
                f'GRANT "{OWNER}" TO alice',
                "ALTER DATABASE optuna CONNECTION LIMIT 0",
                "ALTER DATABASE optuna RENAME TO mine",
                "ALTER DATABASE optuna SET default_transaction_read_only = on",
                "ALTER DATABASE optuna OWNER TO alice",
                "DROP DATABASE optuna",
                "CREATE SCHEMA mine",
                "CREATE TABLE mine (n int)",
                "CREATE TEMP TABLE mine (n int)",
                "ALTER TABLE trials ADD COLUMN mine int",
                "DROP TABLE trials",
                "TRUNCATE trials CASCADE",
                "DELETE FROM studies",
                "UPDATE version_info SET schema_version = 0",
                "UPDATE alembic_version SET version_num = 'mine'",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement)


@with_real_servers
def test_a_user_who_takes_all_connections_takes_them_from_nobody_else(team: Team) -> None:
    import psycopg

    url = team.storage("alice").replace("+psycopg", "")
    with ExitStack() as connections:
        password = team.password("users/alice")
        for _ in range(USER_CONNECTIONS):
            connections.enter_context(psycopg.connect(url, password=password))
        assert "too many connections for role" in connect(team, "alice", password)
        assert connect(team, "bob", team.password("users/bob")) == "bob"
        assert not asks_who_it_is(team, "bob", team.password("users/bob"))


@with_real_servers
def test_all_users_together_leave_mlflow_its_connections(team: Team) -> None:
    import psycopg

    url = team.storage("postgres", "postgres").replace("+psycopg", "")
    with psycopg.connect(url, password=team.password("passwords/postgres")) as connection:
        of_all, of_studies, workers_pools = connection.execute(
            "SELECT current_setting('max_connections')::int, datconnlimit, 4 * 2 * (5 + 10) "
            "FROM pg_database WHERE datname = 'optuna'"
        ).fetchone() or (0, 0, 0)
    assert 0 < of_studies < of_all - workers_pools


@with_real_servers
def test_a_request_does_not_wait_for_acknowledgements(team: Team) -> None:
    import requests

    # Nagle's algorithm and a delayed ACK make it 40 ms, each time; else it's 2. However busy the
    # machine is, some of 50 are not kept waiting.
    seconds = []
    with requests.Session() as session:
        for _ in range(50):
            before = time.perf_counter()
            assert session.get(f"{team.address}/health", timeout=60).text == "OK"
            seconds.append(time.perf_counter() - before)
    assert min(seconds[20:]) < 0.010  # the first ones are acknowledged at once


@with_real_servers
def test_a_user_overwrites_what_another_has_stored_and_deletes_none_of_it(
    team: Team, work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    become(monkeypatch, "alice", team.password("users/alice"))
    client = MlflowClient()
    run = client.create_run(client.create_experiment("alice's"))
    client.log_text(run.info.run_id, "alice's", "file.txt")
    file = f"{run.info.experiment_id}/{run.info.run_id}/artifacts/file.txt"
    store = f"{team.address}/api/2.0/mlflow-artifacts/artifacts/{file}"
    bob = {"auth": ("bob", team.password("users/bob")), "timeout": 60}
    assert requests.put(store, b"bob's", **bob).status_code == 200  # type: ignore[arg-type]
    assert (team.folder / "artifacts" / file).read_text() == "bob's"
    assert requests.delete(store, **bob).status_code == 403  # type: ignore[arg-type]
    become(monkeypatch, "bob", team.password("users/bob"))
    client.set_tag(run.info.run_id, "note", "bob's")
    for refused in (
        lambda: client.delete_run(run.info.run_id),
        lambda: client.delete_experiment(run.info.experiment_id),
    ):
        with pytest.raises(MlflowException, match="Permission denied"):
            refused()


@with_real_servers
def test_a_user_is_no_admin_of_mlflow(
    team: Team, work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    become(monkeypatch, "alice", team.password("users/alice"))
    with pytest.raises(MlflowException, match="Permission denied"):
        get_app_client("basic-auth", team.address).create_user("mallory", "a long password")


@with_real_servers
def test_nobody_else_reads_passwords_logs_and_data(team: Team) -> None:
    names = ("passwords/*", "users/*", "*.log", "artifacts", "postgresql")
    files = [file for name in names for file in team.folder.glob(name)]
    assert len(files) == 4 + 3 + 2 + 2
    assert {file.name for file in files if stat.S_IMODE(file.stat().st_mode) & 0o077} == set()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in files if file.is_file()}
    assert modes == {0o600}


@with_real_servers
def test_a_server_that_dies_is_started_again_and_a_line_says_so(team: Team) -> None:
    again = "has ended (exit code -9): it restarts in 1 s, see"
    assert team.died == [
        f"PostgreSQL {again} {team.folder / 'postgresql.log'}\n",
        f"MLflow {again} {team.folder / 'mlflow.log'}\n",
    ]


@with_real_servers
def test_servers_whose_command_was_killed_are_gone_once_it_is_started_again(team: Team) -> None:
    assert team.orphans == []


@with_real_servers
def test_ctrl_c_stops_both_in_order_and_leaves_no_process(team: Team) -> None:
    assert (team.interrupted.code, team.interrupted.left) == (0, [])
    # That start may have met those whose command was killed, on their way out.
    assert re.fullmatch(
        r"(\w+ still runs from an earlier start \(process [\d, ]+\): stopping it first\n)*",
        team.interrupted.errors,
    )
    assert "received fast shutdown request" in (team.folder / "postgresql.log").read_text()
    assert "Finished server process" in (team.folder / "mlflow.log").read_text()


@with_real_servers
def test_a_folder_whose_servers_run_is_refused(
    team: Team, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["--postgresql-port", str(free_port()), "--mlflow-port", str(free_port())]
    assert main(["--dir", str(team.folder), *ports]) == 2
    assert capsys.readouterr().err.endswith(f"--dir {team.folder}: its servers are running\n")


# Without real servers.


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Pretend that all is installed; return the options of a start on free ports."""
    monkeypatch.setattr(experiments.servers, "find_programs", lambda version="*": tmp_path)
    monkeypatch.setattr(experiments.servers, "find_spec", lambda name: object())
    monkeypatch.setattr(experiments.servers, "_as_its_user", dict)
    ports = ["--postgresql-port", str(free_port()), "--mlflow-port", str(free_port())]
    return ["--dir", str(tmp_path / "servers"), *ports]


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("python -m experiments.servers: error: ")


@pytest.mark.parametrize("option", ["--postgresql-port", "--mlflow-port"])
def test_a_port_that_is_taken_is_refused(
    free: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert main([*free, option, str(number)]) == 2
    name = psutil.Process().name()
    assert the_line(capsys) == (
        f"--host 127.0.0.1, {option} {number}: Address already in use (while attempting to bind on "
        f"address ('127.0.0.1', {number})) by process {os.getpid()} ({name})"
    )
    assert not (tmp_path / "servers").exists()


def test_both_at_one_port_are_refused(free: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    number = str(free_port())
    assert main([*free, "--postgresql-port", number, "--mlflow-port", number]) == 2
    assert the_line(capsys) == f"--postgresql-port and --mlflow-port are both {number}"


@pytest.mark.parametrize("number", ["0", "65536", "-1", "http"])
def test_what_is_no_port_is_refused(
    free: list[str], number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*free, f"--mlflow-port={number}"]) == 2
    assert the_line(capsys) == f"argument --mlflow-port: invalid port value: {number!r}"


def test_an_address_that_this_machine_has_not_is_refused(
    free: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*free, "--host", "192.0.2.77"]) == 2  # RFC 5737: an example's
    assert re.match(r"--host 192.0.2.77, --postgresql-port \d+: Cannot assign", the_line(capsys))


@pytest.mark.parametrize("name", ["Alice", "a b", "../admin", "", "1st", "a" * 32, "pg_x", "admin"])
def test_a_name_that_no_user_can_have_is_refused(
    free: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*free, "--user", "alice", name]) == 2
    line = the_line(capsys)
    assert line.startswith("--user must be up to 31 small letters, digits and _")
    assert line.endswith(f"not {name!r}")


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    free: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "thesis.tex").touch()
    assert main(free) == 2
    assert the_line(capsys).endswith("servers holds something else: name a new folder")
    assert [file.name for file in (tmp_path / "servers").iterdir()] == ["thesis.tex"]


def test_a_folder_that_others_write_to_is_refused(
    free: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "servers"
    folder.mkdir()
    folder.chmod(0o777)
    assert main(free) == 2
    assert the_line(capsys).startswith(f"--dir: others can write to {folder}: chmod go-w")
    folder.chmod(0o700)
    (tmp_path / "passwords").mkdir()
    (folder / "passwords").symlink_to(tmp_path / "passwords")
    assert main(free) == 2
    assert the_line(capsys).startswith(
        f"--dir: {folder / 'passwords'} is another user's, or a link"
    )


def test_a_link_that_is_planted_as_the_draft_of_a_password_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "alice.draft").symlink_to(victim)
    password = Passwords(tmp_path).read("users/alice")
    assert victim.read_text() == "precious"
    file = tmp_path / "users" / "alice"
    assert file.read_text() == f"{password}\n"
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600
    assert [each.name for each in (tmp_path / "users").iterdir()] == ["alice"]


def test_without_postgresql_it_is_said_what_to_install(
    free: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments.servers, "find_programs", lambda version="*": None)
    assert main(free) == 2
    line = "PostgreSQL is not installed (Debian: apt install postgresql)"
    assert the_line(capsys) == line


def test_without_an_extra_it_is_said_what_to_install(
    free: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments.servers, "find_spec", lambda name: None)
    assert main(free) == 2
    assert the_line(capsys) == "without psycopg: pip install '.[postgresql,server]'"


def stand_in(name: str, script: str, folder: Path) -> Callable[..., AbstractContextManager[Server]]:
    log = folder / f"{name}.log"
    return lambda *_: running(name, ["/bin/sh", "-c", script], log, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["postgresql", "mlflow_on"])
def test_a_server_that_dies_again_and_again_ends_both(
    free: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for each in ("postgresql", "mlflow_on"):
        end = f"sleep {LONG} & exit 3" if each == name else f"exec sleep {LONG}"
        server = stand_in(each, f"echo it starts; {end}", tmp_path)
        monkeypatch.setattr(experiments.servers, each, server)
    monkeypatch.setattr(experiments.supervision, "RESTARTS", 2)
    monkeypatch.setattr(experiments.supervision, "FIRST_PAUSE_SECONDS", 0.25)
    assert main([*free, "--user", "alice"]) == 1
    log = tmp_path / f"{name}.log"
    ended = f"{name} has ended (exit code 3)"
    assert capsys.readouterr().err.splitlines() == [
        f"{ended}: it restarts in 0.25 s, see {log}",
        f"{ended}: it restarts in 0.5 s, see {log}",
        f"python -m experiments.servers: error: {ended} again, after 2 restarts: see {log}",
    ]
    starts = {file.stem: file.read_text().count("it starts") for file in tmp_path.glob("*.log")}
    assert starts == {"postgresql": 1, "mlflow_on": 1, name: 3}
    assert sleeping() == []


LONG = f"4711.{os.getpid()}"
"""How many seconds only processes of these tests sleep."""


def sleeping() -> list[psutil.Process]:
    """Return the processes that do."""
    found = []
    for each in psutil.process_iter(["cmdline", "status"]):
        is_dead = each.info["status"] == psutil.STATUS_ZOMBIE
        if each.info["cmdline"] == ["sleep", LONG] and not is_dead:
            found.append(each)
    return found


def test_a_server_that_ran_for_long_has_all_its_restarts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments.supervision, "RESTARTS", 1)
    monkeypatch.setattr(experiments.supervision, "FIRST_PAUSE_SECONDS", 0)
    with stand_in("short", "echo it starts", tmp_path)() as server:
        monkeypatch.setattr(experiments.supervision, "STEADY_SECONDS", -1)
        while server.log.read_text().count("it starts") < 4:
            server.keep_running()
        monkeypatch.setattr(experiments.supervision, "STEADY_SECONDS", 600)
        with pytest.raises(TransientError, match="again, after 1 restarts"):
            keep_running_for_ever(server)


def keep_running_for_ever(server: Server) -> None:
    while True:
        server.keep_running()


# A command that starts a server, and is killed.
KILLED = """
import os, shutil, signal, sys, time
from pathlib import Path
from experiments import supervision

supervision.shutil.which = {which}
arguments = ["sh", "-c", "sleep {long} & echo it starts; exec sleep {long}"]
server = supervision.Server("The server", arguments, Path(sys.argv[1]), signal.SIGTERM)
while not server.log.read_text():
    time.sleep(0.01)
print(server.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_command(log: Path, which: str) -> int:
    command = [sys.executable, "-c", KILLED.format(which=which, long=LONG), str(log)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="only Linux can do that")
def test_a_server_ends_with_a_command_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    number = kill_a_command(log, "shutil.which")
    with suppress(psutil.NoSuchProcess):
        psutil.Process(number).wait(20)
    assert len(sleeping()) == 1
    stop_orphaned("The server", log, signal.SIGTERM)  # what it has started does not end with it
    assert sleeping() == []


@pytest.mark.slow
def test_a_server_that_outlives_its_command_is_stopped_by_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    number = kill_a_command(log, "lambda name: None")
    deadline = time.monotonic() + 20
    while len(sleeping()) < 2:
        assert time.monotonic() < deadline
    stop_orphaned("The server", log, signal.SIGTERM)
    assert sleeping() == []
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"The server still runs from an earlier start (process {number}, ")
    assert err.endswith("): stopping it first\n")
    assert not log.with_suffix(".pid").exists()


def test_a_process_that_has_a_dead_servers_number_by_now_is_let_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    other = subprocess.Popen(["sleep", "4714"], cwd=tmp_path, start_new_session=True)
    try:
        created = psutil.Process(other.pid).create_time()
        log.with_suffix(".pid").write_text(json.dumps([other.pid, created - 3600]))
        stop_orphaned("The server", log, signal.SIGTERM)
        assert other.poll() is None
        assert capsys.readouterr().err == ""
    finally:
        other.kill()
        other.wait()


def test_a_server_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments.supervision, "STOP_SECONDS", 0.5)
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    with stand_in("stubborn", script, tmp_path)() as server:
        while server.log.read_text() != "ready\n":
            time.sleep(0.01)
    assert server.process.returncode == -signal.SIGKILL


# The command, with servers that do nothing; it says which processes they are.
IDLE = """
import sys
from pathlib import Path
import signal
from experiments import servers

for name in ("SIGHUP", "SIGQUIT"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)  # these tests may run under nohup

def idle(place, *_):
    return servers.running("idle", ["sleep", "4712"], place.folder / "idle.log", signal.SIGTERM)

servers.postgresql = servers.mlflow_on = idle
servers.find_programs = lambda version="*": Path()
servers.find_spec = lambda name: ""
servers._as_its_user = dict
sys.exit(servers.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_a_signal_stops_both(free: list[str], name: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IDLE, *free], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "Ctrl-C stops both\n":
        assert process.poll() is None
    servers = psutil.Process(process.pid).children()
    assert len(servers) == 2
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not any(server.is_running() for server in servers)


def test_the_help_says_what_is_taken_where_nothing_is_said() -> None:
    assert build_parser().format_help().count("(default: ") == 4


def test_a_line_that_nobody_can_read_does_not_end_the_servers(tmp_path: Path) -> None:
    script = (
        "from experiments.supervision import say; from tracking.cli import Parser, run_command\n"
        "def run(options):\n say('a server is started again'); open('on', 'w').close()\n"
        "run_command(Parser(prog='tool'), run, [])"
    )
    command = f'PYTHONPATH={REPOSITORY} {sys.executable} -c "{script}" 2>/dev/full'
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False)
    assert (tmp_path / "on").exists()
