"""The options of a command in a TOML file: `--config` reads it, `--print-config` writes it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn.references import did_you_mean
from experiments.study.parameters import BY_NAME
from tracking.cli import Parser
from tracking.errors import without_passwords
from tracking.text import printable

_OWN = ("help", "config", "print_config")
_NOT_OF_THE_STUDY = ("quiet", "json")
"""Options that a file may have, but that are not written to one."""


class ConfigParser(Parser):
    """A parser with `--config FILE` and `--print-config`. The command line overrides the file."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="read options from a TOML file, each by its name; the command line overrides it",
        )
        self.add_argument(
            "--print-config", action="store_true", help="print all options as such a file, and exit"
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options of a command line and of its file."""
        words = list(sys.argv[1:] if args is None else args)
        given = self._given(words)
        if given.config is not None:
            told = _read(given.config)
            told = _not_given(told, given)
            words = [*self.words(told, repr(str(given.config))), *words]
        options = super().parse_args(words, namespace)
        if options.print_config:
            print(self.dumps(options), end="")
            raise SystemExit(0)
        options.options = self.dumps(options)
        return options

    def _given(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the options that are on a command line, without those of defaults."""
        unset = {action.dest: None for action in self._actions if action.dest not in _OWN}
        given: argparse.Namespace = super().parse_args(
            words, argparse.Namespace(**unset | {"vary": []})
        )
        return given

    def words(self, told: Mapping[str, Any], where: str) -> Iterator[str]:
        """Yield the command line of options by their names; `where` they stand is for messages.

        Raises:
            ValueError: there is no such option, or its value is of another type.
        """
        actions = {action.dest: action for action in self._actions if action.dest not in _OWN}
        for key, value in told.items():
            name = key.replace("-", "_")
            if name not in actions:
                known = [dest.replace("_", "-") for dest in actions]
                hint = did_you_mean(name.replace("_", "-"), known)
                raise ValueError(f"{where} has an unknown option {key!r}{hint}")
            yield from _words_of(actions[name], key, value, where)

    def dumps(self, options: argparse.Namespace) -> str:
        """Return options as a file, without passwords."""
        lines = [f"# {self._command(options)}"]
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if action.dest in (*_OWN, *_NOT_OF_THE_STUDY, "vary") or value is None:
                continue
            lines.append(f"{action.dest.replace('_', '-')} = {_toml(value)}")
        if getattr(options, "vary", None):
            pairs = (text.partition("=") for text in options.vary)
            lines += ["", "[vary]", *(f"{name} = {_toml(values)}" for name, _, values in pairs)]
        return "\n".join(lines) + "\n"

    def _command(self, options: argparse.Namespace) -> str:
        """Return the shortest command line with these options, without passwords."""
        words = self.prog.split()
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if action.dest in _OWN or value in (None, action.default):
                continue
            flag = action.option_strings[-1]
            if action.dest == "vary":
                words += [word for text in value for word in (flag, text)]
            elif action.nargs == 0:
                words.append(flag)
            else:
                words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
        return printable(without_passwords(shlex.join(words)))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read --config {str(file)!r}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {str(file)!r} is no TOML: {error}") from error


def _not_given(told: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a file which the command line does not give in any form."""
    others = {name: value for name, value in vars(given).items() if name not in (*_OWN, "vary")}
    on_line = {name for name, value in others.items() if value is not None}
    varied = {text.partition("=")[0].strip().replace("-", "_") for text in given.vary}
    rest = {key: value for key, value in told.items() if key.replace("-", "_") not in on_line}
    vary = told.get("vary", {})
    if isinstance(vary, Mapping):
        fixed = {name for name, each in BY_NAME.items() if on_line.intersection(each.dests)}
        rest["vary"] = {name: vary[name] for name in vary if name not in varied | fixed}
    replaced = {dest for name in varied & set(BY_NAME) for dest in BY_NAME[name].dests}
    return {key: rest[key] for key in rest if key.replace("-", "_") not in replaced}


def _words_of(action: argparse.Action, key: str, value: Any, where: str) -> Iterator[str]:
    """Yield the words of an option in a file; ValueError if its value is of another type."""
    flag = action.option_strings[-1]
    if action.dest == "vary":
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise _wrong_type(where, key, "a table of texts such as momentum = '0.8..0.99'", value)
        yield from (f"{flag}={name}={text}" for name, text in value.items())
    elif action.nargs == 0:
        if not isinstance(value, bool):
            raise _wrong_type(where, key, "true or false", value)
        yield from [flag] * value
    elif action.nargs == "+":
        if not isinstance(value, list) or any(isinstance(each, bool | dict) for each in value):
            raise _wrong_type(where, key, "a list", value)
        yield from (flag, *map(str, value))
    else:
        kinds = {int: (int, "an integer"), float: (int | float, "a number")}
        kind, wanted = kinds.get(action.type, (str, "a text"))  # type: ignore[call-overload]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _wrong_type(where, key, wanted, value)
        yield f"{flag}={value}"


def _wrong_type(where: str, key: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where}: {key} must be {wanted}, not {value!r}")


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):  # of words
        return f"[{', '.join(each if each.isdecimal() else _toml(each) for each in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML string, but for this character.
    return json.dumps(without_passwords(str(value))).replace("\x7f", "\\u007F")
