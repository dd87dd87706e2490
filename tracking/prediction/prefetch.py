"""Work done ahead in threads: what is read and decoded while the model is busy."""

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
    """Do work on pieces in threads, and yield the results in order.

    Args:
        work: holds no lock for long: Pillow lets others run while it decodes.
        pieces: each with its weight. They are taken while those under way weigh less than 1, so
            that what is kept in memory has a bound.
        threads: how many work at once.
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
        finally:  # an error, or nobody wants more
            executor.shutdown(cancel_futures=True)
