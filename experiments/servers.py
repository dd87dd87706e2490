"""Servers for a team's sweeps, PostgreSQL and MLflow: `python -m experiments.servers --help`."""

from __future__ import annotations

import argparse
import fcntl
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.accounts import (
    ACCESS,
    MLFLOW_USERS,
    OWNER,
    RESERVED_FOR_MLFLOW,
    STUDY_CONNECTIONS,
    Passwords,
    check_name,
    make_roles,
    make_studies,
    make_users,
)
from experiments.cli import add_flag
from experiments.interrupts import InterruptionError, Interrupts
from experiments.server_addresses import (
    EVERYWHERE,
    ServerAddresses,
    say_what_starts,
    what_to_type,
)
from experiments.supervision import LOOK_SECONDS, Server, check_port, running, stop_orphaned
from tracking.cli import Parser, run_command
from tracking.errors import TransientError, one_line
from tracking.files import writing
from tracking.store import environment

START_SECONDS = 180
"""MLflow makes its tables meanwhile, on a machine that may be busy."""


def find_programs(version: str = "*") -> Path | None:
    """Return the folder of PostgreSQL's programs; Debian's is not in the PATH."""
    found = [file.parent for file in Path("/usr/lib/postgresql").glob(f"{version}/bin/initdb")]
    if not found and (other := shutil.which("initdb")):
        found = [Path(other).resolve().parent]
    return max(found, key=lambda folder: (len(folder.parent.name), folder), default=None)


def _as_its_user() -> dict[str, Any]:
    """Return the user of PostgreSQL's processes, for Popen: PostgreSQL refuses to run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}


def check(options: argparse.Namespace) -> None:
    """Raise ValueError if a user name, a program, a package or a port can't be used."""
    for name in options.user:
        check_name(name)
    if find_programs() is None:
        raise ValueError("PostgreSQL is not installed (Debian: apt install postgresql)")
    if _as_its_user() and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        raise ValueError("root can't run PostgreSQL, and there is no user postgres: use another")
    needed = ("psycopg", "flask_wtf", "uvloop")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"without {missing[0]}: pip install '.[postgresql,server]'")
    if options.postgresql_port == options.mlflow_port:
        raise ValueError(f"--postgresql-port and --mlflow-port are both {options.mlflow_port}")


def check_ports(addresses: ServerAddresses) -> None:
    """Raise ValueError if a port is taken, or the host is not this machine."""
    check_port("--postgresql-port", addresses.host, addresses.postgresql_port)
    check_port("--mlflow-port", addresses.host, addresses.mlflow_port)


@contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Make the servers' folder if it doesn't exist, and lock it while the block lasts.

    Raises:
        ValueError: it has other content or another owner, or its servers are running.
    """
    is_ours = (folder / "passwords").is_dir()
    with writing(f"--dir {folder}"):
        if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--dir {folder} holds something else: name a new folder")
        # PostgreSQL's user must reach its own folder in it.
        folder.mkdir(mode=0o711 if _as_its_user() else 0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        for name in ("passwords", "users", "artifacts"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            _check_owner(folder / name)
        (folder / ".gitignore").write_text("*\n")
    check_access = ["/usr/bin/test", "-x", str(folder)]
    if _as_its_user() and subprocess.run(check_access, check=False, **_as_its_user()).returncode:
        raise ValueError(f"--dir {folder}: the user postgres, who runs PostgreSQL, can't enter it")
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--dir {folder}: its servers are running") from None
        yield
    finally:
        os.close(lock)


def _check_owner(folder: Path) -> None:
    """Raise ValueError if another user could place a password or a link in a folder."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"--dir: {folder} is another user's, or a link: name a new folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"--dir: others can write to {folder}: chmod go-w, or name a new folder")


def make_data(addresses: ServerAddresses) -> Path:
    """Make PostgreSQL's data folder if there is none; return the folder of its programs."""
    data, draft = (addresses.folder / name for name in ("postgresql", "postgresql.draft"))
    version = (data / "PG_VERSION").read_text().strip() if data.exists() else "*"
    if (programs := find_programs(version)) is None:
        raise ValueError(f"PostgreSQL {version}, which made {data}, is not installed")
    if data.exists():
        return programs
    addresses.passwords.own("postgres")
    password = addresses.folder / "passwords" / "postgres"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    if owner := _as_its_user().get("user"):
        shutil.chown(draft, owner, owner)
        shutil.chown(password, owner, owner)
    options = ["--username=postgres", "--pwfile=/dev/stdin", "--auth=scram-sha-256"]
    options += ["--encoding=UTF8", "--locale=C", "--data-checksums", "--pgdata", draft.name]
    with password.open() as stdin:
        made = subprocess.run(
            [programs / "initdb", *options],
            cwd=addresses.folder,
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
            **_as_its_user(),
        )
    if made.returncode:
        raise TransientError(f"can't make PostgreSQL's data: {' '.join(made.stderr.split())}")
    (draft / "pg_hba.conf").write_text(ACCESS)
    draft.rename(data)
    return programs


def wait_for(answers: Callable[[], bool], servers: Sequence[Server], stopped: Interrupts) -> None:
    """Wait until the last of the servers answers; all of them must keep running meanwhile."""
    deadline = time.monotonic() + START_SECONDS
    while not answers():
        for server in servers:
            server.check()
        if stopped():
            raise InterruptionError
        if time.monotonic() > deadline:
            name, log = servers[-1].name, servers[-1].log
            raise TransientError(f"{name} doesn't answer after {START_SECONDS} s: see {log}")
        time.sleep(LOOK_SECONDS)


@contextmanager
def postgresql(addresses: ServerAddresses, stopped: Interrupts) -> Iterator[Server]:
    """Run PostgreSQL while the block lasts, with all roles and databases."""
    import psycopg

    programs = make_data(addresses)
    arguments = [str(programs / "postgres"), "-D", "postgresql", "-h", addresses.host]
    arguments += ["-p", str(addresses.postgresql_port), "-k", ""]  # no Unix sockets
    arguments += ["-N", str(STUDY_CONNECTIONS + RESERVED_FOR_MLFLOW)]
    log, stop_signal = addresses.logs["PostgreSQL"]
    with running("PostgreSQL", arguments, log, stop_signal, **_as_its_user()) as server:
        ask = [str(programs / "pg_isready"), "-q", "-h", addresses.local, "-U", "postgres"]
        ask += ["-p", str(addresses.postgresql_port)]
        wait_for(lambda: subprocess.run(ask, check=False).returncode == 0, [server], stopped)
        password = addresses.passwords.own("postgres")

        def connect(database: str) -> psycopg.Connection[Any]:
            url = addresses.database("postgres", database, addresses.local).replace("+psycopg", "")
            return psycopg.connect(url, password=password, autocommit=True)

        with connect("postgres") as connection:
            make_roles(connection, addresses.passwords)
        with connect("optuna") as connection:
            url = addresses.database("postgres", "optuna", addresses.local)
            make_studies(connection, lambda: _make_tables(url, password))
        yield server


def _make_tables(url: str, password: str) -> None:
    """Make Optuna's tables as the role that owns them."""
    from optuna.storages import RDBStorage

    as_owner = {"password": password, "options": f"-c role={OWNER}"}
    RDBStorage(url, {"connect_args": as_owner}).engine.dispose()


@contextmanager
def mlflow_on(
    addresses: ServerAddresses, database: Server, stopped: Interrupts
) -> Iterator[Server]:
    """Run MLflow while the block lasts, with all users."""
    from mlflow.server.security_utils import get_default_allowed_hosts

    names = {addresses.public, socket.gethostname(), socket.getfqdn()}
    with_port = {f"{name}:{addresses.mlflow_port}" for name in names}
    defaults = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*get_default_allowed_hosts(), *names, *with_port]),
        # Without it, MLflow refuses its own pages at any name but localhost.
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in with_port),
    }
    users = addresses.database("mlflow", "mlflow_users", addresses.local)
    ours = mlflow_settings(addresses.passwords, users)
    arguments = mlflow_command(
        addresses.database("mlflow", "mlflow", addresses.local), str(addresses.folder / "artifacts")
    )
    arguments += ["--host", addresses.host, "--port", str(addresses.mlflow_port)]
    log, stop_signal = addresses.logs["MLflow"]
    variables = {**defaults, **os.environ, **ours, "PGPASSWORD": addresses.passwords.own("mlflow")}
    with running("MLflow", arguments, log, stop_signal, env=variables) as server:
        address = f"http://{addresses.local}:{addresses.mlflow_port}"
        with environment({"no_proxy": "*"}):
            wait_for(lambda: _is_healthy(address), [database, server], stopped)
            make_users(address, addresses.passwords)
        yield server


def mlflow_command(database: str, artifacts: str) -> list[str]:
    """Return the command of an MLflow server with users, without its host and port."""
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    # With several workers, asyncio's loop leaves Nagle's algorithm on: 40 ms a request.
    command += ["--uvicorn-opts", "--loop uvloop"]
    return [*command, "--backend-store-uri", database, "--artifacts-destination", artifacts]


def mlflow_settings(passwords: Passwords, users: str) -> dict[str, str]:
    """Return the environment of an MLflow server with users, and write its settings file.

    `users` is the URL of the database of users.
    """
    settings = passwords.folder / "mlflow-users.ini"
    settings.write_text(MLFLOW_USERS.format(database=users))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": passwords.own("admin"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": passwords.own("secret_key"),
        # Jobs would take eight more processes, and nothing here uses them.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _is_healthy(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310
        return True
    return False


def serve(addresses: ServerAddresses) -> None:
    """Run both servers until a signal arrives.

    Raises:
        TransientError: a server dies repeatedly, or can't be set up.
    """
    import psycopg
    from mlflow.exceptions import MlflowException

    warnings.filterwarnings("ignore", module="mlflow")  # its server imports deprecated packages
    with Interrupts() as stopped:
        try:
            with (
                postgresql(addresses, stopped) as database,
                mlflow_on(addresses, database, stopped) as mlflow,
            ):
                print(what_to_type(addresses), flush=True)
                while not stopped():
                    database.keep_running()
                    mlflow.keep_running()
                    time.sleep(LOOK_SECONDS)
        except (psycopg.Error, MlflowException) as error:
            raise TransientError(f"the servers can't be set up: {one_line(error)}") from error


def port(text: str) -> int:
    """Return a port number; for argparse."""
    if not 0 < (number := int(text)) < 65536:
        raise ValueError
    return number


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = Parser(
        prog="python -m experiments.servers",
        description="Start the servers that a team's sweeps share: PostgreSQL for the studies and "
        "MLflow for the runs, both with users and passwords. Print what each user types. Ctrl-C "
        "stops both; the same command starts them again with the same data.",
        epilog="exit codes: 0 stopped; 2 bad input; 1 a server dies repeatedly, or the disk is "
        "full",
    )
    add_flag(parser, "--dir", Path("servers"), "all data, logs and passwords")
    text = f"name or address to answer at, {EVERYWHERE} for all of this machine"
    add_flag(parser, "--host", "127.0.0.1", text)
    add_flag(parser, "--postgresql-port", 5432, "", type=port, metavar="PORT")
    add_flag(parser, "--mlflow-port", 5000, "", type=port, metavar="PORT")
    text = "make these users, in addition to those that exist"
    add_flag(parser, "--user", None, text, nargs="+", action="extend", metavar="NAME")
    return parser


def _run(options: argparse.Namespace) -> None:
    options.user = options.user or []
    check(options)
    addresses = ServerAddresses(
        folder=options.dir.resolve(),
        host=options.host,
        postgresql_port=options.postgresql_port,
        mlflow_port=options.mlflow_port,
    )
    if not addresses.folder.exists():
        check_ports(addresses)  # before anything is made
    with open_folder(addresses.folder), writing("the servers' files"):
        for name, (log, stop_signal) in reversed(addresses.logs.items()):
            stop_orphaned(name, log, stop_signal)
        check_ports(addresses)
        for user in options.user:
            addresses.passwords.read(f"users/{user}")
        say_what_starts(addresses)
        serve(addresses)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the servers of a command line, and return the exit code once they have stopped."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
