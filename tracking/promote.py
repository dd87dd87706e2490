"""Choose the champion of a registered model: `python -m tracking.promote --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from tracking.cli import Parser, confirm, run_command
from tracking.model_texts import summary
from tracking.registry import CHAMPION, Promotion, Registry, check_name
from tracking.store import reading
from tracking.text import printable


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
        help="the version to promote, whether it is better or not (default: the one with the "
        "highest validation accuracy on the champion's images)",
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
        help="promote even if the accuracies can't be compared, as when the present champion is of "
        "other data or another split; without it, a terminal is asked",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    check_name(options.name)
    if options.rollback and options.force:
        raise ValueError("--force is for promoting: --rollback compares nothing")
    with reading() as client:
        promotion = _done(Registry(client=client, name=options.name), options)
    if promotion is None:
        print("not promoted: nothing was done")
        return
    print(promotion)
    uri = shlex.quote(f"models:/{options.name}@{CHAMPION}")
    print(f"  predict:           python -m tracking.predict SOURCE --model {uri}")


def _done(registry: Registry, options: argparse.Namespace) -> Promotion | None:
    """Promote or roll back as the options say; None if the user does not want it."""
    if options.rollback:
        return registry.rollback()
    if options.run_id is not None:
        run = registry.client.get_run(options.run_id)
        if run.info.lifecycle_stage != "active":
            raise ValueError(f"run {options.run_id} is deleted: restore it, or choose another")
        return registry.promote_run(run, force=options.force)
    if options.version is not None:
        return registry.promote(options.version, force=options.force)
    return _promote_best(registry, force=options.force)


def _promote_best(registry: Registry, *, force: bool) -> Promotion | None:
    """Promote the best version; where it may be worse than the champion, ask."""
    from tracking.candidates import best_version

    best, others = best_version(registry)
    champion, tags = registry.champion(), registry.tags()
    if champion is not None:
        print(f"champion:   version {champion}: {printable(summary(tags[champion]))}")
    print(f"best:       version {best}: {printable(summary(tags[best]))}")
    if others:
        print(f"not compared: {others} on other images or without an accuracy; --version names one")
    is_better, why = registry.judge(tags[best])
    if best == champion or is_better or force:
        return registry.promote(best, force=force)
    assert champion is not None
    agreed = confirm(
        f"version {best} may be worse than version {champion}, {why}. Promote it?",
        otherwise=f"not promoted, {why}, so version {best} may be worse: --force promotes it "
        "anyway",
    )
    return registry.promote(best, force=True) if agreed else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
