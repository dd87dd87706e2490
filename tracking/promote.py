"""Choose the champion of a registered model: `python -m tracking.promote --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from tracking.cli import Parser, run_command
from tracking.registry import CHAMPION, Promotion, Registry, check_name
from tracking.store import reading


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Bad input is a ValueError."""
    parser = Parser(
        prog="python -m tracking.promote",
        description=f"Give the alias {CHAMPION} to a version of a registered model, or back to the "
        f"version that had it before. Then models:/NAME@{CHAMPION} names this version.",
        epilog="exit codes: 0 done; 1 a disk is full, a database locked or read-only; 2 bad input, "
        "or the data differ",
    )
    parser.add_argument("name", metavar="NAME", help="the registered model, say cnn-digits")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="the version to promote (default: the newest), whether it is better or not",
    )
    which.add_argument(
        "--run-id",
        metavar="ID",
        help="promote the model of this run, and register it first if it is new",
    )
    which.add_argument(
        "--rollback",
        action="store_true",
        help="go back to the version that was champion before the present one",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="promote even if the present champion is of other data or another split, so that the "
        "accuracies can't be compared",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    check_name(options.name)
    if options.rollback and options.force:
        raise ValueError("--force is for promoting: --rollback compares nothing")
    with reading() as client:
        print(_done(Registry(client=client, name=options.name), options))
    uri = shlex.quote(f"models:/{options.name}@{CHAMPION}")
    print(f"  predict:           python -m tracking.predict SOURCE --model {uri}")


def _done(registry: Registry, options: argparse.Namespace) -> Promotion:
    """Promote or roll back as the options say."""
    if options.rollback:
        return registry.rollback()
    if options.run_id is not None:
        run = registry.client.get_run(options.run_id)
        if run.info.lifecycle_stage != "active":
            raise ValueError(f"run {options.run_id} is deleted: restore it, or choose another")
        return registry.promote_run(run, force=options.force)
    version = options.version
    if version is None:
        versions = registry.versions()
        if not versions:
            raise ValueError(f"{registry.name} has no version: --run-id ID makes one")
        version = versions[-1]
    return registry.promote(version, force=options.force)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
