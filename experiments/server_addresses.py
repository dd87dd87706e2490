"""Where a team's servers keep their data and answer, and what is printed of it."""

from __future__ import annotations

import ipaddress
import shlex
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from experiments.accounts import Passwords

EVERYWHERE = "0.0.0.0"  # noqa: S104


@dataclass(frozen=True, kw_only=True)
class ServerAddresses:
    """Where the servers keep their data, and the addresses where they answer."""

    folder: Path
    host: str
    postgresql_port: int
    mlflow_port: int

    @property
    def local(self) -> str:
        """The address for this machine."""
        return "127.0.0.1" if self.host == EVERYWHERE else self.host

    @property
    def public(self) -> str:
        """The name or address for other machines."""
        return socket.gethostname() if self.host == EVERYWHERE else self.host

    def database(self, user: str, name: str, host: str) -> str:
        """Return the URL of a database, without a password."""
        return f"postgresql+psycopg://{user}@{host}:{self.postgresql_port}/{name}"

    @property
    def passwords(self) -> Passwords:
        """The passwords of users and servers."""
        return Passwords(self.folder)

    @property
    def logs(self) -> dict[str, tuple[Path, signal.Signals]]:
        """Each server's log, and the signal for its shutdown."""
        # SIGINT is PostgreSQL's fast shutdown, which doesn't wait for clients to disconnect.
        return {
            "PostgreSQL": (self.folder / "postgresql.log", signal.SIGINT),
            "MLflow": (self.folder / "mlflow.log", signal.SIGTERM),
        }


def say_what_starts(addresses: ServerAddresses) -> None:
    """Print which servers are started, and where their logs are."""
    ports = {"PostgreSQL": addresses.postgresql_port, "MLflow": addresses.mlflow_port}
    for name, (log, _) in addresses.logs.items():
        print(f"starting {name} at {addresses.local}:{ports[name]}, log: {log}")
    print("this takes some seconds; Ctrl-C stops it", flush=True)


def what_to_type(addresses: ServerAddresses) -> str:
    """Return what each user types, and which files hold the passwords."""
    address = f"http://{addresses.public}:{addresses.mlflow_port}"
    lines = [f"MLflow answers at {address}, PostgreSQL at port {addresses.postgresql_port}"]
    for user in addresses.passwords.users():
        file = shlex.quote(str(addresses.folder / "users" / user))
        lines += [
            f"\n{user} types the following; the file, or a copy of it, holds the password:\n",
            f"    export MLFLOW_TRACKING_URI={address} MLFLOW_TRACKING_USERNAME={user}",
            f"    export MLFLOW_TRACKING_PASSWORD=$(cat {file})",
            "    export PGPASSWORD=$MLFLOW_TRACKING_PASSWORD",
            "    python -m experiments.sweep --storage "
            + addresses.database(user, "optuna", addresses.public),
        ]
    lines.append(f"\nMLflow's user admin: password in {addresses.folder / 'passwords' / 'admin'}")
    if ipaddress.ip_address(socket.gethostbyname(addresses.host)).is_loopback:
        lines.append(f"only this machine reaches {addresses.host}: change it with --host")
    return "\n".join([*lines, "Ctrl-C stops both"])
