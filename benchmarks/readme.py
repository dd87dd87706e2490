"""The README's result: figure and table of a comparison: `python -m benchmarks.readme --help`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from experiments.statistics import Assessment

FIGURES = Path(__file__).parent / "figures"
MINUS = str.maketrans("-", "−")


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
    from experiments.comparison import load_results
    from experiments.drawing import sheet
    from experiments.figures import LearningRates
    from experiments.statistics import assess

    results = load_results(options.name, options.storage)
    (FIGURES / "comparison.png").write_bytes(sheet(LearningRates(results)))
    assessment = assess(results)
    print(*assessment.statements, sep="\n")
    print(f"\n{table(assessment)}\n")
    print(*(f"- {caveat.text}" for caveat in assessment.warnings), "", sep="\n")
    print(*(f"{name}: {text}" for name, text in results.provenance.items()), sep="\n")


def table(assessment: Assessment) -> str:
    """Return a row for each loss, the winner first."""
    lead = assessment.differences.set_index("loss")
    lines = [
        f"| loss | learning rate | batch size | test accuracy, % | sd | {assessment.winner} is "
        "ahead by | p | negative log-likelihood | calibration error |",
        "|" + " --- |" * 9,
    ]
    for row in assessment.table.to_dict("records"):
        cells = [f"`{row['loss']}`", f"{row['learning_rate']:.3g}", f"{row['batch_size']}"]
        cells += [_interval(row, "accuracy", 100, ".2f"), f"{100 * row['accuracy_sd']:.2f}"]
        if row["loss"] in lead.index:
            pair = lead.loc[row["loss"]]
            ends = f"{100 * pair['low']:+.2f} to {100 * pair['high']:+.2f}"
            cells += [f"{100 * pair['difference']:+.2f} ({ends})", f"{pair['p_holm']:.2g}"]
        else:
            cells += ["–", "–"]
        cells += [_interval(row, measure, 1, ".3f") for measure in ("nll", "ece")]
        lines.append(f"| {' | '.join(cell.translate(MINUS) for cell in cells)} |")
    return "\n".join(lines)


def _interval(row: Mapping[Any, Any], measure: str, factor: float, digits: str) -> str:
    mean, low, high = (factor * row[f"{measure}_{end}"] for end in ("mean", "low", "high"))
    text = f"{mean:{digits}}"
    return text if pd.isna(low) else f"{text} ({low:{digits}} to {high:{digits}})"


if __name__ == "__main__":
    main()
