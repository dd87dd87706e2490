"""Report on a file of predictions of labelled images: `python -m tracking.report --help`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tracking.cli import Parser, run_command
from tracking.evaluation.report import FILES, NAME_LENGTH, Subject, check_run, data_name, make
from tracking.files import check_folder
from tracking.prediction.formats import format_of
from tracking.progress import say_start


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Bad input is a ValueError."""
    parser = Parser(
        prog="python -m tracking.report",
        description="Report on predictions of labelled images: accuracy, precision and recall with "
        "95 % intervals, confusion matrix, calibration.",
        epilog="exit codes: 0 done; 2 bad input, or no image is labelled; 1 the disk or the server "
        "failed",
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a file of tracking.predict: .csv, .parquet or .jsonl, with a column label",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help=f"the folder to write {', '.join(FILES)} to (default: %(default)s)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="the name of the images in the run (default: that of FILE)",
    )
    parser.add_argument("--run-id", metavar="ID", help="the MLflow run that the model came from")
    parser.add_argument(
        "--log",
        action="store_true",
        help="log metrics report/NAME/… and files reports/NAME/ into that run",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.log and not options.run_id:
        raise ValueError("--log needs the run to log into: --run-id ID")
    if options.name and not re.fullmatch(rf"\w[\w.-]{{,{NAME_LENGTH - 1}}}", options.name):
        raise ValueError(
            f"--name takes letters, digits, . _ and -, {NAME_LENGTH} at most: not {options.name!r}"
        )
    format_of(options.file, "a file of predictions")
    if not options.file.is_file():
        raise ValueError(f"there is no file {str(options.file)!r}")
    check_folder(options.out, option="--out")
    if options.log:
        check_run(options.run_id)
    say_start(f"reading {str(options.file)!r}")
    name = options.name or data_name(str(options.file))
    subject = Subject(name=name, source=str(options.file), run_id=options.run_id or None)
    make(options.file, subject, options.out, is_logged=options.log)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
