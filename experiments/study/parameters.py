"""The parameters of a training: the one table that describes each of them.

Flags and their help, checks, studies' settings, names of runs, progress, tables and reports read
`PARAMETERS`. Any of them can be searched. To add one, add a field to `TrainConfig`, and a row here.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnn.references import is_reference
from experiments.study.domains import Choices, Domain, Range, split_words

Configuration = Mapping[str, Any]
"""Values by fields of `TrainConfig`: the searched ones, and the seed if it varies."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of `TrainConfig` that a study can search, or set to one value."""

    name: str  # the field
    short: str = ""  # its name in run names and progress; empty if the value needs none
    form: str = ""  # the format specification of a value
    width: int = 8  # width of its values in progress
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


# In this order they are suggested: a parameter may depend on those above it.
PARAMETERS: tuple[Parameter, ...] = (
    ChoiceParameter(
        name="loss",
        width=15,
        help="loss functions, or all; they are listed below; or package.module:loss, file.py:loss",
        metavar="LOSS",
        plural="losses",
        default=("l1", "mse", "cross_entropy"),
        all_of="cnn.losses:LOSSES",
    ),
    LogRangeParameter(
        name="learning_rate",
        short="lr",
        form=".3g",
        help="peak learning rates",
        metavar="RATE",
        default=Range(0.001, 1.0, log=True),
    ),
    ChoiceParameter(
        name="batch_size",
        short="bs",
        form=".0f",  # of a column with a missing value, pandas makes floats
        width=4,
        help="batch sizes, in images a step",
        metavar="IMAGES",
        plural="batch_sizes",
        default=(16, 32, 64, 128),
        kind=int,
    ),
    Parameter(
        name="network",
        width=12,
        help="the network: cnn, cnn_relu, resnet (ResNet-20), torchvision:MODEL, "
        "package.module:factory or file.py:factory; a factory takes num_classes, and image_size if "
        "it needs it",
        default="cnn",
    ),
    Parameter(
        name="optimizer",
        width=5,
        help="sgd has Nesterov momentum",
        choices=("sgd", "adam", "adamw"),
        default="sgd",
    ),
    Parameter(
        name="momentum",
        short="m",
        form=".3g",
        kind=float,
        metavar="SHARE",
        help="of sgd",
        default=0.9,
        applies=lambda values: values.get("optimizer", "sgd") == "sgd",
    ),
    Parameter(
        name="weight_decay",
        short="wd",
        form=".2g",
        kind=float,
        metavar="RATE",
        help="as the optimizer defines it",
        default=0.0,
    ),
    Parameter(
        name="schedule",
        width=9,
        help="how the learning rate changes during a trial",
        choices=("one_cycle", "cosine", "constant"),
        default="one_cycle",
    ),
    Parameter(
        name="warmup",
        short="warmup",
        form=".2g",
        width=5,
        kind=float,
        metavar="SHARE",
        help="share of the steps in which the learning rate rises (default: 0.3 for one_cycle, "
        "else 0)",
    ),
    Parameter(
        name="label_smoothing",
        short="ls",
        form=".2g",
        width=5,
        kind=float,
        metavar="SHARE",
        help="share of each label that is spread over all classes",
        default=0.0,
    ),
    Parameter(
        name="augment",
        width=9,
        help="random changes of the training images: mirrored; and shifted by up to an eighth",
        choices=("none", "flip", "flip_crop"),
        default="none",
    ),
    Parameter(
        name="precision",
        width=8,
        help="of the network's arithmetic; auto is bfloat16 where the processor is fast at it",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
    ),
)

BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def parse_vary(texts: Sequence[str], options: argparse.Namespace) -> dict[str, Domain]:
    """Return the domains that `--vary` gives, by names of parameters.

    Raises:
        ValueError: there is no such parameter, or it is given twice, or by its own flag as well.
    """
    domains: dict[str, Domain] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ValueError(f"--vary takes NAME=LOW..HIGH[:log] or NAME=A,B,C, not {text!r}")
        if name not in BY_NAME:
            close = difflib.get_close_matches(name, BY_NAME, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"--vary: there is no parameter {name!r}{hint}: choose one of {', '.join(BY_NAME)}"
            )
        if name in domains:
            raise ValueError(f"--vary {name} is given twice")
        if BY_NAME[name].is_given(options):
            raise ValueError(
                f"{name} is given by --vary and by {BY_NAME[name].flag}: give one of them"
            )
        domains[name] = BY_NAME[name].parse_domain(values)
    return domains


def networks(options: argparse.Namespace) -> list[str]:
    """Return the networks of a command line."""
    varied = parse_vary(options.vary, options).get("network")
    return [*varied.values] if varied else [options.network]


def references(options: argparse.Namespace) -> list[str]:
    """Return the references to a user's own networks and losses on a command line."""
    varied = parse_vary(options.vary, options).get("loss")
    losses = varied.values if varied else split_words(options.losses)
    values = [*networks(options), *losses]
    # torchvision:resnet18 has the same form.
    return [each for each in values if is_reference(each) and not each.startswith("torchvision:")]


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
