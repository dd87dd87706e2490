"""The parameters that a study can search: the one table that describes each of them.

Flags and their help, checks, studies' settings, names of runs, progress, tables and reports read
`PARAMETERS`. To search another field of `TrainConfig`, add it there.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import Trial

Configuration = Mapping[str, Any]
"""Values by fields of `TrainConfig`: the searched ones, and the seed if it varies."""


@dataclass(frozen=True)
class Choices:
    """A set of values, all equally likely."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value of a trial."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class LogRange:
    """The numbers from `low` to `high`, log-uniform."""

    low: float
    high: float

    @property
    def values(self) -> tuple[float, ...]:
        """Both ends."""
        return self.low, self.high

    def suggest(self, trial: Trial, name: str) -> float:
        """Return the value of a trial."""
        return trial.suggest_float(name, self.low, self.high, log=True)


Domain = Choices | LogRange


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of `TrainConfig` that a study can search."""

    name: str  # the field
    label: str  # its name in tables, figures and sentences
    short: str = ""  # its name in run names and progress; empty if the value needs none
    form: str = ""  # the format specification of a value
    width: int = 8  # width of its values in progress
    help: str
    metavar: str

    def text(self, value: Any) -> str:
        """Return a value as text: a dash if it is missing, as a trial's that another tool ended."""
        return "–" if value is None or value != value else f"{value:{self.form}}"


@dataclass(frozen=True, kw_only=True)
class ChoiceParameter(Parameter):
    """A parameter with a set of values, given by one flag."""

    plural: str  # the plural of its name: the flag, and the key in a study's settings
    default: tuple[Any, ...]  # the default values; empty: not searched by default
    kind: type = str
    all_of: str = ""  # the module and table whose keys `all` means, if `all` is allowed

    @property
    def flag(self) -> str:
        """The flag that gives the values."""
        return f"--{self.plural.replace('_', '-')}"

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add its flag."""
        words = [str(value) for value in self.default]
        default = f"default: {' '.join(words)}" if words else "default: not searched"
        text = f"{self.help} ({default})"
        group.add_argument(self.flag, nargs="+", default=words, metavar=self.metavar, help=text)

    def domain(self, options: argparse.Namespace) -> Choices | None:
        """Return the values of a command line; None if the parameter is not searched."""
        words = split_words(getattr(options, self.plural))
        if self.all_of and words == ["all"]:
            module, _, table = self.all_of.partition(":")
            from importlib import import_module

            return Choices(tuple(getattr(import_module(module), table)))
        if not words and not self.default:
            return None
        return Choices(tuple(self._value(word) for word in words))

    def _value(self, word: str) -> Any:
        try:
            return self.kind(word)
        except ValueError:
            wanted = "integers ≥ 1" if self.kind is int else "numbers"
            raise ValueError(f"{self.flag} takes {wanted}, not {word!r}") from None

    def check(self, domain: Domain) -> None:
        """Raise ValueError unless there are values, without repetition."""
        if not domain.values:
            raise ValueError(f"{self.flag} needs at least one value")
        if len(set(domain.values)) < len(domain.values):
            raise ValueError(f"{self.flag} has a value twice: {' '.join(map(str, domain.values))}")

    def to_settings(self, domain: Domain) -> dict[str, Any]:
        """Return the entry of its values in a study's settings."""
        return {self.plural: domain.values}

    def from_settings(self, settings: Mapping[str, Any]) -> Choices | None:
        """Return its values in a study's settings, None if there are none."""
        return Choices(tuple(settings[self.plural])) if self.plural in settings else None


@dataclass(frozen=True, kw_only=True)
class LogRangeParameter(Parameter):
    """A parameter with a range of numbers, given by two flags."""

    default: LogRange | None  # the default range; None: not searched by default

    def flags(self) -> tuple[str, str]:
        """The flags of its lower and its upper end."""
        flag = f"--{self.name.replace('_', '-')}"
        return f"{flag}-min", f"{flag}-max"

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the flags of both ends."""
        ends = (None, None) if self.default is None else self.default.values
        default = "default: not searched" if self.default is None else "default: %(default)s"
        texts = f"lower end of the log-uniform range of {self.help}", "upper end of that range"
        for flag, end, text in zip(self.flags(), ends, texts, strict=True):
            text = f"{text} ({default})"
            group.add_argument(flag, type=float, default=end, metavar=self.metavar, help=text)

    def domain(self, options: argparse.Namespace) -> LogRange | None:
        """Return the range of a command line; None if the parameter is not searched."""
        low, high = (getattr(options, f"{self.name}_{end}") for end in ("min", "max"))
        if low is None and high is None:
            return None
        if low is None or high is None:
            raise ValueError(f"{' and '.join(self.flags())} belong together: give both")
        return LogRange(low, high)

    def check(self, domain: Domain) -> None:
        """Raise ValueError unless the ends are finite, > 0 and in order."""
        low, high = domain.values
        for flag, value in zip(self.flags(), (low, high), strict=True):
            if not 0 < value < math.inf:
                raise ValueError(f"{flag} must be finite and > 0, not {value!r}")
        if low >= high:
            lower, upper = self.flags()
            raise ValueError(f"{lower} {low!r} must be smaller than {upper} {high!r}")

    def to_settings(self, domain: Domain) -> dict[str, Any]:
        """Return the entries of its range in a study's settings."""
        low, high = domain.values
        return {f"{self.name}_min": low, f"{self.name}_max": high}

    def from_settings(self, settings: Mapping[str, Any]) -> LogRange | None:
        """Return its range in a study's settings, None if there is none."""
        key = f"{self.name}_min"
        return LogRange(settings[key], settings[f"{self.name}_max"]) if key in settings else None


PARAMETERS: tuple[ChoiceParameter | LogRangeParameter, ...] = (
    ChoiceParameter(
        name="loss",
        label="loss",
        width=15,
        help="loss functions, or all; they are listed below",
        metavar="LOSS",
        plural="losses",
        default=("l1", "mse", "cross_entropy"),
        all_of="cnn.losses:LOSSES",
    ),
    LogRangeParameter(
        name="learning_rate",
        label="learning rate",
        short="lr",
        form=".3g",
        help="peak learning rates",
        metavar="RATE",
        default=LogRange(0.001, 1.0),
    ),
    ChoiceParameter(
        name="batch_size",
        label="batch size",
        short="bs",
        form=".0f",  # of a column with a missing value, pandas makes floats
        width=4,
        help="batch sizes, in images a step",
        metavar="IMAGES",
        plural="batch_sizes",
        default=(16, 32, 64, 128),
        kind=int,
    ),
)

BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def searched(settings: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what is searched by a study with these settings, by names of parameters."""
    domains = {each.name: each.from_settings(settings) for each in PARAMETERS}
    return {name: domain for name, domain in domains.items() if domain is not None}


def run_name(number: int, values: Configuration) -> str:
    """Return the name of a trial's run, such as `012 mse lr=0.0312 bs=64`."""
    parts = [f"{number:03d}"]
    for parameter in PARAMETERS:
        if parameter.name in values:
            text = parameter.text(values[parameter.name])
            parts.append(f"{parameter.short}={text}" if parameter.short else text)
    if "seed" in values:
        parts.append(f"seed={values['seed']}")
    return " ".join(parts)


def split_words(values: Sequence[str]) -> list[str]:
    """Return the values in words that are separated by spaces or commas."""
    return [part for value in values for part in re.split(r"[\s,]+", value) if part]
