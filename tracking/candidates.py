"""The version of a registered model that `tracking.promote` makes champion on its own."""

from __future__ import annotations

from collections.abc import Mapping

from tracking.model_texts import SAME, number_of
from tracking.ranking import Entry, best_first
from tracking.registry import Registry
from tracking.store import DEFAULT_METRIC


def best_version(registry: Registry) -> tuple[int, int]:
    """Return the best version on the champion's images, and how many are on other images.

    Best is the highest validation accuracy; the champion wins a tie. Without a champion, or if its
    images are not known, the images are those of the newest version that has an accuracy.

    Raises:
        ValueError: there is no version with an accuracy.
    """
    champion, versions = registry.champion(), registry.tags()
    measured = {
        number: tags
        for number, tags in sorted(versions.items())
        if number_of(tags.get(DEFAULT_METRIC)) is not None
    }
    if not measured:
        what = f"no version with a {DEFAULT_METRIC}" if versions else "no version"
        raise ValueError(f"{registry.name} has {what}: --version or --run-id names a model")
    images = _images(versions.get(champion or 0, {})) or _images(measured[max(measured)])
    numbers = [number for number, tags in measured.items() if _images(tags) == images]
    if not numbers:  # the champion, whose accuracy is not known, is the only one on its images
        images = _images(measured[max(measured)])
        numbers = [number for number, tags in measured.items() if _images(tags) == images]
    order = best_first([_entry(number, measured[number]) for number in numbers])
    best = numbers[order[0]]
    if champion in numbers and measured[champion][DEFAULT_METRIC] == measured[best][DEFAULT_METRIC]:
        best = champion
    return best, len(versions) - len(numbers)


def _images(tags: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return what determines the images of the accuracy, None if it is not known."""
    return tuple(tags[key] for key in SAME) if set(SAME) <= set(tags) else None


def _entry(number: int, tags: Mapping[str, str]) -> Entry:
    return Entry(
        value=float(tags[DEFAULT_METRIC]),
        loss=tags.get("loss"),
        val_loss=number_of(tags.get("val/loss")),
        start=number,
    )
