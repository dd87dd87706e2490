"""The models of trainings, recorded in MLflow: one graph for all that differ in weights only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cnn.config import TrainConfig
from cnn.data import Dataset
from cnn.losses import PROBABILITIES, get_loss
from cnn.networks import Classifier, build_network
from experiments.interrupts import InterruptionError, Interrupts

if TYPE_CHECKING:
    from tracking.runs import Run


class Models:
    """Records the models of trainings on a data set."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._classifiers: dict[tuple[str, str], Classifier] = {}

    def warm_up(self, config: TrainConfig, interrupts: Interrupts) -> None:
        """Export a model once and discard it, while the workers train their first trials.

        The first export of a process imports PyTorch's compiler, which takes seconds. A worker and
        a Ctrl-C would wait for it.
        """
        if "torch._dynamo" in sys.modules:
            return
        from tracking.models.recording import save_model

        model = self._classifier(config)
        classes = {"classes": self.data.classes}
        with suppress(InterruptionError), TemporaryDirectory() as scratch, interrupts.at_once():
            folder = Path(scratch, "model")
            save_model(model, folder, input_example=self._example(), metadata=classes)

    def record(
        self,
        run: Run,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray[Any, Any]],
        *,
        step: int,
        about: Mapping[str, object],
    ) -> None:
        """Record the model of a training that ended at a step, with what else to say about it."""
        model = self._classifier(config)
        state = {name: torch.from_numpy(values) for name, values in weights.items()}
        model.network.load_state_dict(state)
        run.log_model(
            model,
            input_example=self._example(),
            classes=self.data.classes,
            step=step,
            metadata={
                "dataset": self.data.name,
                "dataset_digest": self.data.digest,
                "loss": config.loss,
                "seed": config.seed,
                **about,
            },
        )

    def _classifier(self, config: TrainConfig) -> Classifier:
        """Return the model to record, without its weights: one for all trials with one graph.

        So a graph is exported once per sweep. That saves time, and PyTorch keeps each export.
        """
        kind = get_loss(config.loss).outputs_to_probabilities
        key = (config.network, kind)
        if key not in self._classifiers:
            network = build_network(
                len(self.data.classes),
                seed=0,
                name=config.network,
                image_size=self.data.image_size,
            )
            network.to(memory_format=torch.contiguous_format)  # as PyTorch stores weights
            self._classifiers[key] = Classifier(network, PROBABILITIES[kind]).eval()
        return self._classifiers[key]

    def _example(self) -> np.ndarray[Any, Any]:
        images, _ = self.data.validation.batch(torch.arange(2))
        return images.numpy()
