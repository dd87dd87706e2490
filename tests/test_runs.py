import gc
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tracking_helpers import COLOURS, ColourModel

from tracking.models.predictor import load_model
from tracking.models.recording import save_model

EXAMPLE = np.random.default_rng(0).integers(0, [255, 128, 64], (2, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def traced(monkeypatch):
    """The models that PyTorch has traced, in order."""
    models = []
    export = torch.export.export

    def noted(model, *args, **options):
        models.append(model)
        return export(model, *args, **options)

    monkeypatch.setattr(torch.export, "export", noted)
    return models


def save(model: nn.Module, folder: Path, example: np.ndarray = EXAMPLE) -> Path:
    save_model(model.eval(), folder, input_example=example, metadata={"classes": list(COLOURS)})
    return folder


def stored_graph(folder: Path) -> bytes:
    return (folder / "data" / "model.pt2").read_bytes()


def test_a_model_is_traced_once_and_stored_with_the_weights_that_it_has(tmp_path, traced):
    model = ColourModel(sharpness=1.0)
    expected = []
    for name, sharpness in {"first": 2.0, "second": 30.0}.items():
        model.load_state_dict({"scale": torch.tensor(sharpness)})
        save(model, tmp_path / name)
        expected.append(model(torch.from_numpy(EXAMPLE)).detach().numpy())
    assert traced == [model]
    for name, probabilities in zip(("first", "second"), expected, strict=True):
        got = load_model(str(tmp_path / name)).probabilities(EXAMPLE)
        np.testing.assert_array_equal(got, probabilities)
    assert not np.allclose(*expected)


def test_a_model_of_a_graph_that_was_traced_before_is_stored_in_the_same_bytes(tmp_path):
    used = ColourModel(sharpness=1.0)
    save(used, tmp_path / "used")
    used.load_state_dict({"scale": torch.tensor(2.0)})
    again = save(used, tmp_path / "again")
    fresh = save(ColourModel(sharpness=2.0), tmp_path / "fresh")
    assert stored_graph(again) == stored_graph(fresh)


def test_the_same_graph_is_the_same_bytes_whenever_it_is_stored(tmp_path, monkeypatch):
    model = ColourModel(sharpness=1.0)
    now = save(model, tmp_path / "now")
    monkeypatch.setattr(time, "time", lambda: 1.0e9)
    assert stored_graph(now) == stored_graph(save(model, tmp_path / "then"))


def replaced_weights(model: nn.Module) -> np.ndarray:
    model.scale = nn.Parameter(torch.tensor(9.0))
    return EXAMPLE


def another_example(model: nn.Module) -> np.ndarray:
    return EXAMPLE[:, ::-1].copy()


@pytest.mark.parametrize("change", [replaced_weights, another_example])
def test_what_was_traced_is_not_used_for(change, tmp_path, traced):
    model = ColourModel(sharpness=1.0)
    save(model, tmp_path / "before")
    example = change(model)
    after = save(model, tmp_path / "after", example)
    fresh = ColourModel(sharpness=float(model.scale.detach()))
    assert stored_graph(after) == stored_graph(save(fresh, tmp_path / "fresh", example))
    assert len(traced) == 3


def test_no_model_is_kept_alive_for_its_graph(tmp_path):
    model = ColourModel(sharpness=1.0)
    save(model, tmp_path / "model")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
