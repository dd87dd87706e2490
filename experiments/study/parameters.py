"""The parameters that a study can search: all that is said of one, once, for all who read it.

Flags and their help, checks, a study's identity, names of runs, progress, tables and reports read
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
"""Values by fields of `TrainConfig`: the searched ones, and the seed where it varies."""


@dataclass(frozen=True)
class Choices:
    """Some values, of which each is as likely as the next."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """Return the value of a trial."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class LogRange:
    """The numbers from `low` to `high`, whose logarithms are equally likely."""

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

    name: str
    """The field."""
    label: str
    """What it is called in tables, figures and sentences."""
    short: str = ""
    """What it is called in names of runs and in progress; nothing, if the value says it."""
    form: str = ""
    """How a value is written: a format specification of Python's."""
    width: int = 8
    """Of its values in progress."""
    help: str
    metavar: str

    def text(self, value: Any) -> str:
        """Return a value as people read it."""
        return f"{value:{self.form}}"


@dataclass(frozen=True, kw_only=True)
class ChoiceParameter(Parameter):
    """One that takes some values, given by one flag."""

    plural: str
    """Of its name: the flag, and the key of the values in a study's settings."""
    default: tuple[Any, ...]
    """Unless the user says otherwise; empty: the parameter is not searched then."""
    kind: type = str
    all_of: str = ""
    """Where `all` is taken: the module and the name of a table of all choices."""

    @property
    def flag(self) -> str:
        """The flag that gives the values."""
        return f"--{self.plural.replace('_', '-')}"

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag of its values."""
        words = [str(value) for value in self.default]
        default = f"default: {' '.join(words)}" if words else "default: it is not searched"
        group.add_argument(
            self.flag,
            nargs="+",
            default=words,
            metavar=self.metavar,
            help=f"{self.help} ({default})",
        )

    def domain(self, options: argparse.Namespace) -> Choices | None:
        """Return the values that a command line gives, None for none."""
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
        """Raise ValueError unless there are values, each once."""
        if not domain.values:
            raise ValueError(f"{self.flag} needs at least one value")
        if len(set(domain.values)) < len(domain.values):
            raise ValueError(f"{self.flag} has a value twice: {' '.join(map(str, domain.values))}")

    def identity(self, domain: Domain) -> dict[str, Any]:
        """Return what a study's settings say of its values."""
        return {self.plural: domain.values}

    def from_identity(self, settings: Mapping[str, Any]) -> Choices | None:
        """Return the values of which a study's settings say this."""
        return Choices(tuple(settings[self.plural])) if self.plural in settings else None


@dataclass(frozen=True, kw_only=True)
class LogRangeParameter(Parameter):
    """One that takes all numbers of a range, given by two flags."""

    default: LogRange | None
    """Unless the user says otherwise; None: the parameter is not searched then."""

    def flags(self) -> tuple[str, str]:
        """The flags that give its lower and its upper end."""
        flag = f"--{self.name.replace('_', '-')}"
        return f"{flag}-min", f"{flag}-max"

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the flags of both ends."""
        low, high = (None, None) if self.default is None else self.default.values
        default = "default: it is not searched" if self.default is None else "default: %(default)s"
        lower, upper = self.flags()
        group.add_argument(
            lower,
            type=float,
            default=low,
            metavar=self.metavar,
            help=f"lower end of the log-uniform range of {self.help} ({default})",
        )
        group.add_argument(
            upper,
            type=float,
            default=high,
            metavar=self.metavar,
            help=f"upper end of that range ({default})",
        )

    def domain(self, options: argparse.Namespace) -> LogRange | None:
        """Return the range that a command line gives, None for none."""
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

    def identity(self, domain: Domain) -> dict[str, Any]:
        """Return what a study's settings say of its range."""
        return {
            f"{self.name}_{end}": value
            for end, value in zip(("min", "max"), domain.values, strict=True)
        }

    def from_identity(self, settings: Mapping[str, Any]) -> LogRange | None:
        """Return the range of which a study's settings say this."""
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
        form="d",
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
    """Return what is searched, by the name of each parameter, as a study's settings say it."""
    domains = {each.name: each.from_identity(settings) for each in PARAMETERS}
    return {name: domain for name, domain in domains.items() if domain is not None}


def run_name(number: int, values: Configuration) -> str:
    """Return what the run of a trial is called, say `012 mse lr=0.0312 bs=64`.

    Args:
        number: of the trial.
        values: of the searched parameters, and of the seed if it varies.
    """
    parts = [f"{number:03d}"]
    for parameter in PARAMETERS:
        if parameter.name in values:
            text = parameter.text(values[parameter.name])
            parts.append(f"{parameter.short}={text}" if parameter.short else text)
    if "seed" in values:
        parts.append(f"seed={values['seed']}")
    return " ".join(parts)


def split_words(values: Sequence[str]) -> list[str]:
    """Return the values of a list, separated by spaces or commas, as words or in one string."""
    return [part for value in values for part in re.split(r"[\s,]+", value) if part]
