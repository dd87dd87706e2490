"""A sweep's metrics as TensorBoard event files, a folder for each trial."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from experiments.study.events import SweepEvent, TrialEnded, TrialProgressed, TrialStarted
from experiments.study.parameters import run_name
from experiments.study.space import Space
from tracking.files import writing


class EventFiles(AbstractContextManager["EventFiles"]):
    """Write the metrics of each trial to `folder/<name of its run>`."""

    def __init__(self, folder: Path, space: Space) -> None:
        self.folder, self.space = folder, space
        self.writers: dict[int, SummaryWriter] = {}

    def show(self, event: SweepEvent) -> None:
        """Write the metrics of an event.

        Raises:
            TransientError: the disk is full or can't be written.
        """
        with writing("TensorBoard's event files"):
            self._write(event)

    def _write(self, event: SweepEvent) -> None:
        match event:
            case TrialStarted(trial=trial, config=config):
                folder = self.folder / run_name(trial, self.space.varied(config))
                self.writers[trial] = SummaryWriter(str(folder))
                text = "\n".join(f"{k}: {v}  " for k, v in config.as_params().items())
                self.writers[trial].add_text("config", text)
            case TrialProgressed(trial=trial):
                for name, value in event.metrics.items():
                    self.writers[trial].add_scalar(name, value, event.number)
                self.writers[trial].flush()
            case TrialEnded(trial=trial):
                self.writers.pop(trial).close()

    def __exit__(self, *_: object) -> None:
        with writing("TensorBoard's event files"):
            for writer in self.writers.values():
                writer.close()
