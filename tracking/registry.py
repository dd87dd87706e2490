"""Registered models: a run's model as a version, and the alias `champion` on the best of them.

Every step can be taken again: what is killed anywhere ends, once it is started again, where it
would have ended undisturbed. `import tracking.registry` is quick: MLflow comes with the client.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tracking.errors import is_transient, one_line
from tracking.models.fetching import check_stored, digest_tags
from tracking.run_search import described, model_uri
from tracking.selection import DEFAULT_METRIC
from tracking.text import listed

if TYPE_CHECKING:
    import mlflow
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from tracking.retries import RetryingClient

CHAMPION = "champion"

HISTORY_TAG = "champions"
"""Of a registered model: the versions that were champion, the present one last."""

VERDICT_TAG = "verdict"
"""Of a version: why it is champion, or is not. Without one, it is still to be judged."""

MARK_TAG = "registered_by"
MARK = "cnn-loss-sweep"

# What has to be equal for two validation accuracies to be of the same images.
SAME = {"dataset_digest": "data set", "seed": "split seed"}
_PARAMS = ("dataset", *SAME, "loss", "learning_rate", "batch_size")

ALREADY_THERE = re.compile("UniqueViolation|UNIQUE constraint failed|Duplicate entry", re.I)
"""What databases say of a row that another process has made in the meantime."""

_HISTORY_LENGTH = 100
_NAME_LENGTH = 256


def default_name(dataset: str) -> str:
    """Return what models of a data set are registered as, unless the user says otherwise."""
    return f"cnn-{re.sub(r'[^A-Za-z0-9._-]+', '-', dataset).strip('-.') or 'images'}"[:_NAME_LENGTH]


def check_name(name: str) -> None:
    """Raise ValueError for a name that `models:/NAME@champion` could not name."""
    if not re.fullmatch(r"\w[\w .+-]*", name) or name != name.strip() or len(name) > _NAME_LENGTH:
        raise ValueError(
            f"{name!r} can't be a registered model's name: those begin with a letter, a digit or _ "
            f"and go on with these, spaces, and . + -; {_NAME_LENGTH} characters at most"
        )


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A version of a registered model, and whether it is the champion."""

    name: str
    version: int
    is_new: bool
    """Whether it was registered just now."""
    is_champion: bool
    why: str

    def __str__(self) -> str:
        before = "" if self.is_new else ", registered before"
        place = "the champion" if self.is_champion else "not the champion"
        return f"version {self.version} of {self.name}{before}: {place}, {self.why}"


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A registered model, which is made once there is a version of it."""

    client: mlflow.MlflowClient | RetryingClient
    name: str

    def register(self, run: Run) -> tuple[ModelVersion, bool]:
        """Return the version that a run's model is, and whether it is new. A run has only one.

        Raises:
            ValueError: the run has no model.
        """
        uri, about = model_uri(run), version_tags(run)
        model = self.client.get_logged_model(uri.removeprefix("models:/"))
        digests = digest_tags(model.tags)
        found = self._versions_of(run)
        is_new = not found
        if is_new:
            self._make()
            made = self.client.create_model_version(
                self.name,
                uri,
                run_id=run.info.run_id,
                tags=about | digests | {MARK_TAG: MARK},
                model_id=model.model_id,
            )
            # Looked for again: another process may have been first, or the answer to a first try
            # may have been lost on its way.
            found = self._versions_of(run) or [made]
        first, *twins = found
        for twin in twins:
            self._delete_twin(twin)
        if uri in (first.source, f"models:/{first.model_id}"):
            about |= digests
        missing = {key: value for key, value in about.items() if key not in first.tags}
        for key, value in missing.items():  # of a version that was made by hand
            self.client.set_model_version_tag(self.name, str(first.version), key, value)
        self._link(model, int(first.version))
        return first, is_new

    def register_best(self, run: Run) -> Promotion:
        """Register a run's model, and make it champion if it beats the present one.

        It is judged once: whoever goes back to another version by hand finds it there, although the
        same sweep is started again.
        """
        version, is_new = self.register(run)
        number = int(version.version)
        champion, _ = self._state()
        verdict = version.tags.get(VERDICT_TAG)
        if number == champion:
            is_champion, why = True, verdict or "as it was before"
            if verdict is None:
                self._set_verdict(number, why)
        elif verdict is not None:
            is_champion, why = False, verdict
        else:
            beats, why = self.judge(version_tags(run))
            is_champion = bool(beats)
            if is_champion:
                self._set_champion(number, why)
            else:
                self._set_verdict(number, why)
        return Promotion(
            name=self.name, version=number, is_new=is_new, is_champion=is_champion, why=why
        )

    def promote(self, version: int, *, force: bool = False) -> Promotion:
        """Make a version champion, whether it is better or not.

        Raises:
            ValueError: there is no such version, or, without `force`, it can't be compared with the
                present champion.
        """
        found = self.version(version)
        champion, _ = self._state()
        if champion == version:
            why = "as it was before: nothing was done"
        else:
            why = self._check(self._facts_of(found), force=force)
            self._set_champion(version, why)
        return Promotion(name=self.name, version=version, is_new=False, is_champion=True, why=why)

    def promote_run(self, run: Run, *, force: bool = False) -> Promotion:
        """Make the version champion that a run's model is, which is registered if it is none."""
        if not self._versions_of(run):
            self._check(
                version_tags(run), force=force
            )  # before there is a version that nobody wants
        version, is_new = self.register(run)
        standing = self.promote(int(version.version), force=force)
        return replace(standing, is_new=is_new)

    def rollback(self) -> Promotion:
        """Make the version champion that was it before the present one.

        Raises:
            ValueError: there is none.
        """
        champion, history = self._state()
        earlier = history if champion is None else history[:-1]
        if not earlier:
            present = "no version" if champion is None else f"only version {champion}"
            raise ValueError(f"nothing to go back to: {present} of {self.name} was champion")
        version = earlier[-1]
        self._check_stored(version)
        why = "after its alias was removed"
        if champion is not None:
            self._set_verdict(champion, f"rolled back to version {version}")
            why = f"after version {champion} was rolled back"
        # If only the alias is moved, the history that is left is read as is meant: see `_agreed`.
        self.client.set_registered_model_alias(self.name, CHAMPION, str(version))
        self._write_history(earlier)
        self._set_verdict(version, why)
        return Promotion(name=self.name, version=version, is_new=False, is_champion=True, why=why)

    def judge(self, about: Mapping[str, str]) -> tuple[bool | None, str]:
        """Return whether a model beats the champion, None if that can't be said; and why."""
        champion, _ = self._state()
        if champion is None:
            return True, "as there was none before"
        theirs = self._facts_of(self.version(champion))
        for key, what in SAME.items():
            if key not in about or key not in theirs:
                whose = f"version {champion}'s" if key in about else "its"
                return None, f"as {whose} {what} is not known"
            if about[key] != theirs[key]:
                return None, (
                    f"as the champion, version {champion}, is of another {what} "
                    f"({theirs[key]}, not {about[key]})"
                )
        mine, its = (_number(each.get(DEFAULT_METRIC)) for each in (about, theirs))
        if mine is None or its is None:
            whose = "it" if mine is None else f"version {champion}"
            return None, f"as {whose} has no {DEFAULT_METRIC}"
        if mine > its:
            return True, f"as its {DEFAULT_METRIC} {mine:.4g} beats version {champion}'s {its:.4g}"
        return False, (
            f"as its {DEFAULT_METRIC} {mine:.4g} is not above that of the champion, "
            f"version {champion}: {its:.4g}"
        )

    def version(self, number: int) -> ModelVersion:
        """Return a version, or raise ValueError if there is none with this number."""
        numbers = self.versions()
        if number not in numbers:
            shown = ", ".join(map(str, numbers[-8:])) or "none"
            raise ValueError(f"{self.name} has no version {number}: there are {shown}")
        return self.client.get_model_version(self.name, str(number))

    def versions(self) -> list[int]:
        """Return the numbers of all versions, the newest last; ValueError if there is no model."""
        self._model()
        return sorted(int(version.version) for version in self._search(f"name = '{self.name}'"))

    def _check(self, about: Mapping[str, str], *, force: bool) -> str:
        """Return why a version becomes champion by hand, unless it takes force."""
        try:
            beats, why = self.judge(about)
        except _NoModelError:
            return "by hand"
        if beats is None and not force:
            raise ValueError(
                f"not promoted, {why}: their accuracies can't be compared; --force promotes it all "
                "the same"
            )
        return f"by hand, {'' if beats else 'though '}{why.removeprefix('as ')}"

    def _set_champion(self, number: int, why: str) -> None:
        """Make a version champion."""
        self._check_stored(number)
        champion, history = self._state()
        if history[-1:] != [number]:
            history.append(number)
        self._write_history(history)
        if champion is not None:
            self._set_verdict(champion, f"as version {number} took its place")
        self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
        self._set_verdict(number, why)

    def _check_stored(self, number: int) -> None:
        """Raise ValueError for a version whose model was changed since it was recorded."""
        check_stored(self.client, f"models:/{self.name}/{number}")

    def _set_verdict(self, number: int, why: str) -> None:
        self.client.set_model_version_tag(self.name, str(number), VERDICT_TAG, why)

    def _state(self) -> tuple[int | None, list[int]]:
        """Return the champion, if there is one, and the versions that were, itself last."""
        model = self._model()
        alias = model.aliases.get(CHAMPION)
        champion = None if alias is None else int(alias)
        there = set(self.versions())
        try:
            noted = [int(number) for number in json.loads(model.tags.get(HISTORY_TAG, "[]"))]
        except (ValueError, TypeError):  # somebody wrote something else into it
            noted = []
        return champion, _agreed([number for number in noted if number in there], champion)

    def _write_history(self, history: list[int]) -> None:
        text = json.dumps(history[-_HISTORY_LENGTH:])
        self.client.set_registered_model_tag(self.name, HISTORY_TAG, text)

    def _make(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _model(self) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = self.client.search_registered_models(max_results=100)
            names = listed(sorted(model.name for model in found)) if found else "none"
            raise _NoModelError(
                f"there is no registered model {self.name!r}, only {names}; --run-id ID makes it"
            ) from error

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
        """Delete a second version of the same run, unless a user has made it or uses it."""
        used = {int(number) for number in self._model().aliases.values()}
        if twin.tags.get(MARK_TAG) == MARK and int(twin.version) not in used:
            from mlflow.exceptions import MlflowException

            with suppress(MlflowException):  # another process may have been first
                self.client.delete_model_version(self.name, str(twin.version))

    def _link(self, model: LoggedModel, number: int) -> None:
        """Have the run's own page show which version its model is, as MLflow does."""
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        entry = {"name": self.name, "version": number}
        entries = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        if not any(e["name"] == self.name and int(e["version"]) == number for e in entries):
            text = json.dumps([*entries, entry])
            self.client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: text})

    def _facts_of(self, version: ModelVersion) -> dict[str, str]:
        """Return what is known of a version: its tags, or its run's where it has none."""
        from mlflow.exceptions import MlflowException

        tags = dict(version.tags)
        if version.run_id and not {*SAME, DEFAULT_METRIC} <= set(tags):
            with suppress(MlflowException):  # the run may be gone
                return version_tags(self.client.get_run(version.run_id)) | tags
        return tags


class _NoModelError(ValueError):
    """There is no registered model of this name."""


def register_best(client: mlflow.MlflowClient | RetryingClient, run_id: str, name: str) -> str:
    """Offer a run's model to a registered model, and return a line on what came of it.

    A registry that refuses is no failure of what trained the model: that is said in the line, too.
    What may be otherwise later, a full disk or a server that is away, is raised.
    """
    from mlflow.exceptions import MlflowException

    for is_first in (True, False):
        try:
            return str(Registry(client=client, name=name).register_best(client.get_run(run_id)))
        except (MlflowException, ValueError) as error:
            if is_transient(error):
                raise
            # Another sweep of the study wrote the same at the same moment: it is there by now.
            if not (is_first and ALREADY_THERE.search(str(error))):
                return f"not as {name}: {one_line(error)}"
    raise AssertionError("the second try returns or raises")


def version_tags(run: Run) -> dict[str, str]:
    """Return the tags of a version: where a run's model is from, and how good it is."""
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    about: dict[str, Any] = {
        "run": described(run),
        "study": tags.get("study"),
        "trial": tags.get("trial"),
        "git_commit": tags.get("mlflow.source.git.commit"),
    }
    about |= {key: params.get(key) for key in _PARAMS}
    about |= {key: value for key, value in metrics.items() if key.startswith(("train/", "val/"))}
    return {key: str(value) for key, value in about.items() if value is not None}


def _agreed(history: list[int], champion: int | None) -> list[int]:
    """Return the history that agrees with the alias, which is what counts.

    The alias is the one before last where a process died between the two, on its way forth or back;
    any other was set by somebody else.
    """
    plain = [n for n, before in zip(history, [None, *history], strict=False) if n != before]
    if champion is None or plain[-1:] == [champion]:
        return plain
    if plain[-2:-1] == [champion]:
        return plain[:-1]
    return [*plain, champion]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
