"""Report on a comparison of losses: `python -m experiments.report --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import add_flag, add_storage_flag
from tracking.cli import Parser, run_command
from tracking.files import check_folder

# pandas, Matplotlib and Optuna are slow to import: each function imports what it needs.


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = Parser(
        prog="python -m experiments.report",
        description="Report on a comparison of losses that experiments.compare made, finished or "
        "not: a page that needs no network, the same as Markdown, and all data as CSV.",
        epilog="exit codes: 0 done; 2 bad input; 1 the disk or a database refused",
    )
    parser.add_argument("name", metavar="STUDY", help="the name of the comparison")
    add_storage_flag(parser)
    text = "the folder to write report.html, report.md, data/ and figures/ to"
    add_flag(parser, "--out", Path("report"), text, metavar="DIR")
    return parser


def _run(options: argparse.Namespace) -> None:
    check_folder(options.out, option="--out")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import optuna

    from experiments.comparison.assessment import assess
    from experiments.comparison.loading import load_results
    from experiments.reporting.rendering import write_report

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = load_results(options.name, options.storage)
    assessment = assess(results)
    write_report(results, assessment, options.out)
    print(*assessment.statements[:2], sep="\n")
    print(f"report: {options.out / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a command line, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
