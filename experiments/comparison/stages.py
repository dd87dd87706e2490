"""A comparison of losses: searches, repeats on fresh seeds, and then, once, the test split.

Each stage is a sweep, or reads what sweeps have recorded, so a comparison that was stopped resumes
where it was. What was decided is in the attributes of an Optuna study of the comparison's own name,
which has no trials; what follows from results is worked out again.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from optuna import Study
from optuna.trial import FrozenTrial

from cnn.data import Dataset
from experiments.comparison.loading import load_results
from experiments.comparison.plan import (
    Block,
    ComparisonEnded,
    Event,
    ModelTested,
    Pair,
    Plan,
    Planned,
    StageStarted,
    current,
    losses_in,
    read_blocks,
)
from experiments.comparison.record import open_record
from experiments.comparison.results import Results
from experiments.comparison.search_rule import Step
from experiments.comparison.searches import Searches, best_of_all
from experiments.comparison.testing import last_round, test_model
from experiments.engine.base import WorkerPool
from experiments.interrupts import Interrupts
from experiments.study.controller import sweep
from experiments.study.events import SweepEnded
from experiments.study.opening import open_checked_storage, open_study
from experiments.study.recorder import OPTIONS_FILE, log_data, open_tracker, show
from experiments.study.settings import Settings
from experiments.study.storage import (
    outcome_of,
    recording_errors,
    set_once,
    start_errors,
    study_lock,
)
from experiments.study.summary import comparison_view
from experiments.study.trial_cache import TrialCache
from experiments.study.trials import finished_trials, trials_table
from tracking.errors import is_transient, without_passwords
from tracking.store import check_tracking

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment
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
    publish: Callable[[Results, Assessment, Run], None] = lambda *_: None,
) -> Generator[Event]:
    """Bring a comparison to its end, and yield what happens.

    `data` is split with the plan's seed; `open_data` returns it split with another. The workers of
    `pool` have opened it. `retest` shows the test split to models that were added after it was
    looked at. `publish` takes the complete results, their assessment, and the comparison's run.

    Raises:
        ValueError: something can't be used, as with `sweep`; or more models would see the test
            split, after it was looked at, without `retest`.
    """
    with ExitStack() as stack:
        check_tracking()
        storage = open_checked_storage(plan.settings, interrupts)
        record = open_record(plan, data, storage, retest=retest)
        name = record.study_name
        stack.enter_context(study_lock(plan.settings.storage, name))
        open_data = lru_cache(maxsize=1)(open_data)
        running = _Comparison(plan, data, pool, interrupts, record, storage, open_data, retest)
        stack.callback(running.close)
        with start_errors():
            parent = running.connect()
        assessment = None
        try:
            yield from running.stages()
            if running.outcome == "complete":
                from experiments.comparison.assessment import assess  # statsmodels takes a second

                results = load_results(name, plan.settings.storage)
                assessment = assess(results)
                publish(results, assessment, parent)
        except recording_errors() as error:
            running.outcome, running.reason = outcome_of(error)
        running.close()
        yield ComparisonEnded(
            name=name,
            outcome=running.outcome,
            reason=running.reason,
            experiment_id=running.tracker.experiment_id,
            parent_run_id=parent.run_id,
            runs_page=running.runs_page,
            notes=running.notes,
            assessment=assessment if running.outcome == "complete" else None,
        )


@dataclass
class _Comparison:
    """The stages, one after the other."""

    plan: Plan
    data: Dataset
    pool: WorkerPool
    interrupts: Interrupts
    record: Study
    storage: TrialCache
    open_data: Callable[[int], Dataset]
    retest: bool
    outcome: str = "interrupted"
    reason: str = ""
    closed: bool = False
    parent: Run | None = None
    tracker: Tracker = field(init=False)
    runs_page: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.record.study_name

    def connect(self) -> Run:
        """Open the run that is the parent of all others."""
        with self.interrupts.at_once():
            self.tracker = open_tracker(self.plan.settings, self.interrupts)
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
        parent.log_text(self.plan.settings.options, OPTIONS_FILE)
        log_data(parent, self.data)
        view = comparison_view(self.name, tags["comparison_id"], self.plan.settings)
        self.runs_page, self.notes = show(self.tracker, view)
        made = self.plan.settings.made_with(self.data)
        before = self.record.user_attrs.get("made_with", made)
        training = {**made["training"], **before["training"]}  # losses may be added
        self.record.set_user_attr("made_with", {**before, "training": training})
        self.record.set_user_attr(
            "starts", [*self.record.user_attrs.get("starts", []), self._provenance()]
        )
        return parent

    def _provenance(self) -> dict[str, str]:
        """Return what it takes to reproduce what this process does."""
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
        repeats = yield from (self._staged() if self.plan.is_staged else self._sampled())
        if not repeats:
            return
        self.record.set_user_attr(
            "repeats", max(self.plan.repeats, self.record.user_attrs.get("repeats", 0))
        )
        yield StageStarted(title="the test split", settings=None)
        yield from self._test(repeats)
        if not self.interrupts():
            self.outcome = "complete"

    def _staged(self) -> Generator[Event, None, list[Settings]]:
        """Run the searches, and return the sweeps whose models see the test split."""
        blocks = current(read_blocks(self.record.user_attrs))
        yield self._planned(blocks)
        finished: list[Searches] = []
        repeats: list[Settings] = []
        trained: dict[Pair, FrozenTrial] = {}
        for block in blocks:
            searches = Searches(self.plan, block, max_batch_size=len(self.data.train))
            for step in self.plan.steps(block.trials):
                settings = self._of_step(block, step, searches)
                if not (yield from self._sweep(self._title(block, step), settings)):
                    return []
                searches.take(step, self._study_of(settings))
            finished.append(searches)
            if finals := searches.finals():
                study = block.study(self.name, "repeats")
                settings = self.plan.fixed(study, self.name, "repeat", finals)
                title = "the chosen configurations, each on a fresh seed"
                if not (yield from self._sweep(title, settings)):
                    return []
                repeats.append(settings)
                pairs = [pair for pair, *_ in searches.chosen()]
                trials = finished_trials(self._study_of(settings))
                trained |= dict(zip(pairs, trials, strict=True))
        best = best_of_all(finished, trained)
        if best is None:
            self.outcome, self.reason = "failed", "no loss has a complete repeat"
            return []
        configurations = [{**best, "seed": seed} for seed in self.plan.seeds]
        study = blocks[-1].study(self.name, "confirm")
        confirmation = self.plan.fixed(study, self.name, "confirm", configurations)
        title = f"the configuration to use, {best['loss']}, on {self.plan.repeats} fresh seeds"
        if not (yield from self._sweep(title, confirmation)):
            return []
        return [*repeats, confirmation]

    def _of_step(self, block: Block, step: Step, searches: Searches) -> Settings:
        study = block.study(self.name, step.name)
        return self.plan.fixed(study, self.name, step.stage, searches.configurations(step))

    def _title(self, block: Block, step: Step) -> str:
        of_stage = [each for each in self.plan.steps(block.trials) if each.stage == step.stage]
        place = f" {step.number} of {len(of_stage)}" if len(of_stage) > 1 else ""
        return f"{step.stage}{place}"

    def _planned(self, blocks: Sequence[Block]) -> Planned:
        losses = losses_in(blocks)
        counts = {
            loss: sum(
                (block.trials + 1) * (loss == of) for block in blocks for of, _ in block.pairs
            )
            for loss in losses
        }
        return Planned(
            trainings=counts,
            others=self.plan.repeats,
            epochs=self.plan.settings.epochs,
            images=len(self.data.train),
        )

    def _sampled(self) -> Generator[Event, None, list[Settings]]:
        """Run one search for each loss, and then the repeats; return their sweep."""
        losses = self.plan.settings.losses
        yield Planned(
            trainings=dict.fromkeys(losses, self.plan.settings.trials + self.plan.repeats),
            others=0,
            epochs=self.plan.settings.epochs,
            images=len(self.data.train),
        )
        for number, loss in enumerate(losses, 1):
            title = f"search for the best configuration of {loss} ({number} of {len(losses)})"
            if not (yield from self._sweep(title, self.plan.search_of(self.name, loss))):
                return []
        winners = self._winners()
        if not winners:
            self.outcome, self.reason = "failed", "no loss has a complete trial"
            return []
        confirmation = self.plan.confirmation(self.name, winners)
        title = f"confirmation on {self.plan.repeats} fresh seeds"
        if not (yield from self._sweep(title, confirmation)):
            return []
        return [confirmation]

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
            storage=self.storage,
            reuse=self.plan.reuse,
        )
        with closing(stage) as events:  # the sweep closes its runs when this generator is closed
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
        """Return the best configuration of each loss that has one, the same at each call."""
        found: list[dict[str, Any]] = []
        for loss in self.plan.settings.losses:
            study = self._study_of(self.plan.search_of(self.name, loss))
            best = trials_table(study).query("outcome == 'complete'").head(1)
            found += [study.get_trials(deepcopy=False)[number].params for number in best["trial"]]
        winners: list[dict[str, Any]] = set_once(self.record, "winners", found)
        return winners

    def _study_of(self, settings: Settings) -> Study:
        return open_study(settings, self.data, storage=self.storage)

    def _test(self, repeats: Sequence[Settings]) -> Iterator[ModelTested]:
        """Show the test split to each model that has not seen it."""
        models = [(trial, run) for each in repeats for trial, run in self._models(each)]
        rounds: list[dict[str, Any]] = list(self.record.user_attrs.get("test_rounds", []))
        untested = [(trial, run) for trial, run in models if not last_round(run)]
        if not rounds or ("ended" in rounds[-1] and untested and self.retest):
            rounds.append({"started": _now()})
            self.record.set_user_attr("test_rounds", rounds)
        if "ended" in rounds[-1]:
            return
        errors: tuple[type[BaseException], ...] = (ValueError, *recording_errors())
        for trial, run in untested:
            if self.interrupts():
                return
            loss, seed = trial.params["loss"], trial.params["seed"]
            try:
                accuracy = test_model(run, self.open_data(seed), test_round=len(rounds))
            except errors as error:
                # If the user has deleted it meanwhile, the others are tested all the same.
                if is_transient(error) or self.tracker.find_run(run.run_id) is not None:
                    raise
                continue
            yield ModelTested(loss=loss, seed=seed, accuracy=accuracy)
        attributes = self.record.user_attrs
        rounds[-1] |= {
            "ended": _now(),
            "blocks": len(read_blocks(attributes)),
            "repeats": attributes["repeats"],
        }
        self.record.set_user_attr("test_rounds", rounds)

    def _models(self, settings: Settings) -> Iterator[tuple[FrozenTrial, Run]]:
        """Yield the complete trials of a sweep with their runs, but those that the user deleted."""
        for trial in finished_trials(self._study_of(settings)):
            if trial.user_attrs.get("outcome") == "complete":
                run = self.tracker.find_run(trial.user_attrs["run_id"])
                if run is not None:
                    yield trial, run

    def close(self) -> None:
        """Close the comparison's run."""
        if self.closed:
            return
        self.closed = True
        if self.parent is not None:
            with suppress(*recording_errors()):
                self.parent.end(self.outcome, reason=self.reason)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {packages}"
