"""Who may use a team's servers: passwords in files, roles in PostgreSQL, users in MLflow.

A user has one password for both servers, in a file `users/NAME`; those of the servers themselves
are in `passwords/`. Each start sets a password to what its file says. They are handed on by the
environment, as a file, or as a hash, and never on a command line, which all on a machine can see.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.store import environment

if TYPE_CHECKING:
    from typing import LiteralString

    import psycopg

NAME = re.compile(r"(?!pg_)[a-z][a-z0-9_]{0,30}")
TAKEN = ("admin", "mlflow", "none", "optuna", "postgres", "public")

# Who gets in, and from where: users are members of the role that owns the studies.
ACCESS = """\
# TYPE  DATABASE             USER      ADDRESS   METHOD
host    optuna               +optuna   all       scram-sha-256
host    mlflow,mlflow_users  mlflow    samehost  scram-sha-256
host    all                  postgres  samehost  scram-sha-256
"""
DATABASES = {"optuna": "optuna", "mlflow": "mlflow", "mlflow_users": "mlflow"}
"""Each with its owner."""
# EDIT: whoever takes part in a sweep writes into runs that another has begun.
MLFLOW_USERS = """\
[mlflow]
default_permission = EDIT
database_uri = {database}
admin_username = admin
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True)
class Passwords:
    """The files that passwords are in."""

    folder: Path

    def read(self, name: str) -> str:
        """Return what a file says; one that isn't there gets a new password."""
        path = self.folder / name
        if not path.exists():
            draft = path.with_suffix(".draft")
            draft.touch(mode=0o600)
            draft.write_text(f"{secrets.token_urlsafe(24)}\n")
            draft.rename(path)
        return path.read_text().strip()

    def own(self, name: str) -> str:
        """Return a password of the servers themselves."""
        return self.read(f"passwords/{name}")

    def users(self) -> dict[str, str]:
        """Return each user's password."""
        found = sorted(file.name for file in (self.folder / "users").iterdir())
        return {name: self.read(f"users/{name}") for name in found if NAME.fullmatch(name)}


def check_name(name: str) -> None:
    """Raise ValueError if no user can be called that, in both servers and in a URL."""
    if not NAME.fullmatch(name) or name in TAKEN:
        raise ValueError(
            "--user must be up to 31 small letters, digits and _, begin with a letter, and be none "
            f"of {', '.join(TAKEN)}, pg_…: not {name!r}"
        )


def make_roles(connection: psycopg.Connection[Any], passwords: Passwords) -> None:
    """Make PostgreSQL's roles and databases, as far as they aren't there, and set passwords.

    Args:
        connection: of a superuser, with autocommit.
        passwords: of whom.
    """
    from psycopg import sql

    def run(statement: LiteralString, *names: str) -> None:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def names(query: LiteralString) -> set[str]:
        return {name for (name,) in connection.execute(query)}

    def set_password(role: str, password: str) -> None:
        # As a hash, for a statement may come into the log.
        encrypt, method = connection.pgconn.encrypt_password, b"scram-sha-256"
        hashed = encrypt(password.encode(), role.encode(), method).decode()
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
        connection.execute(statement.format(sql.Identifier(role), hashed))

    roles = names("SELECT rolname FROM pg_roles")
    with connection.transaction():
        if "optuna" not in roles:
            run("CREATE ROLE optuna NOLOGIN")
            run("CREATE ROLE mlflow LOGIN")
        set_password("mlflow", passwords.own("mlflow"))
        for user, password in passwords.users().items():
            if user not in roles:
                run("CREATE ROLE {} LOGIN IN ROLE optuna", user)
                run("ALTER ROLE {} SET role TO optuna", user)  # what one makes is everybody's
            set_password(user, password)
    databases = names("SELECT datname FROM pg_database")
    for name, owner in DATABASES.items():
        if name not in databases:
            run("CREATE DATABASE {} OWNER {}", name, owner)
        run("REVOKE ALL ON DATABASE {} FROM PUBLIC", name)


def make_users(address: str, passwords: Passwords) -> None:
    """Make MLflow's users, as far as they aren't there, and set passwords."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", address)
    admin = {
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": passwords.own("admin"),
    }
    with environment(admin):
        for user, password in passwords.users().items():
            try:
                client.get_user(user)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                client.create_user(user, password)
            else:
                client.update_user_password(user, password)
