"""Servers for a team's sweeps, PostgreSQL and MLflow: `python -m experiments.servers --help`."""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import os
import pwd
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from experiments.interrupts import InterruptionError, Interrupts
from experiments.supervision import LOOK_SECONDS, Server, check_port, running, stop_orphaned
from tracking.cli import Parser, run_command
from tracking.errors import TransientError, one_line
from tracking.files import writing
from tracking.store import environment

# What is slow to import (MLflow) is imported where it is needed: --help is not.

START_SECONDS = 180
"""For MLflow to make its tables, on a busy machine."""
EVERYWHERE = "0.0.0.0"  # noqa: S104


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the servers keep their data, and where they answer."""

    folder: Path
    host: str
    postgresql_port: int
    mlflow_port: int

    @property
    def local(self) -> str:
        """The address for this machine itself."""
        return "127.0.0.1" if self.host == EVERYWHERE else self.host

    @property
    def public(self) -> str:
        """The name or address for others."""
        return socket.gethostname() if self.host == EVERYWHERE else self.host

    def database(self, user: str, name: str, host: str) -> str:
        """Return the URL of a database, without a password."""
        return f"postgresql+psycopg://{user}@{host}:{self.postgresql_port}/{name}"

    @property
    def passwords(self) -> Passwords:
        """What is needed to get in."""
        return Passwords(self.folder)

    @property
    def logs(self) -> dict[str, tuple[Path, signal.Signals]]:
        """Each server's log, and the signal by which it ends in order."""
        # PostgreSQL's "fast" way: who is still connected isn't waited for.
        return {
            "PostgreSQL": (self.folder / "postgresql.log", signal.SIGINT),
            "MLflow": (self.folder / "mlflow.log", signal.SIGTERM),
        }


def find_programs(version: str = "*") -> Path | None:
    """Return the folder of PostgreSQL's programs: Debian has a version's beside the PATH."""
    found = [file.parent for file in Path("/usr/lib/postgresql").glob(f"{version}/bin/initdb")]
    if not found and (other := shutil.which("initdb")):
        found = [Path(other).resolve().parent]
    return max(found, key=lambda folder: (len(folder.parent.name), folder), default=None)


def _as_its_user() -> dict[str, Any]:
    """Return whose processes PostgreSQL's are: it refuses root's, and Debian's has a user."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for what can't be served."""
    for name in options.user:
        check_name(name)
    if find_programs() is None:
        raise ValueError("PostgreSQL is not installed (Debian: apt install postgresql)")
    if _as_its_user() and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        raise ValueError(
            "root can't run PostgreSQL, and there is no user postgres: run this as another"
        )
    needed = ("psycopg", "flask_wtf", "uvloop")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"without {missing[0]}: pip install '.[postgresql,server]'")
    if options.postgresql_port == options.mlflow_port:
        raise ValueError(f"--postgresql-port and --mlflow-port are both {options.mlflow_port}")


def check_ports(place: Place) -> None:
    """Raise ValueError if another listens there, or none can."""
    check_port("--postgresql-port", place.host, place.postgresql_port)
    check_port("--mlflow-port", place.host, place.mlflow_port)


@contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Have the servers' folder for ourselves while the block lasts; it is made if it isn't there.

    Raises:
        ValueError: it is another's.
    """
    is_ours = (folder / "passwords").is_dir()
    with writing(f"--dir {folder}"):
        if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--dir {folder} holds something else: name a new folder")
        # PostgreSQL's user has to get through it to its own.
        folder.mkdir(mode=0o711 if _as_its_user() else 0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        for name in ("passwords", "users", "artifacts"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            _check_owner(folder / name)
        (folder / ".gitignore").write_text("*\n")
    look = ["/usr/bin/test", "-x", str(folder)]
    if _as_its_user() and subprocess.run(look, check=False, **_as_its_user()).returncode:
        raise ValueError(f"--dir {folder}: the user postgres can't get there, who is to serve it")
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
    """Raise ValueError for a folder in which another could plant a password, or a link."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"--dir: {folder} belongs to another, or is a link: name a new folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"--dir: others can write to {folder}: chmod go-w, or name a new folder")


def make_data(place: Place) -> Path:
    """Make PostgreSQL's data folder if there is none; return where the programs for it are."""
    data, draft = (place.folder / name for name in ("postgresql", "postgresql.draft"))
    version = (data / "PG_VERSION").read_text().strip() if data.exists() else "*"
    if (programs := find_programs(version)) is None:
        raise ValueError(f"PostgreSQL {version} is not installed, which made {data}")
    if data.exists():
        return programs
    place.passwords.own("postgres")
    password = place.folder / "passwords" / "postgres"
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
            cwd=place.folder,
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
    """Wait until the last of the servers answers."""
    deadline = time.monotonic() + START_SECONDS
    while not answers():
        for server in servers:
            server.check()
        if stopped():
            raise InterruptionError
        if time.monotonic() > deadline:
            line = f"{servers[-1].name} doesn't answer after {START_SECONDS} s"
            raise TransientError(f"{line}: see {servers[-1].log}")
        time.sleep(LOOK_SECONDS)


@contextmanager
def postgresql(place: Place, stopped: Interrupts) -> Iterator[Server]:
    """Run PostgreSQL while the block lasts, with all roles and databases."""
    import psycopg

    programs = make_data(place)
    settings = {
        "listen_addresses": place.host,
        "port": place.postgresql_port,
        "unix_socket_directories": "",
        "max_connections": STUDY_CONNECTIONS + RESERVED_FOR_MLFLOW,
    }
    given = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    arguments = [str(programs / "postgres"), "-D", "postgresql", *given]
    log, stop_signal = place.logs["PostgreSQL"]
    with running("PostgreSQL", arguments, log, stop_signal, **_as_its_user()) as server:
        look = [str(programs / "pg_isready"), "-q", "-h", place.local, "-U", "postgres"]
        look += ["-p", str(place.postgresql_port)]
        wait_for(lambda: subprocess.run(look, check=False).returncode == 0, [server], stopped)
        password = place.passwords.own("postgres")

        def connect(database: str) -> psycopg.Connection[Any]:
            url = place.database("postgres", database, place.local).replace("+psycopg", "")
            return psycopg.connect(url, password=password, autocommit=True)

        with connect("postgres") as connection:
            make_roles(connection, place.passwords)
        with connect("optuna") as connection:
            url = place.database("postgres", "optuna", place.local)
            make_studies(connection, lambda: _make_tables(url, password))
        yield server


def _make_tables(url: str, password: str) -> None:
    """Make Optuna's tables, as the role that owns them."""
    from optuna.storages import RDBStorage

    as_owner = {"password": password, "options": f"-c role={OWNER}"}
    RDBStorage(url, {"connect_args": as_owner}).engine.dispose()


@contextmanager
def mlflow_on(place: Place, database: Server, stopped: Interrupts) -> Iterator[Server]:
    """Run MLflow while the block lasts, with all users."""
    from mlflow.server.security_utils import get_default_allowed_hosts

    names = {place.public, socket.gethostname(), socket.getfqdn()}
    with_port = {f"{name}:{place.mlflow_port}" for name in names}
    by_default = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*get_default_allowed_hosts(), *names, *with_port]),
        # Elsewhere than on localhost, its own pages are strangers to it.
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in with_port),
    }
    users = place.database("mlflow", "mlflow_users", place.local)
    ours = mlflow_settings(place.passwords, users)
    arguments = mlflow_command(
        place.database("mlflow", "mlflow", place.local), str(place.folder / "artifacts")
    )
    arguments += ["--host", place.host, "--port", str(place.mlflow_port)]
    log, stop_signal = place.logs["MLflow"]
    variables = {**by_default, **os.environ, **ours, "PGPASSWORD": place.passwords.own("mlflow")}
    with running("MLflow", arguments, log, stop_signal, env=variables) as server:
        address = f"http://{place.local}:{place.mlflow_port}"
        with environment({"no_proxy": "*"}):
            wait_for(lambda: _is_healthy(address), [database, server], stopped)
            make_users(address, place.passwords)
        yield server


def mlflow_command(database: str, artifacts: str) -> list[str]:
    """Return how an MLflow server for users is started, but for where it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    # asyncio's loop leaves Nagle's algorithm on where there are several workers: 40 ms a request.
    command += ["--uvicorn-opts", "--loop uvloop"]
    return [*command, "--backend-store-uri", database, "--artifacts-destination", artifacts]


def mlflow_settings(passwords: Passwords, users: str) -> dict[str, str]:
    """Return the environment that such a server takes.

    Args:
        passwords: of its admin among others; its file of settings is written beside them.
        users: the URL of the database that they are in.
    """
    settings = passwords.folder / "mlflow-users.ini"
    settings.write_text(MLFLOW_USERS.format(database=users))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": passwords.own("admin"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": passwords.own("secret_key"),
        # Else there are eight processes that nothing here asks for.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _is_healthy(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):  # noqa: S310
        return True
    return False


def what_to_type(place: Place) -> str:
    """Return what each user types, and where the passwords are."""
    address = f"http://{place.public}:{place.mlflow_port}"
    lines = [f"MLflow answers at {address}, PostgreSQL at port {place.postgresql_port}"]
    for user in place.passwords.users():
        file = shlex.quote(str(place.folder / "users" / user))
        lines += [
            f"\n{user}, with the password of this file, or of a copy of it, types:\n",
            f"    export MLFLOW_TRACKING_URI={address} MLFLOW_TRACKING_USERNAME={user}",
            f"    export MLFLOW_TRACKING_PASSWORD=$(cat {file})",
            "    export PGPASSWORD=$MLFLOW_TRACKING_PASSWORD",
            "    python -m experiments.sweep --storage "
            + place.database(user, "optuna", place.public),
        ]
    lines.append(f"\nMLflow's user admin: password in {place.folder / 'passwords' / 'admin'}")
    if ipaddress.ip_address(socket.gethostbyname(place.host)).is_loopback:
        lines.append(f"only this machine reaches {place.host}: --host takes another address")
    return "\n".join([*lines, "Ctrl-C stops both"])


def serve(place: Place) -> None:
    """Run both servers until there is a signal.

    Raises:
        TransientError: one of them dies again and again, or can't be set up.
    """
    import psycopg
    from mlflow.exceptions import MlflowException

    warnings.filterwarnings("ignore", module="mlflow")  # about what its server imports
    with Interrupts() as stopped:
        try:
            with postgresql(place, stopped) as database, mlflow_on(place, database, stopped) as ui:
                print(what_to_type(place), flush=True)
                while not stopped():
                    database.keep_running()
                    ui.keep_running()
                    time.sleep(LOOK_SECONDS)
        except (psycopg.Error, MlflowException) as error:
            raise TransientError(f"the servers can't be set up: {one_line(error)}") from error


def port(text: str) -> int:
    """Return the number of a port."""
    if not 0 < (number := int(text)) < 65536:
        raise ValueError
    return number


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m experiments.servers",
        description="Start what a team's sweeps share, PostgreSQL for the studies and MLflow for "
        "the runs, both with users and passwords; print what each user types; stop both at "
        "Ctrl-C. The same command again goes on with the same data.",
        epilog="exit codes: 0 stopped; 2 bad input; 1 a server dies again and again, a full disk",
        allow_abbrev=False,
    )
    at = "(default: %(default)s)"
    parser.add_argument(
        "--dir", type=Path, default=Path("servers"), help=f"of all data, logs and passwords {at}"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"name or address to answer at, {EVERYWHERE} for all that this machine has {at}",
    )
    parser.add_argument("--postgresql-port", type=port, default=5432, metavar="PORT", help=at)
    parser.add_argument("--mlflow-port", type=port, default=5000, metavar="PORT", help=at)
    parser.add_argument(
        "--user",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="make these users, beside those who are there",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    check(options)
    place = Place(
        folder=options.dir.resolve(),
        host=options.host,
        postgresql_port=options.postgresql_port,
        mlflow_port=options.mlflow_port,
    )
    if not place.folder.exists():
        check_ports(place)  # nothing is made for a start that can't be
    with open_folder(place.folder), writing("the servers' files"):
        for name, (log, stop_signal) in reversed(place.logs.items()):
            stop_orphaned(name, log, stop_signal)
        check_ports(place)
        for user in options.user:
            place.passwords.read(f"users/{user}")
        serve(place)


def main(argv: Sequence[str] | None = None) -> int:
    """Start what a command line asks for, and return the exit code once it has stopped."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
