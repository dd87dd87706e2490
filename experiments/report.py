"""Report on a sweep or a comparison of losses: `python -m experiments.report --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import add_flag, add_storage_flag, check_out, report_folder
from tracking.cli import Parser, run_command
from tracking.files import check_folder, writing

# pandas, Matplotlib and Optuna are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    from optuna import Study


def build_parser() -> Parser:
    """Return the parser of the command line; it raises ValueError for what is wrong."""
    parser = Parser(
        prog="python -m experiments.report",
        description="Report on a sweep or a comparison, finished or not: a page that needs no "
        "network, the same as Markdown, and all data as CSV.",
        epilog="exit codes: 0 done; 2 bad input; 1 the disk or a database refused",
    )
    parser.add_argument("name", metavar="STUDY", help="the name of the sweep or comparison")
    add_storage_flag(parser)
    text = (
        "the folder to write report.html, report.md, data/ and figures/ to (default: a folder in "
        "reports, which has the study's name)"
    )
    add_flag(parser, "--out", None, text, type=Path, metavar="DIR")
    return parser


def _run(options: argparse.Namespace) -> None:
    out = options.out
    if out is None:
        out = report_folder(Path("reports"), options.name)
        check_out(out.parent, "--out")
    else:
        check_folder(out, option="--out")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import optuna

    from experiments.reporting.sweep_report import find_study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = find_study(options.name, options.storage)
    with writing("the report"):
        out.parent.mkdir(exist_ok=True)
    is_comparison = "plan" in study.user_attrs
    answer = _comparison(study, options.storage, out) if is_comparison else _sweep(study, out)
    print(*answer, sep="\n")
    print(f"report: {out / 'report.html'}")


def _comparison(study: Study, storage: str, out: Path) -> Sequence[str]:
    """Write the report of a comparison, and return its answer."""
    from experiments.comparison.assessment import assess
    from experiments.comparison.loading import load_results
    from experiments.reporting.rendering import write_report

    results = load_results(study.study_name, storage)
    assessment = assess(results)
    write_report(results, assessment, out)
    return assessment.statements[:2]


def _sweep(study: Study, out: Path) -> Sequence[str]:
    """Write the report of a sweep, and return its answer."""
    from experiments.reporting.rendering import write
    from experiments.reporting.sweep_report import make

    report = make(study)
    write(report, out)
    return report.answer


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a command line, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
