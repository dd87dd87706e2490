"""Report on a comparison of losses: `python -m experiments.report --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tracking.cli import Parser, run_command
from tracking.files import check_folder

# What is slow to import (pandas, Matplotlib, Optuna) is imported where it is needed: --help is not.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what is wrong with that is a ValueError."""
    parser = Parser(
        prog="python -m experiments.report",
        description="Report on a comparison of losses that experiments.compare made, as far as it "
        "has come: a page that needs no network, the same as Markdown, and all data as CSV.",
        epilog="exit codes: 0 done; 2 bad input; 1 the disk or a database said no",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="STUDY", help="the name of the comparison")
    parser.add_argument(
        "--storage",
        default="sqlite:///optuna.db",
        metavar="URL",
        help="the database of its studies (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="the folder to write report.html, report.md, data/ and figures/ to "
        "(default: %(default)s)",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    check_folder(options.out, option="--out")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import optuna

    from experiments.comparison.assessment import assess
    from experiments.comparison.results import load_results
    from experiments.reporting.rendering import write_report

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = load_results(options.name, options.storage)
    assessment = assess(results)
    write_report(results, assessment, options.out)
    for sentence in assessment.statements[:2]:
        print(sentence)
    print(f"report: {options.out / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report that a command line asks for, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
