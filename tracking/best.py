"""Print the best runs of an experiment: `python -m tracking.best --help`.

`import tracking.best` is quick: functions import MLflow and pandas when called.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tracking.cli import Parser, add_choice_flags, choice_filters, run_command
from tracking.run_search import model_uri
from tracking.selection import Choice, choose
from tracking.selection import best_run as best_run
from tracking.store import DEFAULT_METRIC
from tracking.text import escape_formula, printable

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run


def table(choice: Choice, top: int) -> list[dict[str, Any]]:
    """Return a row for each of the best runs, the best first."""
    return [_row(rank, run, choice.metric) for rank, run in enumerate(choice.ranked[:top], 1)]


def _row(rank: int, run: Run, metric: str) -> dict[str, Any]:
    tags, params = run.data.tags, run.data.params
    keys = dict.fromkeys([metric, DEFAULT_METRIC, "val/loss"])
    return {
        "rank": rank,
        "run": run.info.run_name,
        "run_id": run.info.run_id,
        "study": tags.get("study"),
        "trial": _number(tags.get("trial")),
        "loss": params.get("loss"),
        "learning_rate": _number(params.get("learning_rate")),
        "batch_size": _number(params.get("batch_size")),
        **{key: run.data.metrics.get(key) for key in keys},
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(),
        "model": model_uri(run),
    }


def _number(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            pass
    return text


def _as_table(rows: Sequence[dict[str, Any]]) -> str:
    hidden = {"started", "model"}  # they follow from the run's id, and make long lines
    shown = [{key: _shown(row[key]) for key in row if key not in hidden} for row in rows]
    return _frame(shown).to_string(index=False) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    # Users type the names: neither a terminal nor a spreadsheet may run them.
    safe = [
        {k: escape_formula(printable(v)) if isinstance(v, str) else v for k, v in row.items()}
        for row in rows
    ]
    return str(_frame(safe).to_csv(index=False, lineterminator="\n"))


def _as_json(rows: Sequence[dict[str, Any]]) -> str:
    # JSON has no NaN.
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    # JSON leaves some control characters that a terminal obeys, such as U+009B.
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    # As objects: pandas turns integers with gaps into floats.
    return pd.DataFrame(list(rows), dtype=object)


FORMATS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "table": _as_table,
    "csv": _as_csv,
    "json": _as_json,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Bad input is a ValueError."""
    parser = Parser(
        prog="python -m tracking.best",
        description="Print the best finished run of an MLflow experiment, why it is the best, and "
        "the runs after it. Pruned, diverged and failed runs, and runs without a model, are left "
        "out. Runs on another data set or another split are counted only: accuracies on other "
        "images can't be compared. Among equal runs, the loss that was started first wins, then "
        "its lower val/loss, then the earlier run.",
        epilog="exit codes: 0 done; 1 a disk is full, a database locked or read-only; 2 bad input, "
        "or no such run",
    )
    add_choice_flags(parser)
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        metavar="N",
        help="the number of runs to print (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="table",
        help="csv and json have all digits, the time of the start and the model's URI as well; "
        "their explanation goes to standard error (default: %(default)s)",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise ValueError(f"--top must be ≥ 1, not {options.top}")
    filters = choice_filters(options)
    choice = choose(options.experiment or None, metric=options.metric, top=options.top, **filters)
    about = sys.stdout if options.format == "table" else sys.stderr
    print(choice, *choice.notes(), sep="\nnote: ", file=about)
    print(FORMATS[options.format](table(choice, options.top)), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    return run_command(build_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
