"""The result in docs/benchmarks/cifar10.md and README: `python -m benchmarks.readme --help`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import markdown

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment

FIGURES = Path(__file__).parent / "figures"


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description="Draw benchmarks/figures/comparison.png from what a comparison recorded, and "
        "print its answer and its table as Markdown.",
    )
    parser.add_argument("name", help="of the comparison")
    parser.add_argument("--storage", default="sqlite:///optuna.db", metavar="URL")
    options = parser.parse_args()

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from experiments.comparison.assessment import assess
    from experiments.comparison.results import load_results
    from experiments.reporting.figures import LearningRates
    from experiments.reporting.small_multiples import draw_png

    results = load_results(options.name, options.storage)
    (FIGURES / "comparison.png").write_bytes(draw_png(LearningRates(results)))
    assessment = assess(results)
    print(*assessment.statements, sep="\n")
    print(f"\n{table(assessment)}\n")
    print(*(f"- {caveat.text}" for caveat in assessment.warnings), "", sep="\n")
    print(*(f"{name}: {text}" for name, text in results.provenance.items()), sep="\n")


def table(assessment: Assessment) -> str:
    """Return a row for each loss, the winner first."""
    from experiments.reporting.parts import interval, lead, number

    pairs = {pair["loss"]: pair for pair in assessment.differences.to_dict("records")}
    rows = []
    for row in assessment.table.to_dict("records"):
        pair = pairs.get(row["loss"])
        rows.append(
            [
                f"`{row['loss']}`",
                number(row["learning_rate"], ".3g"),
                number(row["batch_size"], ".0f"),
                interval(row, "accuracy", 100, ".2f"),
                number(100 * row["accuracy_sd"], ".2f"),
                *([lead(pair), number(pair["p_holm"], ".2g")] if pair else ["–", "–"]),
                *(interval(row, measure, 1, ".3f") for measure in ("nll", "ece")),
            ]
        )
    header = ["loss", "learning rate", "batch size", "test accuracy, %", "sd"]
    header += [f"{assessment.winner} is ahead by", "p"]
    return markdown([*header, "negative log-likelihood", "calibration error"], rows)


if __name__ == "__main__":
    main()
