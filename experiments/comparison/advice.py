"""Advice that works: the comparison's last command, with another value of a flag."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from experiments.comparison.results import Results

_MODULE = ["-m", "experiments.compare"]


def continued(results: Results, flag: str, value: int) -> str:
    """Return the command that continues a comparison with more of something.

    It says --retest if models have seen the test split.
    """
    changes: dict[str, Sequence[str]] = {"--study": [results.name], flag: [str(value)]}
    if results.test_rounds:
        changes["--retest"] = []
    return _changed(results, changes)


def made_anew(results: Results, flag: str, *values: float) -> str:
    """Return the command of a comparison with other settings, which needs another name."""
    changes: dict[str, Sequence[str]] = {"--study": [next_name(results.name)]}
    if "; " in results.provenance.get("command", ""):  # the last one may have said less
        plan = results.plan
        changes["--losses"] = plan["losses"]
        grown = ("searches", "trials") if results.is_staged else ("repeats",)
        changes |= {f"--{name}": [str(plan[name])] for name in grown}
    changes[flag] = [f"{value:g}" for value in values]
    return _changed(results, changes, without="--retest")


def next_name(name: str) -> str:
    """Return a name like this with a number: `x`, `x-2`, `x-3`."""
    numbered = re.fullmatch(r"(.+)-([1-9]\d{0,3})", name)
    return f"{numbered[1]}-{int(numbered[2]) + 1}" if numbered else f"{name}-2"


def _changed(results: Results, changes: Mapping[str, Sequence[str]], without: str = "") -> str:
    """Return the last command with these flags and values; empty if none was recorded."""
    recorded = results.provenance.get("command", "")
    # Several commands are joined by semicolons.
    words = shlex.split(recorded[recorded.rfind("; python -m ") + 1 :].removeprefix(" "))
    if words[1:3] != _MODULE:
        return ""
    for flag in filter(None, (*changes, without)):
        words = _without(words, flag)
    for flag, values in changes.items():
        words += [flag, *values]
    return shlex.join(words)


def _without(words: Sequence[str], flag: str) -> list[str]:
    """Return words without a flag and its values."""
    kept: list[str] = []
    is_dropped = False
    for word in words:
        if word.startswith("--"):
            is_dropped = word.partition("=")[0] == flag
        if not is_dropped:
            kept.append(word)
    return kept
