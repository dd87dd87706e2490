"""A comparison of losses: search, confirmation on fresh seeds, and then, once, the test split.

Each stage is a sweep, or follows from what sweeps have recorded: a comparison that was cut off goes
on where it was. What was decided between them (the winners) is kept in an Optuna study of the
comparison's own name, which has no trials.
"""

from __future__ import annotations

import platform
import shlex
import sys
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import optuna
from optuna import Study

from cnn.data import Dataset
from experiments.comparison.plan import ComparisonEnded, Event, ModelTested, Plan, StageStarted
from experiments.comparison.results import Results, load_results
from experiments.comparison.testing import last_round, test_model
from experiments.engine.base import WorkerPool
from experiments.interrupts import InterruptionError, Interrupts
from experiments.study.controller import sweep
from experiments.study.events import SweepEnded
from experiments.study.identity import check_same
from experiments.study.opening import open_study
from experiments.study.recorder import log_data
from experiments.study.settings import Settings
from experiments.study.storage import (
    cause_of,
    check_storage,
    check_study_name,
    existing_name,
    load_or_create,
    open_storage,
    recording_errors,
    set_once,
    storage_errors,
    storage_retries,
    study_lock,
)
from experiments.study.trial_cache import TrialCache
from experiments.study.trials import finished_trials, trials_table
from tracking.errors import is_transient, one_line, refusal, without_passwords
from tracking.store import check_tracking

if TYPE_CHECKING:
    from tracking.runs import Run
    from tracking.tracker import Tracker


_PACKAGES = ("torch", "optuna", "mlflow", "numpy", "scipy")


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
        stack.enter_context(study_lock(plan.settings.storage, name))
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
            running.outcome = "interrupted" if is_transient(error) else "failed"
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
            from tracking.retries import RetryPolicy
            from tracking.tracker import Tracker

            retries = RetryPolicy(
                seconds=self.plan.settings.tracking_timeout, should_stop=self.interrupts
            )
            self.tracker = Tracker.open(self.plan.settings.experiment, retries=retries)
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
        set_once(self.record, "made_with", self.plan.settings.made_with(self.data))
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
        winners: list[dict[str, Any]] = set_once(self.record, "winners", found)
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
        for trial in finished_trials(open_study(confirmation, self.data, storage=self.storage)):
            if trial.user_attrs.get("outcome") != "complete":
                continue
            if self.interrupts():
                return
            run = self.tracker.find_run(trial.user_attrs["run_id"])
            if run is None or last_round(run) >= len(rounds):
                continue  # deleted by the user, or seen to before this process was started
            loss, seed = trial.params["loss"], trial.params["seed"]
            try:
                accuracy = test_model(run, self.open_data(seed), test_round=len(rounds))
            except errors as error:
                # Deleted in between: as if it had been before. The other models are shown the test.
                if is_transient(error) or self.tracker.find_run(run.run_id) is not None:
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
    retries = storage_retries(settings.tracking_timeout, should_stop)
    with storage_errors(settings.storage):
        storage = open_storage(settings.storage, retries)
        prefix = f"compare-{data.name}"
        name = settings.study or existing_name(storage, prefix, identity, made)
        check_study_name(name)
        record = load_or_create(study_name=name, storage=storage)
        if "plan" not in record.user_attrs:
            if record.get_trials(deepcopy=False):
                raise ValueError(f"study {name!r} is of a sweep: choose another --study")
            set_once(record, "id", uuid.uuid4().hex)
            set_once(record, "data", _data_facts(data))
            set_once(record, "plan", identity)
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {packages}"
