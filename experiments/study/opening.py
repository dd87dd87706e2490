"""A study, opened or made, and checked to be of the same settings, data and code."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

import optuna
from optuna.study import Study

from cnn.data import Dataset
from experiments.study.identity import check_same
from experiments.study.pruners import make_pruner
from experiments.study.settings import Settings
from experiments.study.storage import (
    check_storage,
    check_study_name,
    existing_name,
    load_or_create,
    open_storage,
    set_once,
    storage_errors,
    storage_retries,
)
from experiments.study.trial_cache import TrialCache
from tracking.errors import without_passwords


def open_study(
    settings: Settings,
    data: Dataset,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    storage: TrialCache | None = None,
) -> Study:
    """Open the study of these settings, or make it.

    Without a name of its own it has one that follows from the settings and the code, so that the
    same command comes to the same study, and another command or network to another.

    Args:
        settings: of the study.
        data: that it is of.
        should_stop: asked while a storage that has gone away is waited for.
        storage: that of the settings, where it is open already.

    Raises:
        ValueError: the storage can't be opened, or the study is of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if storage is None:
        check_storage(settings.storage)
    identity, made = settings.identity(data), settings.made_with(data)
    retries = storage_retries(settings.tracking_timeout, should_stop)
    with storage_errors(settings.storage):
        storage = storage or open_storage(settings.storage, retries)
        name = settings.study or existing_name(storage, data.name, identity, made)
        check_study_name(name)
        study = load_or_create(
            study_name=name,
            storage=storage,
            sampler=settings.make_sampler(),
            pruner=make_pruner(settings.pruner, settings.epochs),
        )
        # In this order: another process that makes it sets them before it asks for a trial.
        has_trials = bool(study.get_trials(deepcopy=False))
        attributes = study.user_attrs
        settings_before = attributes.get("settings")
        if settings_before is None:
            if has_trials:
                where = without_passwords(settings.storage)
                raise ValueError(f"study {name!r} in {where} was not made by this tool")
            set_once(study, "id", uuid.uuid4().hex)
            settings_before = set_once(study, "settings", identity)
    before = (settings_before, identity), (attributes.get("made_with"), made)
    check_same(f"study {name!r}", *before)
    return study
