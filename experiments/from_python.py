"""Sweeps from Python, in a script, a notebook or a thread: `experiments.run_sweep`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn.references import reference_to, stop_loading
from experiments import cli
from experiments.study.output import Output
from experiments.study.parameter_types import ChoiceParameter
from experiments.study.parameters import PARAMETERS
from experiments.sweep import build_parser, conduct
from tracking.errors import TransientError, without_passwords
from tracking.store import default_store, environment
from tracking.wording import percent

# PyTorch, Optuna and MLflow are slow to import: each function imports what it needs.
if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracking.models.predictor import Predictor

_LISTS = {each.plural for each in PARAMETERS if isinstance(each, ChoiceParameter)}

AGAIN = "the same call continues the study"
SHOWN_ROWS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """A finished sweep."""

    study: str
    """The Optuna study's name."""
    experiment: str
    """The MLflow experiment's name."""
    storage: str
    """The database of the study."""
    trials: pd.DataFrame
    """A row for each finished trial, the best first: its number, outcome, searched parameters,
    epochs, `val_accuracy`, `val_loss` and `run_id`."""
    registered: str
    """What was registered, in a line; empty if nothing was."""

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best complete trial; ValueError if there is none."""
        complete = self.trials[self.trials["outcome"] == "complete"]
        if not len(complete):
            raise ValueError(f"no trial of study {self.study} is complete")
        return {str(name): _plain("", value) for name, value in complete.iloc[0].items()}

    def load_best(self) -> Predictor:
        """Load the model of the best complete trial; ValueError if there is none any more."""
        from tracking.selection import load_run

        return load_run(str(self.best["run_id"]))

    def figures(self) -> dict[str, go.Figure]:
        """Return Optuna's plots by their names: history, importances, parallel coordinates."""
        import optuna

        from experiments.reporting.optuna_figures import study_figures
        from experiments.study.storage import open_storage, storage_errors

        complete = (optuna.trial.TrialState.COMPLETE,)
        with storage_errors(self.storage):
            stored = optuna.load_study(study_name=self.study, storage=open_storage(self.storage))
            trials = stored.get_trials(states=complete)
        study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(), study_name=self.study, direction="maximize"
        )
        study.add_trials(trials)
        return study_figures(study, {self.study: study})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _repr_html_(self) -> str:
        shown = self.trials.drop(columns=["run_id"]).head(SHOWN_ROWS)
        formats: dict[str, Callable[[Any], str]]
        formats = {"val_accuracy": percent, "learning_rate": "{:.3g}".format}
        table = shown.to_html(
            index=False,
            na_rep="–",
            float_format="{:.4g}".format,
            formatters={name: formats[name] for name in formats if name in shown},
        )
        more = len(self.trials) - len(shown)
        rest = f"<p>and {more} more</p>" if more > 0 else ""
        return f"<p>{html.escape(self._summary())}</p>{table}{rest}"

    def _summary(self) -> str:
        count = f"study {self.study}, {len(self.trials)} trials"
        if not (self.trials["outcome"] == "complete").any():
            return f"{count}, none complete"
        best = self.best
        return (
            f"{count}, best trial {best['trial']}: validation accuracy {best['val_accuracy']:.2%}"
        )


def run_sweep(**options: Any) -> SweepResult:
    """Run a sweep as `python -m experiments.sweep` does, show its progress, return its result.

        experiments.run_sweep(dataset="digits", losses=["mse", my_loss], trials=12,
                              vary={"momentum": (0.8, 0.99)}, network=my_factory)

    The keywords are the options of the command, with underscores: numbers, texts, lists. `vary` is
    a mapping: a text as on the command line, a tuple `(low, high)` or `(low, high, "log")`, or a
    list of values. Networks and losses may be functions of a module or of the script; those of a
    notebook must be in a file. `config` names a file of options; keywords override it.

    The same call continues its study. Ctrl-C, or a notebook's stop button, stops it in order.

    Raises:
        ValueError: an option is bad, or data, databases or servers can't be used. It is a
            `TransientError` if the same call may continue later.
        KeyboardInterrupt: it was interrupted; what ran is recorded.
    """
    stop_loading()
    parser = build_parser()
    config = options.pop("config", None)
    words = [] if config is None else [f"--config={config}"]
    words += parser.words(
        {name: _plain(name, value) for name, value in _given(options)}, "run_sweep"
    )
    cli.set_up_mlflow()
    with environment(default_store()):
        parsed = parser.parse_args(words)
        with Output(quiet=parsed.quiet, as_json=parsed.json) as output:
            conducted = conduct(parsed, output)
        started, ended = conducted.started, conducted.ended
        if ended.outcome != "complete":
            if not ended.reason:
                raise KeyboardInterrupt(f"interrupted: {AGAIN}")
            kind = ValueError if ended.outcome == "failed" else TransientError
            raise kind(without_passwords(f"stopped: {ended.reason}; {AGAIN}"))
        if ended.trials is None:
            raise TransientError(f"the trials can't be read; {AGAIN}")
    return SweepResult(
        study=started.study,
        experiment=started.experiment,
        storage=parsed.storage,
        trials=ended.trials,
        registered=conducted.registered,
    )


def _given(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options that are not None, which is what leaving one out means."""
    return ((name, value) for name, value in options.items() if value is not None)


def _plain(name: str, value: Any) -> Any:
    """Return an option's value as a file of options has it."""
    if name == "vary":
        if not isinstance(value, Mapping):
            return value  # refused with the other wrong types
        return {key: _domain(domain) for key, domain in value.items()}
    if name in _LISTS and not isinstance(value, (list, tuple)):
        value = [value]
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain("", each) for each in value]
    if callable(value):
        return reference_to(value)
    return value.item() if hasattr(value, "item") else value  # a number of NumPy


def _domain(domain: Any) -> str:
    """Return what is searched as `--vary` takes it."""
    if not isinstance(domain, (list, tuple)):
        return str(_plain("", domain))
    values = [_plain("", each) for each in domain]
    numbers = [each for each in values if isinstance(each, (int, float))]
    if isinstance(domain, tuple) and len(numbers) == 2 and values[2:] in ([], ["log"]):
        return f"{values[0]}..{values[1]}" + ":log" * (len(values) == 3)
    return ",".join(map(str, values))
