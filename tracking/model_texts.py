"""What a registered model and its versions say of themselves: tags and descriptions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracking.run_search import described
from tracking.store import DEFAULT_METRIC
from tracking.text import escaped_in_notes, shortened

if TYPE_CHECKING:
    from mlflow.entities import Run

# Two validation accuracies are of the same images if these params are equal.
SAME = {"dataset_digest": "data set", "seed": "split seed"}

_CONFIGURATION = {"loss": "loss", "learning_rate": "learning rate", "batch_size": "batch size"}
_PARAMS = ("dataset", *SAME, *_CONFIGURATION)
_LONGEST_TEXT = 200


def version_tags(run: Run) -> dict[str, str]:
    """Return the tags of a version: the origin of a run's model, and its metrics."""
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    about: dict[str, Any] = {
        "run": described(run),
        "study": tags.get("study"),
        "trial": tags.get("trial"),
        "git_commit": tags.get("mlflow.source.git.commit"),
    }
    about |= {key: params.get(key) for key in _PARAMS}
    about |= {key: value for key, value in metrics.items() if key.startswith(("train/", "val/"))}
    return {key: str(value) for key, value in about.items() if value is not None}


def number_of(text: str | None) -> float | None:
    """Return the number in a tag, None if there is none, or it is not finite."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def summary(about: Mapping[str, str]) -> str:
    """Return accuracy, configuration, data and origin of a version in a line, from its tags."""
    accuracy = number_of(about.get(DEFAULT_METRIC))
    parts = [f"{DEFAULT_METRIC} {'unknown' if accuracy is None else f'{accuracy:.4g}'}"]
    for key, label in _CONFIGURATION.items():
        if key in about:
            value = about[key] if key == "loss" else f"{number_of(about[key]) or math.nan:.4g}"
            parts.append(f"{label} {value}")
    if "dataset" in about:
        parts.append(f"trained on {about['dataset']}")
    if "study" in about:
        of_trial = f"trial {about['trial']} of " if "trial" in about else ""
        parts.append(f"{of_trial}study {about['study']}")
    return ", ".join(shortened(part, _LONGEST_TEXT) for part in parts)


def version_description(name: str, version: int, about: Mapping[str, str]) -> str:
    """Return the description of a version, in Markdown."""
    origin = f" It is the model of {escaped_in_notes(about['run'])}." if "run" in about else ""
    words = f"{escaped_in_notes(summary(about))}.{origin}"
    return f"{words}\n\n{_how_to_load(f'models:/{name}/{version}')}"


def model_description(name: str, about: Mapping[str, str]) -> str:
    """Return the description of a registered model, in Markdown."""
    data = escaped_in_notes(shortened(about.get("dataset", "images"), _LONGEST_TEXT))
    return (
        f"Classifies images like those of {data}. The best model of each sweep is a version. The "
        "version with the alias `champion` is the one to use: its validation accuracy is the "
        "highest of those on the same images, unless it was promoted by hand.\n\n"
        f"{_how_to_load(f'models:/{name}@champion')}"
    )


def _how_to_load(uri: str) -> str:
    return f"```sh\npython -m tracking.predict SOURCE --model {shlex.quote(uri)}\n```"
