"""Write a sweep's metrics as TensorBoard event files, a folder for each trial."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from experiments.study import SweepEvent, TrialEnded, TrialProgressed, TrialStarted
from tracking.files import writing


class EventFiles(AbstractContextManager["EventFiles"]):
    """Write the metrics of each trial to `folder/<trial> <settings>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[int, SummaryWriter] = {}

    def show(self, event: SweepEvent) -> None:
        """Write what an event holds.

        Raises:
            NotNowError: the disk said no.
        """
        with writing("TensorBoard's event files"):
            self._write(event)

    def _write(self, event: SweepEvent) -> None:
        match event:
            case TrialStarted(trial=trial, config=config):
                name = f"{trial:03d} {config.loss} lr={config.learning_rate:.3g}"
                folder = self.folder / f"{name} bs={config.batch_size}"
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
