"""The README's result: a figure and a table of a sweep, from what it recorded in MLflow.

    python -m benchmarks.readme --study NAME [--experiment cnn-sweep]

writes benchmarks/figures/sweep.png and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

FIGURES = Path(__file__).parent / "figures"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P"]


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", required=True, metavar="NAME")
    parser.add_argument("--experiment", default="cnn-sweep", metavar="NAME")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--rows", type=int, default=8, help="of the table (default: %(default)s)")
    options = parser.parse_args()
    trials = read_trials(options.experiment, options.study)
    FIGURES.mkdir(exist_ok=True)
    draw(trials, options.title, FIGURES / "sweep.png")
    print(markdown(trials, options.rows))


def read_trials(experiment: str, study: str) -> pd.DataFrame:
    """Return a row for each trial of a study, the best first."""
    import mlflow

    runs = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.study = '{study}' and tags.role = 'trial'",
        output_format="pandas",
    )
    trials = pd.DataFrame(
        {
            "trial": runs["tags.trial"].astype(int),
            "outcome": runs["tags.outcome"],
            "loss": runs["params.loss"],
            "learning rate": runs["params.learning_rate"].astype(float),
            "batch size": runs["params.batch_size"].astype(int),
            "validation accuracy": runs["metrics.val/accuracy"],
            "images/s": runs["metrics.time/images_per_second"],
        }
    )
    last = trials["outcome"] != "complete"
    return trials.assign(last=last).sort_values(
        ["last", "validation accuracy"], ascending=[True, False]
    )


def draw(trials: pd.DataFrame, title: str, file: Path) -> None:
    """Draw accuracy against learning rate: a colour a loss, a shape a batch size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colors = dict(zip(sorted(trials["loss"].unique()), COLORS, strict=False))
    markers = dict(zip(sorted(trials["batch size"].unique()), MARKERS, strict=False))
    for row in trials.to_dict("records"):
        complete = row["outcome"] == "complete"
        axes.plot(
            row["learning rate"],
            row["validation accuracy"],
            marker=markers[row["batch size"]],
            color=colors[row["loss"]],
            markerfacecolor=colors[row["loss"]] if complete else "none",
            markersize=8,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (peak of the schedule)")
    axes.set_ylabel("validation accuracy, last epoch trained")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.set_title(title)

    def entry(label: str, **look: Any) -> Line2D:
        return Line2D([], [], linestyle="none", markersize=8, label=label, **look)

    entries = [entry(loss, marker="o", color=color) for loss, color in colors.items()]
    entries += [
        entry(f"batch size {size}", marker=marker, color="grey") for size, marker in markers.items()
    ]
    entries.append(entry("pruned or diverged", marker="o", color="grey", markerfacecolor="none"))
    figure.legend(handles=entries, loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def markdown(trials: pd.DataFrame, rows: int) -> str:
    """Return the best trials as a Markdown table, and how many came to what."""
    shown = trials.drop(columns="last").head(rows)
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + " --- |" * len(shown.columns)]
    for row in shown.to_dict("records"):
        row["learning rate"] = f"{row['learning rate']:.4g}"
        row["validation accuracy"] = f"{row['validation accuracy']:.2%}"
        row["images/s"] = f"{row['images/s']:,.0f}"
        lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
    outcomes = trials["outcome"].value_counts()
    lines.append("\n" + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
