"""Open a study or make it, and check that its settings, data and code are the same."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """Open the study of these settings, or make it: see `open_checked`.

    `storage` is that of the settings, if it is open already. Retries call `should_stop`.
    """
    return open_checked(
        "study",
        settings,
        data,
        storage or open_checked_storage(settings, should_stop),
        prefix=data.name,
        key="settings",
        fingerprint=settings.fingerprint(data),
        sampler=settings.make_sampler(),
        pruner=make_pruner(settings.pruner, settings.epochs),
    )


def open_checked_storage(settings: Settings, should_stop: Callable[[], bool]) -> TrialCache:
    """Open the storage of these settings; ValueError if it can't be opened."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    check_storage(settings.storage)
    retries = storage_retries(settings.tracking_timeout, should_stop)
    with storage_errors(settings.storage):
        return open_storage(settings.storage, retries)


def open_checked(
    what: str,
    settings: Settings,
    data: Dataset,
    storage: TrialCache,
    *,
    prefix: str,
    key: str,
    fingerprint: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
    unnamed: Sequence[str] = (),
    **options: Any,
) -> Study:
    """Open a study that records its fingerprint, or make it.

    The default name is a digest of fingerprint and code, so the same command finds the same study.

    Args:
        what: study or comparison, for messages.
        settings, data, storage: of the study.
        prefix: of the name that follows from the fingerprint.
        key: of the attribute that holds the fingerprint.
        fingerprint: all that must stay the same, beside the code.
        attributes: others of a new study.
        unnamed: the digests of the code that the default name does not follow from.
        **options: of the study, for Optuna.

    Raises:
        ValueError: the storage can't be used, or the study has another fingerprint.
    """
    made = settings.made_with(data)
    with storage_errors(settings.storage):
        named = {each: digest for each, digest in made.items() if each not in unnamed}
        name = settings.study or existing_name(storage, prefix, fingerprint, named)
        check_study_name(name)
        study = load_or_create(study_name=name, storage=storage, **options)
        # In this order: another process sets the attributes before it asks for a trial.
        has_trials = bool(study.get_trials(deepcopy=False))
        if key not in study.user_attrs:
            if has_trials:
                raise ValueError(
                    f"study {name!r} in {without_passwords(settings.storage)} was not made by "
                    f"this tool as a {what}: choose another --study"
                )
            set_once(study, "id", uuid.uuid4().hex)
            for each, value in {**(attributes or {}), key: fingerprint}.items():
                set_once(study, each, value)
        before = study.user_attrs
    check_same(
        f"{what} {name!r}",
        settings_before=before[key],
        settings=fingerprint,
        made_before=before.get("made_with"),
        made=made,
    )
    return study
