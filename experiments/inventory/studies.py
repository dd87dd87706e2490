"""The studies of a storage: sweeps, and comparisons with the studies of their stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from experiments.study.heartbeat import Heartbeat
from experiments.study.storage import study_lock
from experiments.study.trial_cache import TrialCache
from experiments.study.trials import FINISHED
from tracking.store import sqlite_file


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A sweep, or a comparison."""

    name: str
    kind: str
    """sweep or comparison."""
    studies: tuple[str, ...]
    """The names of its studies in Optuna, its own one last."""
    ids: frozenset[str]
    """What the tags `study_id` and `comparison_id` of its runs say."""
    run_ids: frozenset[str]
    """The runs that its trials name, linked ones of other studies as well."""
    num_finished: int
    num_unfinished: int
    last_used: datetime | None
    """When its newest trial started."""


def read_studies(storage: TrialCache) -> list[StoredStudy]:
    """Return the studies of a storage that this tool made, in the order of their names."""
    studies = {
        each.study_name: optuna.load_study(study_name=each.study_name, storage=storage)
        for each in optuna.get_all_study_summaries(storage)
        if {"settings", "plan"} & each.user_attrs.keys()
    }
    comparisons = [name for name, study in studies.items() if "plan" in study.user_attrs]
    stages: dict[str, list[str]] = {name: [] for name in comparisons}
    for name in studies:
        # A comparison's name may hold a slash: the longest one that fits is meant.
        fitting = [each for each in comparisons if name.startswith(f"{each}/")]
        if fitting:
            stages[max(fitting, key=len)].append(name)
    of_stages = {name for names in stages.values() for name in names}
    return [
        _stored(name, [studies[each] for each in (*stages.get(name, ()), name)])
        for name in sorted(studies)
        if name not in of_stages
    ]


def _stored(name: str, studies: Sequence[Study]) -> StoredStudy:
    trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
    unfinished = [trial for trial in trials if trial.state not in FINISHED]
    starts = [trial.datetime_start for trial in trials if trial.datetime_start is not None]
    return StoredStudy(
        name=name,
        kind="comparison" if "plan" in studies[-1].user_attrs else "sweep",
        studies=tuple(study.study_name for study in studies),
        ids=frozenset(str(study.user_attrs["id"]) for study in studies),
        run_ids=frozenset(t.user_attrs["run_id"] for t in trials if "run_id" in t.user_attrs),
        num_finished=len(trials) - len(unfinished),
        num_unfinished=len(unfinished),
        last_used=max(starts, default=None),
    )


@contextmanager
def kept_from_running(stored: StoredStudy, url: str, storage: TrialCache) -> Iterator[None]:
    """Hold the locks of a study's sweeps, so that none starts meanwhile.

    Raises:
        ValueError: one of its sweeps is running.
    """
    with ExitStack() as stack:
        for name in stored.studies:
            stack.enter_context(study_lock(url, name))
        if sqlite_file(url) is None:
            for name in stored.studies:
                _check_no_heartbeat(optuna.load_study(study_name=name, storage=storage))
        yield


def _check_no_heartbeat(study: Study) -> None:
    """Raise ValueError if a process of another machine trains a trial of a study."""
    heartbeat = Heartbeat(study, is_shared=True)
    orphaned = {trial.number for trial in heartbeat.orphaned()}
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if alive := [trial.number for trial in running if trial.number not in orphaned]:
        raise ValueError(
            f"study {study.study_name!r} is being run: trial {alive[0]} had a heartbeat in the "
            "last two minutes; wait for it, or stop it"
        )


def delete_studies(stored: StoredStudy, storage: TrialCache) -> None:
    """Delete the studies in Optuna: its own one last, so that a part of them is still found."""
    for name in stored.studies:
        optuna.delete_study(study_name=name, storage=storage)
