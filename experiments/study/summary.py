"""The description of a sweep's run, in Markdown: the answer, what was asked, what to type next."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cnn.data import Dataset
from experiments.study.domains import Domain, Range
from experiments.study.parameter_types import Parameter
from experiments.study.parameters import BY_NAME
from experiments.study.settings import Settings
from tracking.errors import without_passwords
from tracking.store import quoted
from tracking.text import escaped_in_notes, printable, shortened
from tracking.views import View, runs_link
from tracking.wording import counted, percent

if TYPE_CHECKING:
    import pandas as pd

BEST_TAG = "best"
"""The tag of the best trial's run. Those of the sweep's run begin so, then comes a dot."""

REPORT_PAGE = "artifacts/report/report.html"

FIRST_WORDS = ("**Best: ", "**No trial ")
"""The description begins with one of these."""

LONGEST = 8000
"""Characters that MLflow takes in a tag of a run."""

_NUM_BEST = 10
_LONGEST_TEXT, _LONGEST_COMMAND = 120, 1000


def study_view(study: str, study_id: str, settings: Settings) -> View:
    """Return the view of a study's trials in MLflow's list of runs."""
    return View(
        study_id=study_id,
        name=f"sweep {study}, the best first",
        condition=f"tags.study_id = '{study_id}' and tags.role = 'trial'",
        metric="val/accuracy",
        # Of several with the same accuracy, a tag says which is the best.
        columns=(f"tags.{BEST_TAG}", "metrics.val/accuracy", *_params(settings), "tags.outcome"),
    )


def comparison_view(name: str, comparison_id: str, settings: Settings) -> View:
    """Return the view of a comparison's trainings in MLflow's list of runs."""
    return View(
        study_id=comparison_id,
        name=f"comparison {name}, the best first",
        condition=f"tags.comparison = {quoted(name)} and tags.role = 'trial'",
        metric="val/accuracy",
        columns=(
            *("metrics.val/accuracy", *_params(settings), "params.seed", "metrics.test/accuracy"),
            *("tags.stage", "tags.outcome"),
        ),
    )


def _params(settings: Settings) -> list[str]:
    return [f"params.{name}" for name in settings.search]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is said of a sweep in the description and in the tags of its run."""

    study: str
    settings: Settings
    data: Dataset
    experiment_id: str
    run_id: str
    all_trials: str
    """The link to the list of all trials."""

    def text(self, trials: pd.DataFrame, state: str, *, has_report: bool) -> str:
        """Return the description.

        MLflow's page of a run shows the first few lines, and folds the others.

        Args:
            trials: of `trials_table`.
            state: what the sweep does, in words.
            has_report: whether the report is among the artifacts.
        """
        for num_rows in range(_NUM_BEST, -1, -1):
            parts = (
                self._answer(trials, state, has_report=has_report),
                self._asked(),
                self._best(trials, num_rows),
                self._commands(trials),
            )
            text = "\n\n".join(part for part in parts if part)
            if len(text) <= LONGEST:
                break
        return text[:LONGEST]

    def _answer(self, trials: pd.DataFrame, state: str, *, has_report: bool) -> str:
        complete = _complete(trials)
        answer = "**No trial is complete.**" if len(trials) else "**No trial has ended yet.**"
        for best in complete.head(1).to_dict("records"):
            values = ", ".join(f"{each.label} {_value(each, best)}" for each in self._parameters)
            answer = (
                f"**Best: trial {self._trial(best)}, {values}: validation accuracy "
                f"{percent(best['val_accuracy'])}.**"
            )
        outcomes = trials["outcome"].value_counts().items()
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes)
        counts = f" ({counts})" if counts else ""
        total = max(self.settings.trials, len(trials))
        ended = f"{len(trials)} of {counted(total, 'trial')} ended" + counts
        links = [f"[All trials, the best first]({self.all_trials})"]
        if has_report:
            page = runs_link(self.experiment_id, self.run_id, REPORT_PAGE)
            links.append(f"[report with figures]({page})")
        return f"{answer}\n\n{ended}. {_text(state)}\n\n{' · '.join(links)}"

    def _asked(self) -> str:
        data, settings = self.data, self.settings
        sizes = ", ".join(
            f"{len(split):,} for {use}"
            for split, use in (
                (data.train, "training"),
                (data.validation, "validation"),
                (data.test, "test"),
            )
        )
        lines = {
            "data": f"{data.name}, {len(data.classes)} classes; images: {sizes}",
            **{BY_NAME[name].label: _domain(each) for name, each in settings.search.items()},
            **{BY_NAME[name].label: str(value) for name, value in settings.training.items()},
            "trials": f"{settings.trials} of {counted(settings.epochs, 'epoch')}; sampler "
            f"{settings.sampler}, pruner {settings.pruner}, seed {settings.seed}",
        }
        items = (f"- {_text(name)}: {_text(value)}" for name, value in lines.items())
        return "\n".join(["**What was asked**", "", *items])

    def _best(self, trials: pd.DataFrame, num_rows: int) -> str:
        rows = _complete(trials).head(num_rows).to_dict("records")
        if not rows:
            return ""
        heads = ["trial", "validation accuracy", *(each.label for each in self._parameters)]
        lines = [
            [
                self._trial(row),
                percent(row["val_accuracy"]),
                *(_value(each, row) for each in self._parameters),
            ]
            for row in rows
        ]
        table = [heads, ["---"] * len(heads), *lines]
        return "\n".join(["**The best trials**", "", *(f"| {' | '.join(row)} |" for row in table)])

    def _commands(self, trials: pd.DataFrame) -> str:
        lines: list[str] = []
        for comment, words in self._what_next(trials):
            command = printable(without_passwords(words))
            if len(command) <= _LONGEST_COMMAND:
                lines += [f"# {comment}", command]
        longest = max(map(len, re.findall("`+", "".join(lines))), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join(["**What next**", "", f"{fence}sh", *lines, fence])

    def _what_next(self, trials: pd.DataFrame) -> Iterator[tuple[str, str]]:
        options = tomllib.loads(self.settings.options)
        for run_id in _complete(trials)["run_id"].head(1):
            source = shlex.quote(f"{options.get('dataset', self.data.name)}:test")
            yield "predict", f"python -m tracking.predict {source} --run-id {run_id}"
            yield "train the best trial again", f"python -m experiments.rerun {run_id}"
        first_line = self.settings.options.partition("\n")[0]
        if command := first_line.removeprefix("#").strip():
            yield "continue the sweep, or add trials: --trials is the total", command
        words = ["python", "-m", "experiments.report", self.study]
        if self.settings.storage != "sqlite:///optuna.db":
            words += ["--storage", self.settings.storage]
        yield "write the report", shlex.join(words)

    @property
    def _parameters(self) -> Sequence[Parameter]:
        return [BY_NAME[name] for name in self.settings.search]

    def _trial(self, row: Mapping[Any, Any]) -> str:
        if not row["run_id"]:
            return str(row["trial"])
        return f"[{row['trial']}]({runs_link(self.experiment_id, row['run_id'])})"


def _complete(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[trials["outcome"] == "complete"]


def _text(text: str) -> str:
    return escaped_in_notes(shortened(text, _LONGEST_TEXT))


def _value(parameter: Parameter, row: Mapping[Any, Any]) -> str:
    return _text(parameter.text(row[parameter.name]))


def _domain(domain: Domain) -> str:
    if isinstance(domain, Range):
        return f"{domain.low:g} to {domain.high:g}" + (", log-uniform" if domain.log else "")
    return ", ".join(map(str, domain.values))
