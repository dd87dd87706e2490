"""What a study is of, and what is refused when it changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from fake_pool import FakePool, trains
from mlflow import MlflowClient
from small_sweep import small_settings
from torch import Tensor, nn

import cnn.losses
import cnn.optimizers
import experiments.study.identity
from cnn.data import Dataset
from cnn.losses import LOSSES
from cnn.networks import CNN
from cnn.source import source_digest
from experiments.study.controller import sweep
from experiments.study.events import SweepStarted
from experiments.study.identity import (
    _digest_of_network,
    _git,
    code_state,
    differences,
    name_of,
    split_digest,
    training_digest,
)
from experiments.study.opening import open_study
from experiments.study.settings import Settings

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def settings(mlflow_store: str, tmp_path: Path) -> Settings:
    return small_settings(f"sqlite:///{tmp_path / 'optuna.db'}", trials=1)


@pytest.fixture(autouse=True)
def nothing_is_cached() -> Any:
    cached = _digest_of_network, training_digest, code_state, source_digest
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


class WithReLU(CNN):
    """The CNN, edited."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


def edit_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int, **_: Any) -> CNN:
        return WithReLU(num_classes)

    monkeypatch.setattr(experiments.study.identity, "build_network", build)
    _digest_of_network.cache_clear()


def edit_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(outputs: Tensor, labels: Tensor) -> Tensor:
        return 1.01 * nn.functional.cross_entropy(outputs, labels)

    edited = replace(LOSSES["cross_entropy"], function=shifted)
    monkeypatch.setitem(LOSSES, "cross_entropy", edited)
    training_digest.cache_clear()


def edit_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(num_images: int, *, seed: int, epoch: int) -> Tensor:
        return torch.arange(num_images).flip(0)

    monkeypatch.setattr(experiments.study.identity, "epoch_order", backwards)


def good(job: int, config: Any) -> float:
    return 0.9


def start(settings: Settings, data: Dataset) -> SweepStarted:
    events = list(sweep(settings, data, FakePool(trains(good))))
    assert isinstance(events[0], SweepStarted)
    return events[0]


@pytest.mark.parametrize("edit", [edit_network, edit_loss, edit_order])
def test_code_that_was_edited_makes_another_study(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch, edit: Any
) -> None:
    first = start(settings, coloured_noise)
    assert start(settings, coloured_noise).study == first.study
    edit(monkeypatch)
    second = start(settings, coloured_noise)
    assert second.study != first.study
    assert second.num_before == 0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edit_network, "another network"),
        (edit_loss, "another training of cross_entropy"),
        (edit_order, "another split of the data, or order"),
    ],
)
def test_a_named_study_is_refused_to_code_that_was_edited(
    settings: Settings,
    coloured_noise: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    edit: Any,
    said: str,
) -> None:
    settings = replace(settings, study="mine")
    start(settings, coloured_noise)
    edit(monkeypatch)
    with pytest.raises(ValueError, match=f"study 'mine' was made with {said}"):
        start(replace(settings, trials=2), coloured_noise)
    study = optuna.load_study(study_name="mine", storage=settings.storage)
    assert len(study.trials) == 1


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_study_that_is_older_than_this_goes_on(
    settings: Settings, coloured_noise: Dataset, name: str | None
) -> None:
    old_name = name or name_of(coloured_noise.name, settings.fingerprint(coloured_noise))
    settings = replace(settings, study=name)
    start(replace(settings, study=old_name), coloured_noise)
    forget(settings, old_name)
    assert start(replace(settings, trials=2), coloured_noise).study == old_name
    made = optuna.load_study(study_name=old_name, storage=settings.storage).user_attrs["made_with"]
    assert made == settings.made_with(coloured_noise)


def forget(settings: Settings, name: str) -> None:
    """Leave of a study what one has that was made before it noted its code."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(settings.storage)
    with engine.begin() as connection:
        keys = "('made_with', 'environment')"
        connection.execute(
            sqlalchemy.text(f"DELETE FROM study_user_attributes WHERE key IN {keys}")
        )
    engine.dispose()
    assert (
        "made_with" not in optuna.load_study(study_name=name, storage=settings.storage).user_attrs
    )


def test_runs_say_which_network_and_code_they_are_of(
    settings: Settings, coloured_noise: Dataset
) -> None:
    started = start(settings, coloured_noise)
    client = MlflowClient()
    runs = client.search_runs([started.experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.data.tags["code.commit"] == code_state()["commit"]
        assert run.data.tags["code.uncommitted"] == code_state()["uncommitted"]
        assert run.data.tags["code.torch"] == torch.__version__.partition("+")[0]
    networks = {run.data.params.get("network_digest") for run in runs}
    networks |= {run.data.params.get("sweep/network_digest") for run in runs}
    assert networks == {None, _digest_of_network("cnn", 3, 32)}


def test_another_commit_or_version_is_said(
    settings: Settings, coloured_noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(settings, coloured_noise).notes == ()
    other = {"commit": "f" * 40, "uncommitted": "cnn/networks.py"}
    monkeypatch.setattr(experiments.study.identity, "code_state", lambda: other)
    (note,) = start(replace(settings, trials=2), coloured_noise).notes
    assert note.startswith("this study was begun with another environment: commit ")
    assert "→ ffffffff, uncommitted" in note
    assert note.endswith("→ cnn/networks.py")


def test_code_that_no_digest_of_calls_sees_is_noted_though_git_sees_no_difference(
    settings: Settings, coloured_noise: Dataset, cnn_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loop of training, in a file that had changes before, too; or where there is no git.
    state = {"commit": "unknown", "uncommitted": "cnn/training.py"}
    monkeypatch.setattr(experiments.study.identity, "code_state", lambda: state)
    started = start(settings, coloured_noise)
    before = source_digest()
    (run, _) = MlflowClient().search_runs([started.experiment_id])
    assert run.data.tags["code.source"] == before
    edit(cnn_copy / "training.py", "stepper(images, labels)", "stepper(255 - images, labels)")
    (note,) = start(replace(settings, trials=2), coloured_noise).notes
    change = f"code in cnn {before[:8]} → {source_digest()[:8]}"
    assert note == f"this study was begun with another environment: {change}"


def test_comments_docstrings_and_layout_are_no_code(cnn_copy: Path) -> None:
    before = source_digest()
    edit(cnn_copy / "networks.py", "Three 5×5 convolutions", "Some convolutions")
    edit(cnn_copy / "networks.py", "import inspect\n", "# why\nimport inspect  # so\n\n")
    assert source_digest() == before
    edit(cnn_copy / "networks.py", "manual_seed(seed)", "manual_seed(seed + 1)")  # initial weights
    assert source_digest() != before


@pytest.fixture
def cnn_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of `cnn`, as they are read for their digest."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(cnn.__path__[0]), copy)
    monkeypatch.setattr(cnn, "__path__", [str(copy)])
    return copy


def edit(file: Path, old: str, new: str) -> None:
    """Put a text in place of another, and let the next digest read it."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    source_digest.cache_clear()


def test_what_an_older_study_does_not_note_is_no_difference() -> None:
    assert differences({"torch": "2.14"}, {"torch": "2.15", "new": "x"}) == "torch 2.14 → 2.15"
    assert differences({}, {"torch": "2.15"}) == ""


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_trains_in_its_own_way(loss: str) -> None:
    digests = {each: training_digest(each, "sgd", "one_cycle") for each in LOSSES}
    assert [each for each in LOSSES if digests[each] == digests[loss]] == [loss]


@pytest.mark.parametrize(
    ("name", "edited"),
    [
        ("OPTIMIZERS", {"sgd": cnn.optimizers.OPTIMIZERS["adam"]}),
        ("SCHEDULES", {"one_cycle": cnn.optimizers.cosine}),
    ],
)
def test_an_optimizer_or_schedule_that_was_edited_trains_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str, edited: dict[str, Any]
) -> None:
    before = training_digest("mse", "sgd", "one_cycle")
    training_digest.cache_clear()
    monkeypatch.setattr(experiments.study.identity, name, getattr(cnn.optimizers, name) | edited)
    assert training_digest("mse", "sgd", "one_cycle") != before


def test_weight_decay_is_part_of_what_an_optimizer_does() -> None:
    assert training_digest("mse", "adam", "constant") != training_digest("mse", "adamw", "constant")


# Recorded on an AMD EPYC and an Intel Xeon with PyTorch 2.15; another is another training.
KNOWN = {
    "network": "5970eabd9b74487685926bee2220bc0a",
    "split": "9b552e64bdeb7662ebc53aeb61508c46",
    "cross_entropy": "7d5e3277175dd29a2ddc4a74993c61b8",
    "l1": "acb5a90cca6e64d8934dfca56e6dc507",
    "mse": "02724dde5828abd60aa7525ffb452391",
}


def test_digests_are_the_same_on_every_machine_and_in_every_process(digits_cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cnn.data import load\n"
        "from experiments.study.identity import made_with\n"
        "from experiments.study.domains import Choices\n"
        "from experiments.study.space import Space\n"
        "space = Space(search={'loss': Choices(('cross_entropy', 'l1', 'mse'))},"
        " fixed={'learning_rate': 1, 'batch_size': 1})\n"
        "made = made_with(load('digits', data_dir=Path(sys.argv[1]), seed=0), space)\n"
        "print({'network': made['network'], 'split': made['split']} | made['training'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(digits_cache)],
        capture_output=True,
        check=True,
        cwd=REPOSITORY,
        text=True,
    )
    assert done.stdout.strip() == str(KNOWN)


def test_the_state_of_the_code_is_that_of_this_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    state = code_state()
    if _git("rev-parse", "HEAD") is not None:  # an archive that was unpacked has none
        assert len(state["commit"]) == 40
    monkeypatch.setattr(experiments.study.identity, "REPOSITORY", Path("/"))
    code_state.cache_clear()
    assert code_state() == {"commit": "unknown", "uncommitted": "unknown"}


def test_without_git_a_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_state()["commit"] == "unknown"


def test_changes_that_are_in_no_commit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)

    (tmp_path / "cnn").mkdir()
    git("init", "-q")
    (tmp_path / "cnn" / "networks.py").write_text("a = 1\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(experiments.study.identity, "REPOSITORY", tmp_path)
    assert code_state()["uncommitted"] == "none"
    code_state.cache_clear()
    (tmp_path / "notes.txt").write_text("not of the code")
    (tmp_path / "cnn" / "networks.py").write_text("a = 2\n")
    for number in range(6):
        (tmp_path / "cnn" / f"new{number}.py").touch()
    shown = "cnn/networks.py, cnn/new0.py, cnn/new1.py, cnn/new2.py, cnn/new3.py and 2 more"
    assert code_state()["uncommitted"] == shown


def test_a_study_opened_by_other_settings_is_refused(
    settings: Settings, coloured_noise: Dataset
) -> None:
    settings = replace(settings, study="mine")
    start(settings, coloured_noise)
    with pytest.raises(ValueError, match=r"made with other settings \(epochs 3 → 4\)"):
        open_study(replace(settings, epochs=4), coloured_noise)


def test_another_split_of_the_same_images_is_another_digest(coloured_noise: Dataset) -> None:
    swapped = replace(
        coloured_noise, train=coloured_noise.validation, validation=coloured_noise.train
    )
    assert split_digest(swapped) != split_digest(coloured_noise)
