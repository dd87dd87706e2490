"""What a parameter of the training is: its flags, its texts, and how its values are searched."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.study.domains import Choices, Domain, Range, split_words

Configuration = Mapping[str, Any]
"""Values by fields of `TrainConfig`: the searched ones, and the seed if it varies."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of `TrainConfig` that a study can search, or set to one value."""

    name: str  # the field
    short: str = ""  # its name in run names and progress; empty if the value needs none
    form: str = ""  # the format specification of a value
    kind: type = str
    help: str  # what the flag of one value says
    metavar: str = "NAME"
    choices: tuple[str, ...] = ()  # the values of a flag of one value, if it takes only these
    default: Any = None  # what that flag says by default, if the field's own default is not that
    applies: Callable[[Configuration], bool] = lambda _: True
    """Whether a training with these values of earlier parameters depends on it."""

    @property
    def label(self) -> str:
        """Its name in tables, figures and sentences."""
        return self.name.replace("_", " ")

    @property
    def is_searched_by_default(self) -> bool:
        """Whether a study searches it unless told otherwise."""
        return isinstance(self, ChoiceParameter | LogRangeParameter)

    @property
    def flag(self) -> str:
        """The flag that sets it to one value."""
        return f"--{self.name.replace('_', '-')}"

    def text(self, value: Any) -> str:
        """Return a value as text: a dash if it is missing, as where it does not apply."""
        return "–" if value is None or value != value else f"{value:{self.form}}"

    def parse(self, word: str, flag: str) -> Any:
        """Return the value of a word on the command line; ValueError if it is of another type."""
        try:
            return self.kind(word)
        except ValueError:
            wanted = "integers ≥ 1" if self.kind is int else "numbers"
            raise ValueError(f"{flag} takes {wanted}, not {word!r}") from None

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag of one value."""
        shown = "" if self.default is None else " (default: %(default)s)"
        options: dict[str, Any] = {"type": self.kind, "metavar": self.metavar}
        if self.choices:
            options = {"choices": self.choices}
        group.add_argument(self.flag, default=self.default, help=f"{self.help}{shown}", **options)

    def domain(self, options: argparse.Namespace) -> Domain | None:  # noqa: ARG002
        """Return what is searched by its own flags, None for nothing."""
        return None

    def is_given(self, options: argparse.Namespace) -> bool:
        """Return whether its own flags have another value than their default."""
        return bool(getattr(options, self.name) != self.default)

    @property
    def dests(self) -> tuple[str, ...]:
        """The names of its own flags' values."""
        return (self.name,)

    def check(self, domain: Domain, flags: tuple[str, str] | None = None) -> None:
        """Raise ValueError unless the values differ, or the ends are in order.

        Whether the values are allowed is checked with the whole configuration.
        """
        if isinstance(domain, Choices):
            if len(set(domain.values)) < len(domain.values):
                values = " ".join(map(str, domain.values))
                raise ValueError(f"{self.flags_of_values()} has a value twice: {values}")
            return
        low, high = domain.values
        lower, upper = flags or (f"--vary {self.name}: the lower end", "the upper end")
        for flag, value in zip((lower, upper), (low, high), strict=True):
            if not math.isfinite(value) or (domain.log and value <= 0):
                allowed = "finite and > 0" if domain.log else "finite"
                raise ValueError(f"{flag} must be {allowed}, not {value!r}")
        if low >= high:
            raise ValueError(f"{lower} {low!r} must be smaller than {upper} {high!r}")

    def flags_of_values(self) -> str:
        """Return the flag that gives several values."""
        return f"--vary {self.name}"

    def to_settings(self, domain: Domain) -> dict[str, Any]:
        """Return the entries of a domain in a study's settings."""
        return {f"vary_{self.name}": str(domain)}

    def from_settings(self, settings: Mapping[str, Any]) -> Domain | None:
        """Return the domain in a study's settings, None if it is not searched."""
        text = settings.get(f"vary_{self.name}")
        return None if text is None else self.parse_domain(text)

    def parse_domain(self, text: str) -> Domain:
        """Return the domain in a text such as `0.8..0.99`, `0.001..1:log` or `a,b,c`."""
        numbers, _, scale = text.partition(":")
        if self.kind is str or ".." not in numbers:
            values = tuple(self.parse(word, f"--vary {self.name}") for word in split_words([text]))
            if not values:
                raise ValueError(f"--vary {self.name} needs at least one value")
            return Choices(values)
        if scale not in ("", "log"):
            raise ValueError(f"--vary {self.name}={text}: a range ends in :log or in its upper end")
        low, high = numbers.split("..", 1)
        low, high = (self.parse(end, f"--vary {self.name}") for end in (low, high))
        return Range(low, high, log=scale == "log")


@dataclass(frozen=True, kw_only=True)
class ChoiceParameter(Parameter):
    """A parameter that is searched by default, over the values of a flag."""

    plural: str  # the plural of its name: the flag, and the key in a study's settings
    default: tuple[Any, ...]  # the default values
    all_of: str = ""  # the module and table whose keys `all` means, if `all` is allowed

    @property
    def flag(self) -> str:
        """The flag that gives the values."""
        return f"--{self.plural.replace('_', '-')}"

    def flags_of_values(self) -> str:
        """Return the flag that gives several values."""
        return self.flag

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add its flag."""
        words = [str(value) for value in self.default]
        text = f"{self.help} (default: {' '.join(words)})"
        group.add_argument(self.flag, nargs="+", default=words, metavar=self.metavar, help=text)

    def domain(self, options: argparse.Namespace) -> Choices:
        """Return the values of a command line."""
        words = split_words(getattr(options, self.plural))
        if self.all_of and words == ["all"]:
            module, _, table = self.all_of.partition(":")
            from importlib import import_module

            return Choices(tuple(getattr(import_module(module), table)))
        return Choices(tuple(self.parse(word, self.flag) for word in words))

    @property
    def dests(self) -> tuple[str, ...]:
        """The names of its own flags' values."""
        return (self.plural,)

    def is_given(self, options: argparse.Namespace) -> bool:
        """Return whether the flag has other values than its default."""
        return bool(getattr(options, self.plural) != [str(value) for value in self.default])

    def check(self, domain: Domain, flags: tuple[str, str] | None = None) -> None:
        """Raise ValueError unless there are values, without repetition."""
        if not domain.values:
            raise ValueError(f"{self.flag} needs at least one value")
        super().check(domain, flags)

    def to_settings(self, domain: Domain) -> dict[str, Any]:
        """Return the entry of its values in a study's settings."""
        is_range = isinstance(domain, Range)
        return super().to_settings(domain) if is_range else {self.plural: domain.values}

    def from_settings(self, settings: Mapping[str, Any]) -> Domain | None:
        """Return its values in a study's settings, None if there are none."""
        if self.plural in settings:
            return Choices(tuple(settings[self.plural]))
        return super().from_settings(settings)


@dataclass(frozen=True, kw_only=True)
class LogRangeParameter(Parameter):
    """A parameter that is searched by default, log-uniform between two flags."""

    default: Range  # the default range
    kind: type = float

    def flags(self) -> tuple[str, str]:
        """Return the flags of its lower and its upper end."""
        return f"{self.flag}-min", f"{self.flag}-max"

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the flags of both ends."""
        texts = f"lower end of the log-uniform range of {self.help}", "upper end of that range"
        for flag, end, text in zip(self.flags(), self.default.values, texts, strict=True):
            text = f"{text} (default: %(default)s)"
            group.add_argument(flag, type=float, default=end, metavar=self.metavar, help=text)

    def domain(self, options: argparse.Namespace) -> Range:
        """Return the range of a command line."""
        low, high = (getattr(options, f"{self.name}_{end}") for end in ("min", "max"))
        return Range(low, high, log=True)

    @property
    def dests(self) -> tuple[str, ...]:
        """The names of its own flags' values."""
        return f"{self.name}_min", f"{self.name}_max"

    def is_given(self, options: argparse.Namespace) -> bool:
        """Return whether the flags have another range than their default."""
        return self.domain(options) != self.default

    def check(self, domain: Domain, flags: tuple[str, str] | None = None) -> None:
        """Raise ValueError unless the ends are finite, > 0 and in order."""
        super().check(domain, flags or self.flags())

    def to_settings(self, domain: Domain) -> dict[str, Any]:
        """Return the entries of its range in a study's settings."""
        if isinstance(domain, Choices) or not domain.log:
            return super().to_settings(domain)
        return {f"{self.name}_min": domain.low, f"{self.name}_max": domain.high}

    def from_settings(self, settings: Mapping[str, Any]) -> Domain | None:
        """Return its range in a study's settings, None if there is none."""
        key = f"{self.name}_min"
        if key in settings:
            return Range(settings[key], settings[f"{self.name}_max"], log=True)
        return super().from_settings(settings)
