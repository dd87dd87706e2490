"""A worker process: it trains the jobs that it receives over a pipe, and sends events back.

`processes.py` starts it as `python -m experiments.engine.process_worker FD`, without a fork: its
environment (threads, allocator) must be set before it starts, and PyTorch's threads do not survive
a fork. A thread waits on the pipe, so that the worker ends with the main process.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.engine.base import JobFailed
from experiments.engine.checkpoints import Checkpoints
from experiments.engine.job import set_arithmetic, train_job

if TYPE_CHECKING:
    from cnn.cache import FileStates
    from cnn.data import Dataset


@dataclass(frozen=True, kw_only=True)
class DataReference:
    """Where a worker finds the data set: in the cache of `cnn.data`.

    The seed of a training is also the seed of its split.
    """

    digest: str
    data_dir: Path
    checked: FileStates | None = None  # see `cnn.data.open_cached`
    working_dir: Path = Path()  # that of the main process: a user's own code may be there
    has_checkpoints: bool = True  # whether trainings resume from checkpoints, and write them

    def open(self, seed: int) -> Dataset:
        """Return the data set, split with a seed."""
        from cnn.data import open_cached

        return open_cached(self.digest, self.data_dir, seed, checked=self.checked)

    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints of trainings on it."""
        return Checkpoints(digest=self.digest, data_dir=self.data_dir)


def _listen(connection: Connection, inbox: queue.SimpleQueue[Any], stopped: set[int]) -> None:
    """Receive messages during training: a stop, or the end of the main process."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the main process is gone
        if isinstance(message, int):
            stopped.add(message)
            continue
        if isinstance(message, tuple):
            stopped.discard(message[0])  # a stopped job can be submitted again
        inbox.put(message)


def main(argv: Sequence[str]) -> None:
    """Train the jobs from the connection until it closes."""
    connection = Connection(int(argv[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stopped: set[int] = set()
    threading.Thread(target=_listen, args=(connection, inbox, stopped), daemon=True).start()

    import cnn.training  # noqa: F401 - while the main process prepares the data

    set_arithmetic(int(os.environ["OMP_NUM_THREADS"]))
    reference: DataReference = inbox.get()
    os.chdir(reference.working_dir)
    opened = lru_cache(maxsize=1)(reference.open)
    checkpoints = reference.checkpoints()
    opened(0)  # an error here ends the worker and costs no trial
    while True:
        job, config = inbox.get()
        keeps = reference.has_checkpoints
        try:
            for event in train_job(
                job,
                config,
                opened(config.seed),
                checkpoint=checkpoints.read(config) if keeps else None,
                keep=partial(checkpoints.write, config) if keeps else None,
                should_stop=partial(stopped.__contains__, job),
            ):
                connection.send(event)
        except Exception as error:
            connection.send(JobFailed.from_error(error, job))


if __name__ == "__main__":
    main(sys.argv[1:])
