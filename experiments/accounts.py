"""Accounts of a team's servers: passwords in files, roles in PostgreSQL, users in MLflow.

A user has one password for both servers, in the file `users/NAME`; the servers' own passwords are
in `passwords/`. Each start sets every password to the content of its file. Passwords are passed in
the environment, as a file or as a hash, never on a command line, which everyone on a machine sees.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.files import replacing
from tracking.store import environment

if TYPE_CHECKING:
    from typing import LiteralString

    import psycopg

NAME = re.compile(r"(?!pg_)[a-z][a-z0-9_]{0,30}")
TAKEN = ("admin", "mlflow", "none", "optuna", "postgres", "public")

OWNER = "optuna-owner"
"""The role that owns the studies' database and tables; it has no login and no members. No user can
have this name."""

USER_CONNECTIONS = 50
"""The limit for one user. A driver has up to four; the largest sweeps have about ten drivers."""
STUDY_CONNECTIONS, RESERVED_FOR_MLFLOW = 170, 130
"""The limit for all users, and what is left for MLflow, whose four workers have up to 120."""

# Users are members of the role `optuna`.
ACCESS = """\
# TYPE  DATABASE             USER      ADDRESS   METHOD
host    optuna               +optuna   all       scram-sha-256
host    mlflow,mlflow_users  mlflow    samehost  scram-sha-256
host    all                  postgres  samehost  scram-sha-256
"""
DATABASES = {"optuna": OWNER, "mlflow": "mlflow", "mlflow_users": "mlflow"}
"""Each with its owner."""
# EDIT: several users who share a sweep write into the same runs.
MLFLOW_USERS = """\
[mlflow]
default_permission = EDIT
database_uri = {database}
admin_username = admin
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Passwords:
    """The files of the passwords."""

    folder: Path

    def read(self, name: str) -> str:
        """Return the password in a file; a new file gets a new password."""
        path = self.folder / name
        if not path.exists():
            path.with_suffix(".draft").unlink(missing_ok=True)  # of an attacker or an old version
            with replacing(path, mode=0o600) as stream:
                stream.write(f"{secrets.token_urlsafe(24)}\n".encode())
        return path.read_text().strip()

    def own(self, name: str) -> str:
        """Return one of the servers' own passwords."""
        return self.read(f"passwords/{name}")

    def users(self) -> dict[str, str]:
        """Return each user's password."""
        found = sorted(file.name for file in (self.folder / "users").iterdir())
        return {name: self.read(f"users/{name}") for name in found if NAME.fullmatch(name)}


def check_name(name: str) -> None:
    """Raise ValueError unless a name is valid in both servers and in a URL."""
    if not NAME.fullmatch(name) or name in TAKEN:
        raise ValueError(
            "--user must be up to 31 small letters, digits and _, begin with a letter, and be none "
            f"of {', '.join(TAKEN)}, pg_…: not {name!r}"
        )


def make_roles(connection: psycopg.Connection[Any], passwords: Passwords) -> None:
    """Make PostgreSQL's missing roles and databases, and set all passwords.

    Args:
        connection: of a superuser, with autocommit.
        passwords: of MLflow and the users.
    """
    from psycopg import sql

    def set_password(role: str, password: str) -> None:
        # A hash, because statements may be logged.
        encrypt, method = connection.pgconn.encrypt_password, b"scram-sha-256"
        hashed = encrypt(password.encode(), role.encode(), method).decode()
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
        connection.execute(statement.format(sql.Identifier(role), hashed))

    roles = _names(connection, "SELECT rolname FROM pg_roles")
    with connection.transaction():
        for role, kind in {"optuna": "NOLOGIN", "mlflow": "LOGIN", OWNER: "NOLOGIN"}.items():
            if role not in roles:
                _run(connection, f"CREATE ROLE {{}} {kind}", role)
        set_password("mlflow", passwords.own("mlflow"))
        for user, password in passwords.users().items():
            if user not in roles:
                _run(connection, "CREATE ROLE {} LOGIN IN ROLE optuna", user)
            _run(connection, f"ALTER ROLE {{}} CONNECTION LIMIT {USER_CONNECTIONS}", user)
            _run(connection, "ALTER ROLE {} RESET role", user)  # earlier versions have set it
            set_password(user, password)
    databases = _names(connection, "SELECT datname FROM pg_database")
    for name, owner in DATABASES.items():
        if name not in databases:
            _run(connection, "CREATE DATABASE {}", name)
        _run(connection, "ALTER DATABASE {} OWNER TO {}", name, owner)
        _run(connection, "REVOKE ALL ON DATABASE {} FROM PUBLIC", name)
    _run(connection, "GRANT CONNECT ON DATABASE optuna TO optuna")
    _run(connection, f"ALTER DATABASE optuna CONNECTION LIMIT {STUDY_CONNECTIONS}")


def make_studies(connection: psycopg.Connection[Any], make_tables: Callable[[], None]) -> None:
    """Make Optuna's tables if they are missing, and let users read and write them only.

    Args:
        connection: of a superuser to Optuna's database, with autocommit.
        make_tables: makes them, as OWNER.
    """
    # In earlier versions, the role `optuna` owned the tables.
    _run(connection, "REASSIGN OWNED BY optuna TO {}", OWNER)
    _run(connection, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # before PostgreSQL 15
    _run(connection, "GRANT ALL ON SCHEMA public TO {}", OWNER)
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    if "alembic_version" not in _names(connection, tables):  # Optuna makes it last
        make_tables()
    with connection.transaction():
        _run(connection, "GRANT USAGE ON SCHEMA public TO optuna")
        _run(connection, "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO optuna")
        _run(connection, "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO optuna")
        _run(connection, "REVOKE INSERT, UPDATE ON alembic_version, version_info FROM optuna")


def _run(connection: psycopg.Connection[Any], statement: LiteralString, *names: str) -> None:
    from psycopg import sql

    connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _names(connection: psycopg.Connection[Any], query: LiteralString) -> set[str]:
    return {name for (name,) in connection.execute(query)}


def make_users(address: str, passwords: Passwords) -> None:
    """Make MLflow's missing users, and set all passwords."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", address)
    name, password = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
    with environment({name: "admin", password: passwords.own("admin")}):
        for user, secret in passwords.users().items():
            try:
                client.get_user(user)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                client.create_user(user, secret)
            else:
                client.update_user_password(user, secret)
