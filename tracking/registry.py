"""Registered models: a run's model becomes a version; the best one has the alias `champion`.

Every step can be repeated: a process killed anywhere and started again ends in the same state.
`import tracking.registry` is quick: functions import MLflow when called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracking.errors import is_transient, one_line, refusals_ignored
from tracking.model_texts import (
    SAME,
    model_description,
    number_of,
    version_description,
    version_tags,
)
from tracking.models.fetching import check_stored, digest_tags
from tracking.run_search import model_uri
from tracking.store import DEFAULT_METRIC, none_if_missing
from tracking.text import listed

if TYPE_CHECKING:
    import mlflow
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from tracking.retries import RetryingClient

CHAMPION = "champion"

HISTORY_TAG = "champions"
"""The tag of a registered model that lists its champions, the present one last."""

VERDICT_TAG = "verdict"
"""The tag of a version that says why it is champion or not. Without it, no one compared it yet."""

MARK_TAG = "registered_by"
MARK = "cnn-loss-sweep"

ALREADY_THERE = re.compile("UniqueViolation|UNIQUE constraint failed|Duplicate entry", re.I)
"""The error of a database if another process has inserted the same row."""

_HISTORY_LENGTH = 100
_NAME_LENGTH = 256


def default_name(dataset: str) -> str:
    """Return the default name of the registered model for a data set."""
    return f"cnn-{re.sub(r'[^A-Za-z0-9._-]+', '-', dataset).strip('-.') or 'images'}"[:_NAME_LENGTH]


def check_name(name: str) -> None:
    """Raise ValueError for a name that `models:/NAME@champion` does not allow."""
    if not re.fullmatch(r"\w[\w .+-]*", name) or name != name.strip() or len(name) > _NAME_LENGTH:
        raise ValueError(
            f"{name!r} can't be a registered model's name: it must begin with a letter, a digit or "
            f"_, then have these, spaces, and . + - only; {_NAME_LENGTH} characters at most"
        )


@dataclass(frozen=True)
class Promotion:
    """A version of a registered model, and whether it is the champion."""

    name: str
    version: int
    is_new: bool
    """Whether this call registered it."""
    is_champion: bool
    why: str

    def __str__(self) -> str:
        before = "" if self.is_new else ", registered before"
        place = "the champion" if self.is_champion else "not the champion"
        return f"version {self.version} of {self.name}{before}: {place}, {self.why}"


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A registered model. The first version creates it."""

    client: mlflow.MlflowClient | RetryingClient
    name: str

    def register(self, run: Run) -> tuple[ModelVersion, bool]:
        """Register a run's model once; return its version, and whether it is new."""
        uri, about = model_uri(run), version_tags(run)
        model = self.client.get_logged_model(uri.removeprefix("models:/"))
        digests = digest_tags(model.tags)
        found = self._versions_of(run)
        is_new = not found
        if is_new:
            self._create()
            made = self.client.create_model_version(
                self.name,
                uri,
                run_id=run.info.run_id,
                tags=about | digests | {MARK_TAG: MARK},
                model_id=model.model_id,
            )
            # Another process, or a first try whose answer was lost, may have registered it too.
            found = self._versions_of(run) or [made]
        first, *twins = found
        for twin in twins:
            self._delete_twin(twin)
        if uri in (first.source, f"models:/{first.model_id}"):
            about |= digests
        missing = {key: value for key, value in about.items() if key not in first.tags}
        for key, value in missing.items():  # the version was registered by hand
            self.client.set_model_version_tag(self.name, str(first.version), key, value)
        self._link(model, int(first.version))
        self._describe(first, {**first.tags, **about})
        return first, is_new

    def _describe(self, version: ModelVersion, about: Mapping[str, str]) -> None:
        """Describe a version and its model, unless they have descriptions."""
        number = int(version.version)
        if not version.description:
            text = version_description(self.name, number, about)
            with refusals_ignored():
                self.client.update_model_version(self.name, str(number), description=text)
        if not self._model().description:
            with refusals_ignored():
                text = model_description(self.name, about)
                self.client.update_registered_model(self.name, description=text)

    def register_best(self, run: Run) -> Promotion:
        """Register a run's model, and make it champion if it beats the present one.

        Each version is compared once. So if a user promotes another one by hand, a restart of the
        same sweep does not undo it.
        """
        version, is_new = self.register(run)
        number = int(version.version)
        champion, _ = self._state()
        why = version.tags.get(VERDICT_TAG)
        is_champion = number == champion
        if why is None:
            beats, why = None, "as it was before"
            if not is_champion:
                beats, why = self.judge(version_tags(run))
            if beats:
                is_champion = True
                self._set_champion(number, why)
            else:
                self._set_verdict(number, why)
        return self._promotion(number, why, is_new=is_new, is_champion=is_champion)

    def promote(self, version: int, *, force: bool = False) -> Promotion:
        """Make a version champion, even if it is not better.

        Raises ValueError if it can't be compared with the present champion, unless `force` is set.
        """
        found = self.version(version)
        champion, _ = self._state()
        if champion == version:
            why = "as it was before: nothing was done"
        else:
            why = self._check(self._tags_of(found), force=force)
            self._set_champion(version, why)
        return self._promotion(version, why)

    def promote_run(self, run: Run, *, force: bool = False) -> Promotion:
        """Make a run's model champion; register it first if it is new."""
        if not self._versions_of(run):  # a refusal must not leave a new version behind
            self._check(version_tags(run), force=force)
        version, is_new = self.register(run)
        return replace(self.promote(int(version.version), force=force), is_new=is_new)

    def rollback(self) -> Promotion:
        """Make the previous champion the champion again, or raise ValueError if there is none."""
        champion, history = self._state()
        earlier = history if champion is None else history[:-1]
        if not earlier:
            present = "no version" if champion is None else f"only version {champion}"
            raise ValueError(f"can't roll back: {present} of {self.name} was champion")
        version = earlier[-1]
        check_stored(self.client, f"models:/{self.name}/{version}")
        why = "after its alias was removed"
        if champion is not None:
            self._set_verdict(champion, f"rolled back to version {version}")
            why = f"after version {champion} was rolled back"
        # A process may die after this line: `_agreed` then corrects the history.
        self.client.set_registered_model_alias(self.name, CHAMPION, str(version))
        self._write_history(earlier)
        self._set_verdict(version, why)
        return self._promotion(version, why)

    def judge(self, about: Mapping[str, str]) -> tuple[bool | None, str]:
        """Return whether a model beats the champion, None if they can't be compared; and why."""
        champion, _ = self._state()
        if champion is None:
            return True, "as there was none before"
        theirs = self._tags_of(self.version(champion))
        for key, what in SAME.items():
            if key not in about or key not in theirs:
                whose = f"version {champion}'s" if key in about else "its"
                return None, f"as {whose} {what} is not known"
            if about[key] != theirs[key]:
                return None, (
                    f"as the champion, version {champion}, is of another {what} "
                    f"({theirs[key]}, not {about[key]})"
                )
        mine, its = (number_of(each.get(DEFAULT_METRIC)) for each in (about, theirs))
        if mine is None or its is None:
            whose = "it" if mine is None else f"version {champion}"
            return None, f"as {whose} has no {DEFAULT_METRIC}"
        if mine > its:
            return True, f"as its {DEFAULT_METRIC} {mine:.4g} beats version {champion}'s {its:.4g}"
        return False, (
            f"as its {DEFAULT_METRIC} {mine:.4g} is not above that of the champion, "
            f"version {champion}: {its:.4g}"
        )

    def champion(self) -> int | None:
        """Return the champion, None if there is none; ValueError without the registered model."""
        return self._state()[0]

    def tags(self) -> dict[int, dict[str, str]]:
        """Return the tags of each version; those that are missing are taken from its run."""
        found = self._search(f"name = '{self.name}'")
        return {int(version.version): self._tags_of(version) for version in found}

    def version(self, number: int) -> ModelVersion:
        """Return a version, or raise ValueError if there is none with this number."""
        numbers = self.versions()
        if number not in numbers:
            shown = ", ".join(map(str, numbers[-8:])) or "none"
            raise ValueError(f"{self.name} has no version {number}: there are {shown}")
        return self.client.get_model_version(self.name, str(number))

    def versions(self) -> list[int]:
        """Return the numbers of all versions, the newest last, or raise ValueError."""
        self._model()
        return sorted(int(version.version) for version in self._search(f"name = '{self.name}'"))

    def _check(self, about: Mapping[str, str], *, force: bool) -> str:
        """Return why a version becomes champion by hand, or raise ValueError if it needs force."""
        try:
            beats, why = self.judge(about)
        except _NoModelError:
            return "by hand"
        if beats is None and not force:
            raise ValueError(
                f"not promoted, {why}: their accuracies can't be compared; --force promotes it "
                "anyway"
            )
        return f"by hand, {'' if beats else 'though '}{why.removeprefix('as ')}"

    def _set_champion(self, number: int, why: str) -> None:
        check_stored(self.client, f"models:/{self.name}/{number}")
        champion, history = self._state()
        if history[-1:] != [number]:
            history.append(number)
        self._write_history(history)
        if champion is not None:
            self._set_verdict(champion, f"as version {number} took its place")
        self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
        self._set_verdict(number, why)

    def _promotion(
        self, version: int, why: str, *, is_new: bool = False, is_champion: bool = True
    ) -> Promotion:
        return Promotion(self.name, version, is_new, is_champion, why)

    def _set_verdict(self, number: int, why: str) -> None:
        self.client.set_model_version_tag(self.name, str(number), VERDICT_TAG, why)

    def _state(self) -> tuple[int | None, list[int]]:
        """Return the champion, None if there is none, and all champions, the present one last."""
        model = self._model()
        alias = model.aliases.get(CHAMPION)
        champion = None if alias is None else int(alias)
        existing = set(self.versions())
        try:
            noted = [int(number) for number in json.loads(model.tags.get(HISTORY_TAG, "[]"))]
        except (ValueError, TypeError):  # a user wrote something else into the tag
            noted = []
        return champion, _agreed([number for number in noted if number in existing], champion)

    def _write_history(self, history: list[int]) -> None:
        text = json.dumps(history[-_HISTORY_LENGTH:])
        self.client.set_registered_model_tag(self.name, HISTORY_TAG, text)

    def _create(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _model(self) -> RegisteredModel:
        model = none_if_missing(lambda: self.client.get_registered_model(self.name))
        if model is None:
            found = self.client.search_registered_models(max_results=100)
            names = listed(sorted(model.name for model in found)) if found else "none"
            raise _NoModelError(
                f"there is no registered model {self.name!r}, only {names}; --run-id ID makes it"
            )
        return model

    def _versions_of(self, run: Run) -> list[ModelVersion]:
        found = self._search(f"name = '{self.name}' and run_id = '{run.info.run_id}'")
        return sorted(found, key=lambda version: int(version.version))

    def _search(self, clause: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self.client.search_model_versions(clause, max_results=200, page_token=token)
            found, token = [*found, *page], page.token
            if not token:
                return found

    def _delete_twin(self, twin: ModelVersion) -> None:
        """Delete a second version of the same run, unless a user registered or uses it."""
        used = {int(number) for number in self._model().aliases.values()}
        if twin.tags.get(MARK_TAG) == MARK and int(twin.version) not in used:
            from mlflow.exceptions import MlflowException

            with suppress(MlflowException):  # another process may have deleted it
                self.client.delete_model_version(self.name, str(twin.version))

    def _link(self, model: LoggedModel, number: int) -> None:
        """Let the page of the run show the version of its model, as MLflow does."""
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        entry = {"name": self.name, "version": number}
        entries = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        if not any(e["name"] == self.name and int(e["version"]) == number for e in entries):
            text = json.dumps([*entries, entry])
            self.client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: text})

    def _tags_of(self, version: ModelVersion) -> dict[str, str]:
        """Return the tags of a version; those that are missing are taken from its run."""
        from mlflow.exceptions import MlflowException

        tags = dict(version.tags)
        if version.run_id and not {*SAME, DEFAULT_METRIC} <= set(tags):
            with suppress(MlflowException):  # the run may be deleted
                return version_tags(self.client.get_run(version.run_id)) | tags
        return tags


class _NoModelError(ValueError):
    """There is no registered model of this name."""


def register_best(client: mlflow.MlflowClient | RetryingClient, run_id: str, name: str) -> str:
    """Register a run's model, promote it if it is better, and return the result in a line.

    The line also reports a refusal, which must not end a sweep. Transient errors are raised.
    """
    from mlflow.exceptions import MlflowException

    for is_first in (True, False):
        try:
            return str(Registry(client=client, name=name).register_best(client.get_run(run_id)))
        except (MlflowException, ValueError) as error:
            if is_transient(error):
                raise
            # Another sweep of the same study may have written it at the same moment: retry once.
            if not (is_first and ALREADY_THERE.search(str(error))):
                return f"not as {name}: {one_line(error)}"
    raise AssertionError("the second try returns or raises")


def _agreed(history: list[int], champion: int | None) -> list[int]:
    """Return the history corrected by the alias, which decides who is champion.

    If the alias is the last but one, a process died between its two writes. Any other alias was set
    by a user.
    """
    plain = [n for n, before in zip(history, [None, *history], strict=False) if n != before]
    if champion is None or plain[-1:] == [champion]:
        return plain
    if plain[-2:-1] == [champion]:
        return plain[:-1]
    return [*plain, champion]
