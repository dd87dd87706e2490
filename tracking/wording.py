"""How numbers, shares and times are written for people."""

from __future__ import annotations

import math
import textwrap


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s: 1 epoch, 2 epochs."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def percent(share: float | None) -> str:
    """Return a share in percent, or a dash if there is none."""
    return "–" if share is None or not math.isfinite(share) else f"{share:.2%}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """Return how long something took: 5.8 s, or as `clock`."""
    return f"{seconds:.1f} s" if seconds < 99.95 else clock(seconds)


def wrapped(text: str, width: int | None) -> str:
    """Return a text whose lines are broken between words, to fit into a width, if there is one."""
    if width is None:
        return text
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    )


def labelled(label: str, text: str, width: int | None) -> str:
    """Return a line of what to do next, in several lines where the width needs it.

    A command is broken before an option, so that a shell takes it all the same.
    """
    line = f"  {label + ':':18s} {text}"
    if width is None or len(line) <= width:
        return line
    if not text.startswith("python -m"):
        return f"  {label}:\n{textwrap.indent(wrapped(text, width - 4), '    ')}"
    if len(text) + 4 > width:
        text = text.replace(" --run-id", " \\\n      --run-id")
    return f"  {label}:\n    {text}"


def narrowed(lines: str, width: int | None) -> str:
    """Return a label with lines beside it as they are, or with the lines below it if too wide."""
    if width is None or all(len(line) <= width for line in lines.splitlines()):
        return lines
    label, _, text = lines.partition(":")
    below = "\n".join(f"    {line.strip()}" for line in text.splitlines())
    return f"{label}:\n{below}"
