"""A comparison of losses: search, confirmation on fresh seeds, and then, once, the test split.

Each stage is a sweep, or follows from what sweeps have recorded: a comparison that was cut off goes
on where it was. What was decided between them (the winners) is kept in an Optuna study of the
comparison's own name, which has no trials.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import uuid
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import optuna
import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial

from cnn.data import Dataset
from experiments.engine.base import WorkerPool
from experiments.identity import check_same
from experiments.interrupts import InterruptionError, Interrupts
from experiments.results import CURVE_COLUMNS, REPEAT_COLUMNS, TRIAL_COLUMNS, Results
from experiments.settings import Settings
from experiments.space import Point
from experiments.storage import (
    agree,
    cause_of,
    check_storage,
    check_study_name,
    existing_name,
    held,
    load_or_create,
    open_storage,
    recording_errors,
    storage_errors,
    storage_patience,
)
from experiments.study import (
    FINISHED,
    SweepEnded,
    SweepEvent,
    log_data,
    open_study,
    sweep,
    trials_table,
)
from experiments.trial_cache import TrialCache
from tracking.errors import is_passing, one_line, refusal, without_passwords
from tracking.store import check_tracking, reading, sqlite_file

if TYPE_CHECKING:
    import mlflow
    import numpy.typing as npt

    from tracking.runs import Run
    from tracking.tracker import Tracker

LEAST_PROBABILITY = 1e-6
"""What a smaller one counts as in the negative log-likelihood, which would be infinite at 0."""

CONFUSION_FILE = "test/confusion.json"
ROUND_TAG = "test_round"
"""Of a confirmed run: in which round its model was last shown the test split."""

_PACKAGES = ("torch", "optuna", "mlflow", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison is told.

    Raises:
        ValueError: something is out of its range.
    """

    settings: Settings
    """Of the search for one loss, but with all of the losses."""
    repeats: int
    """How often the best setting of each loss is trained again."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be ≥ 1, not {self.repeats}")
        if self.settings.seed + self.repeats > 2**32 - 1:
            raise ValueError(f"--seed + --repeats must be < 2**32: {self.settings.seed}")

    @property
    def seeds(self) -> range:
        """The seeds of the repeats: the next ones after that of the search."""
        return range(self.settings.seed + 1, self.settings.seed + 1 + self.repeats)

    def identity(self, data: Dataset) -> dict[str, Any]:
        """Return what makes two comparisons the same: all that they depend on but the repeats."""
        return self.settings.identity(data) | {"trials": self.settings.trials}

    def search(self, name: str, loss: str) -> Settings:
        """Return the settings of the search for a loss' best setting."""
        return replace(
            self.settings,
            losses=(loss,),
            study=f"{name}/search/{loss}",
            tags={"comparison": name, "stage": "search"},
        )

    def confirmation(self, name: str, winners: Sequence[Mapping[str, Any]]) -> Settings:
        """Return the settings of the repeats: the winners with each seed, seed by seed."""
        points = [Point(**winner, seed=seed) for seed in self.seeds for winner in winners]
        return replace(
            self.settings,
            losses=tuple(winner["loss"] for winner in winners),
            points=points,
            trials=len(points),
            study=f"{name}/confirm",
            tags={"comparison": name, "stage": "confirm"},
        )


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    title: str
    settings: Settings | None
    """Of its sweep, if it is one."""


@dataclass(frozen=True, kw_only=True)
class ModelTested:
    """A confirmed model was shown the test split."""

    loss: str
    seed: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ComparisonEnded:
    """Nothing runs any more, and all is recorded."""

    name: str
    outcome: str
    """As that of a sweep."""
    reason: str
    experiment_id: str
    parent_run_id: str


Event = StageStarted | ModelTested | SweepEvent | ComparisonEnded


def compare(
    plan: Plan,
    data: Dataset,
    pool: WorkerPool,
    interrupts: Interrupts,
    *,
    open_data: Callable[[int], Dataset],
    retest: bool = False,
    finish: Callable[[Results, Run], None] = lambda _results, _run: None,
) -> Generator[Event]:
    """Bring a comparison to its end, and yield what happens.

    Args:
        plan: what to do.
        data: the data set, split with the search's seed.
        pool: the workers, which have opened the same data.
        interrupts: asked several times a second, as `sweep` does.
        open_data: returns the data set, split with another seed.
        retest: show the models the test split again, though it was done before.
        finish: is handed the results, and the comparison's run, once there are all of them.

    Raises:
        ValueError: something can't be used, as with `sweep`; or there are models that would be the
            second ones to see the test split, without `retest`.
    """
    with ExitStack() as stack:
        check_tracking()
        record, storage = _open_record(plan, data, interrupts, retest=retest)
        name = record.study_name
        stack.enter_context(held(plan.settings.storage, name))
        running = _Comparison(plan, data, pool, interrupts, record, storage, open_data, retest)
        stack.callback(running.close)
        try:
            parent = running.connect()
        except InterruptionError:
            raise  # before it is asked what the others are: MLflow may be half imported
        except recording_errors() as error:
            raise refusal(one_line(cause_of(error)), error) from error
        try:
            yield from running.stages()
            if running.outcome == "complete":
                finish(load_results(name, plan.settings.storage), parent)
        except recording_errors() as error:
            # What waiting does not mend is not told as what the same command continues.
            running.outcome = "interrupted" if is_passing(error) else "failed"
            running.reason = one_line(cause_of(error))
        running.close()
        yield ComparisonEnded(
            name=name,
            outcome=running.outcome,
            reason=running.reason,
            experiment_id=running.tracker.experiment_id,
            parent_run_id=parent.run_id,
        )


class _Comparison:
    """The stages, one after the other."""

    def __init__(
        self,
        plan: Plan,
        data: Dataset,
        pool: WorkerPool,
        interrupts: Interrupts,
        record: Study,
        storage: TrialCache,
        open_data: Callable[[int], Dataset],
        retest: bool,
    ) -> None:
        self.plan, self.data, self.pool, self.interrupts = plan, data, pool, interrupts
        self.record, self.storage, self.retest = record, storage, retest
        self.name = record.study_name
        self.open_data = lru_cache(maxsize=1)(open_data)
        self.outcome, self.reason = "interrupted", ""
        self.closed = False
        self.tracker: Tracker
        self.parent: Run | None = None

    def connect(self) -> Run:
        """Open the run that all others hang under."""
        with self.interrupts.at_once():
            from tracking.retries import Patience
            from tracking.tracker import Tracker

            patience = Patience(
                seconds=self.plan.settings.tracking_timeout, should_stop=self.interrupts
            )
            self.tracker = Tracker.open(self.plan.settings.experiment, patience=patience)
        tags = {
            "comparison": self.name,
            "comparison_id": self.record.user_attrs["id"],
            "role": "comparison",
        }
        earlier = self.record.user_attrs.get("parent_run_id")
        parent = self.parent = self.tracker.parent_run(self.name, tags=tags, earlier=earlier)
        self.record.set_user_attr("parent_run_id", parent.run_id)
        params = self.record.user_attrs["plan"]
        parent.log_params({f"compare/{key}": value for key, value in params.items()})
        log_data(parent, self.data)
        agree(self.record, "made_with", self.plan.settings.made_with(self.data))
        self.record.set_user_attr(
            "starts", [*self.record.user_attrs.get("starts", []), self._start()]
        )
        return parent

    def _start(self) -> dict[str, str]:
        """Return what there is to know of this process, for those who want to do it again."""
        tags = self.tracker.context_tags
        words = ["python", "-m", "experiments.compare", *sys.argv[1:]]
        return {
            "started": _now(),
            "commit": tags.get("mlflow.source.git.commit", "unknown"),
            "versions": _versions(),
            "hardware": self.pool.hardware(),
            "command": without_passwords(shlex.join(words)),
            "experiment": self.tracker.experiment,
        }

    def stages(self) -> Iterator[Event]:
        losses = self.plan.settings.losses
        for number, loss in enumerate(losses, 1):
            title = f"search for the best setting of {loss} ({number} of {len(losses)})"
            if not (yield from self._sweep(title, self.plan.search(self.name, loss))):
                return
        winners = self._winners()
        if not winners:
            self.outcome, self.reason = "failed", "no loss has a trial that is complete"
            return
        confirmation = self.plan.confirmation(self.name, winners)
        title = f"confirmation on {self.plan.repeats} fresh seeds"
        if not (yield from self._sweep(title, confirmation)):
            return
        self.record.set_user_attr(
            "repeats", max(self.plan.repeats, self.record.user_attrs.get("repeats", 0))
        )
        yield StageStarted(title="the test split", settings=None)
        yield from self._test(confirmation)
        if not self.interrupts():
            self.outcome = "complete"

    def _sweep(self, title: str, settings: Settings) -> Generator[Event, None, bool]:
        """Run the sweep of a stage, and return whether it is complete."""
        yield StageStarted(title=title, settings=settings)
        ended = None
        assert self.parent is not None
        stage = sweep(
            settings,
            self.data,
            self.pool,
            self.interrupts,
            under=self.parent.run_id,
            storage=self.storage,  # which is waited for between stages, too
        )
        with closing(stage) as events:  # with this generator, and not when Python gets to it
            for event in events:
                yield event
                if isinstance(event, SweepEnded):
                    ended = event
        assert ended is not None
        if ended.outcome == "complete":
            return True
        self.outcome, self.reason = ended.outcome, ended.reason
        return False

    def _winners(self) -> list[dict[str, Any]]:
        """Return the best setting of each loss that has one, fixed the first time it is asked."""
        found: list[dict[str, Any]] = []
        for loss in self.plan.settings.losses:
            study = open_study(self.plan.search(self.name, loss), self.data, storage=self.storage)
            best = trials_table(study).query("outcome == 'complete'").head(1)
            found += [study.get_trials(deepcopy=False)[number].params for number in best["trial"]]
        winners: list[dict[str, Any]] = agree(self.record, "winners", found)
        return winners

    def _test(self, confirmation: Settings) -> Iterator[ModelTested]:
        """Show the test split to each confirmed model: once, or once more in a new round."""
        rounds: list[dict[str, str]] = list(self.record.user_attrs.get("test_rounds", []))
        if not rounds or ("ended" in rounds[-1] and self.retest):
            rounds.append({"started": _now()})
            self.record.set_user_attr("test_rounds", rounds)
        if "ended" in rounds[-1]:
            return
        errors: tuple[type[BaseException], ...] = (ValueError, *recording_errors())
        for trial in _finished(open_study(confirmation, self.data, storage=self.storage)):
            if trial.user_attrs.get("outcome") != "complete":
                continue
            if self.interrupts():
                return
            run = self.tracker.find_run(trial.user_attrs["run_id"])
            if run is None or _last_round(run) >= len(rounds):
                continue  # deleted by the user, or seen to before this process was started
            loss, seed = trial.params["loss"], trial.params["seed"]
            try:
                accuracy = test_model(run, self.open_data(seed), test_round=len(rounds))
            except errors as error:
                # Deleted in between: as if it had been before. The other models are shown the test.
                if is_passing(error) or self.tracker.find_run(run.run_id) is not None:
                    raise
                continue
            yield ModelTested(loss=loss, seed=seed, accuracy=accuracy)
        rounds[-1]["ended"] = _now()
        self.record.set_user_attr("test_rounds", rounds)

    def close(self) -> None:
        """Close the comparison's run."""
        if self.closed:
            return
        self.closed = True
        if self.parent is None:
            return
        with suppress(*recording_errors()):
            self.parent.end(self.outcome, reason=self.reason)


def test_model(run: Run, data: Dataset, *, test_round: int) -> float:
    """Show a run's model the test split, record what it makes of it, and return its accuracy."""
    from tracking.evaluation.metrics import Counter
    from tracking.selection import load_run

    model = load_run(run.run_id)
    labels = data.test.labels.numpy()
    probabilities = model.probabilities(data.test.images.numpy())
    counter = Counter(model.classes)
    counter.add(labels, probabilities)
    measures = counter.measures()
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    metrics = {
        "test/accuracy": measures.accuracy[0],
        "test/nll": float(-np.log(of_truth.clip(LEAST_PROBABILITY)).mean()),
        "test/brier": measures.brier_score,
        "test/ece": measures.calibration_error,
    }
    confusion = {"classes": list(model.classes), "images": measures.confusion.tolist()}
    run.log_text(json.dumps(confusion), CONFUSION_FILE)
    # Last, and all at once: where there are metrics, the rest is there, and the round is noted.
    run.log_metrics(
        metrics,
        step=test_round,
        tags={ROUND_TAG: str(test_round)},
        model_id=run.model_id(),
        data=(data.name, data.digest),
    )
    return metrics["test/accuracy"]


def _last_round(run: Run) -> int:
    return int(run.client.get_run(run.run_id).data.tags.get(ROUND_TAG, 0))


def _open_record(
    plan: Plan, data: Dataset, should_stop: Callable[[], bool], *, retest: bool
) -> tuple[Study, TrialCache]:
    """Open the study that holds what is decided, or make it, and return it with its storage.

    Raises:
        ValueError: it was made with another plan; or its models have seen the test split, there are
            to be more of them, and `retest` is not asked for.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = plan.settings
    check_storage(settings.storage)
    identity, made = plan.identity(data), settings.made_with(data)
    patience = storage_patience(settings.tracking_timeout, should_stop)
    with storage_errors(settings.storage):
        storage = open_storage(settings.storage, patience)
        prefix = f"compare-{data.name}"
        name = settings.study or existing_name(storage, prefix, identity, made)
        check_study_name(name)
        record = load_or_create(study_name=name, storage=storage)
        if "plan" not in record.user_attrs:
            if record.get_trials(deepcopy=False):
                raise ValueError(f"study {name!r} is of a sweep: choose another --study")
            agree(record, "id", uuid.uuid4().hex)
            agree(record, "data", _data_facts(data))
            agree(record, "plan", identity)
    before = (record.user_attrs["plan"], identity), (record.user_attrs.get("made_with"), made)
    check_same(f"comparison {name!r}", *before)
    rounds = record.user_attrs.get("test_rounds", [{}])
    repeats = record.user_attrs.get("repeats", plan.repeats)
    if plan.repeats > repeats and "ended" in rounds[-1] and not retest:
        raise ValueError(
            f"the test split was looked at after {repeats} repeats: with --repeats {plan.repeats} "
            "it would be looked at again, which takes --retest, and is recorded"
        )
    return record, storage


def _data_facts(data: Dataset) -> dict[str, Any]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "classes": list(data.classes),
        "sizes": {split: len(images) for split, images in splits.items()},
        "given_test": data.given_test,
    }


# What has come of it


def load_results(name: str, storage: str) -> Results:
    """Return what a comparison has come to so far.

    Raises:
        ValueError: there is none of this name in the storage, or it can't be read.
    """
    file = sqlite_file(storage)
    if file is not None and not file.exists():
        raise ValueError(f"there is no comparison here: the storage {storage!r} does not exist")
    with storage_errors(storage), reading() as client:
        opened = open_storage(storage)
        try:
            record = optuna.load_study(study_name=name, storage=opened)
            plan = record.user_attrs["plan"]
        except KeyError:
            known = _known_comparisons(opened)
            raise ValueError(
                f"there is no comparison {name!r} in {without_passwords(storage)}, only "
                f"{', '.join(known) or 'none'}"
            ) from None
        studies = {
            loss: study
            for loss in plan["losses"]
            if (study := _study(f"{name}/search/{loss}", opened)) is not None
        }
        confirmed = _study(f"{name}/confirm", opened)
        histories = _Histories(client)
        trials = [histories.row(trial) for study in studies.values() for trial in _finished(study)]
        repeats = [histories.row(trial) for trial in (_finished(confirmed) if confirmed else [])]
        curves = [
            *(curve for row in trials for curve in histories.curve("search", row)),
            *(curve for row in repeats for curve in histories.curve("confirm", row)),
        ]
        about = record.user_attrs["data"]
        classes = tuple(about["classes"])
        repeated = {"repeats": record.user_attrs.get("repeats", 0)}
        return Results(
            name=name,
            plan=plan | repeated | {"given_test": about["given_test"]},
            classes=classes,
            sizes=about["sizes"],
            trials=pd.DataFrame(trials, columns=list(TRIAL_COLUMNS)),
            repeats=pd.DataFrame(repeats, columns=list(REPEAT_COLUMNS)),
            curves=pd.DataFrame(curves, columns=list(CURVE_COLUMNS)),
            confusions=_confusions(client, repeats, len(classes)),
            studies=studies,
            provenance=_provenance(record),
        )


class _Histories:
    """The metrics of trials' runs, each asked for once."""

    _NAMES: ClassVar = {
        "train_loss": "train/loss",
        "train_accuracy": "train/accuracy",
        "val_loss": "val/loss",
        "val_accuracy": "val/accuracy",
        "seconds": "time/epoch_seconds",
        "images_per_second": "time/images_per_second",
        "test_accuracy": "test/accuracy",
        "test_nll": "test/nll",
        "test_brier": "test/brier",
        "test_ece": "test/ece",
    }

    def __init__(self, client: mlflow.MlflowClient) -> None:
        self.client = client
        self.of: dict[str, dict[str, dict[int, float]]] = {}

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return what there is to say of a trial that is over."""
        run_id = trial.user_attrs.get("run_id", "")
        metrics = self._read(run_id)
        # What Optuna knows of it, too, is there though somebody has deleted the run.
        values = trial.intermediate_values
        kept = {
            "val_accuracy": values[max(values)] if values else math.nan,
            "val_loss": trial.user_attrs.get("val_loss", math.nan),
        }
        seconds, rates = metrics["seconds"], metrics["images_per_second"]
        row = {
            "trial": trial.number,
            "outcome": trial.user_attrs.get("outcome", trial.state.name.lower()),
            **trial.params,
            "epochs": len(metrics["val_accuracy"]),
            "seconds": sum(seconds.values()),
            "images_per_second": float(np.mean(list(rates.values()))) if rates else math.nan,
            "test_evaluations": len(metrics["test_accuracy"]),
            "run_id": run_id,
        }
        for name in ("val_accuracy", "val_loss", *(n for n in self._NAMES if n.startswith("test"))):
            known = metrics[name]
            row[name] = known[max(known)] if known else kept.get(name, math.nan)
        return row

    def curve(self, stage: str, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the epochs of a trial whose `row` this is."""
        metrics = self.of[row["run_id"]]
        for epoch in sorted(metrics["val_accuracy"]):
            values = {name: metrics[name].get(epoch, math.nan) for name in CURVE_COLUMNS[4:]}
            yield {
                "stage": stage,
                "loss": row["loss"],
                "trial": row["trial"],
                "epoch": epoch,
                **values,
            }

    def _read(self, run_id: str) -> dict[str, dict[int, float]]:
        from mlflow.exceptions import MlflowException

        there: Container[str] = ()
        with suppress(MlflowException):  # a run that somebody has deleted for good
            there = self.client.get_run(run_id).data.metrics
        self.of[run_id] = {
            short: {
                entry.step: entry.value for entry in self.client.get_metric_history(run_id, key)
            }
            if key in there
            else {}
            for short, key in self._NAMES.items()
        }
        return self.of[run_id]


def _confusions(
    client: mlflow.MlflowClient, repeats: Iterable[Mapping[str, Any]], num_classes: int
) -> dict[str, npt.NDArray[np.int64]]:
    from mlflow.artifacts import load_dict

    found: dict[str, npt.NDArray[np.int64]] = {}
    for row in repeats:
        if row["test_evaluations"]:
            location = client.get_run(row["run_id"]).info.artifact_uri
            images = np.array(load_dict(f"{location}/{CONFUSION_FILE}")["images"], np.int64)
            nothing = np.zeros((num_classes, num_classes), np.int64)
            found[row["loss"]] = found.get(row["loss"], nothing) + images
    return found


def _provenance(record: Study) -> dict[str, str]:
    """Return how it was made: what each of its processes said, the same things once."""
    starts: list[dict[str, str]] = record.user_attrs.get("starts", [])
    keys = ("command", "commit", "versions", "hardware", "experiment")
    made = {key: "; ".join(dict.fromkeys(start[key] for start in starts)) for key in keys}
    rounds = record.user_attrs.get("test_rounds", [])
    ends = [each["ended"] for each in rounds if "ended" in each]
    return {
        **made,
        "run": record.user_attrs.get("parent_run_id", ""),
        "started": starts[0]["started"] if starts else "",
        "ended": ends[-1] if ends else "",
        "test split looked at": f"{len(rounds)} times" if len(rounds) != 1 else "once",
    }


def _known_comparisons(storage: Any) -> list[str]:
    return [
        summary.study_name
        for summary in optuna.get_all_study_summaries(storage)
        if "plan" in summary.user_attrs
    ]


def _study(name: str, storage: Any) -> Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def _finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {packages}"
