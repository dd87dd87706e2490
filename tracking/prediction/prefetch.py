"""Prefetch in threads: read and decode images while the model is busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def prefetch(
    work: Callable[[Given], Made], pieces: Iterable[tuple[Given, float]], *, threads: int
) -> Iterator[Made]:
    """Call `work` on pieces in threads, and yield the results in order.

    Args:
        work: releases the interpreter's lock, as Pillow does while it decodes.
        pieces: each with a weight. The pieces in memory weigh 1 at most.
        threads: their number.
    """
    under_way: deque[tuple[Future[Made], float]] = deque()
    weight = 0.0
    with ThreadPoolExecutor(threads) as executor:
        try:
            for piece, its_weight in pieces:
                under_way.append((executor.submit(work, piece), its_weight))
                weight += its_weight
                while weight >= 1:
                    future, its_weight = under_way.popleft()
                    weight -= its_weight
                    yield future.result()
            while under_way:
                yield under_way.popleft()[0].result()
        finally:  # after an error, or if the caller stops early
            executor.shutdown(cancel_futures=True)
