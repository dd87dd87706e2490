"""The commands, a line each: `python -m experiments`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "experiments.sweep": "find the best loss, learning rate and batch size: an Optuna study",
    "experiments.compare": "compare losses, each tuned by repeated searches",
    "experiments.report": "write the report of a sweep or a comparison",
    "experiments.rerun": "train a trial again, or a variation of it",
    "experiments.servers": "start PostgreSQL and MLflow for a team",
    "experiments.clean": "list what is stored, and remove what is named",
    "tracking.predict": "predict images with the best run's model",
    "tracking.best": "list the best runs",
    "tracking.promote": "make a version of a registered model the champion",
    "tracking.report": "write a report on predictions",
}
"""What each does. The first one is where to start."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands, and return the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] not in ("-h", "--help"):
        line = (
            f"python -m experiments: error: unrecognized arguments: {' '.join(arguments)}: it lists"
        )
        print(line, "the commands, say python -m experiments.sweep", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"python -m {name:{width}}  {what}")
    print("\nEach has --help. Start with the first; it takes one to two minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
