"""Work on many items at once, with the results in the items' order whatever the number of workers.

The workers are threads: Pillow, zlib and hashlib let go of Python's lock while they work. Only a window of items is
under way at any time, so memory does not grow with their number, and a source is read no further than that ahead.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from latentloom.errors import UserError

VARIABLE = "LATENTLOOM_WORKERS"
WINDOW = 32  # items per worker: enough to keep it busy while a shard is flushed to the disk

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count() -> int:
    """The number in the environment's ``LATENTLOOM_WORKERS``, else that of the CPUs this process may use.

    Raises:
        UserError: when the variable holds no whole number from 1.
    """
    if text := os.environ.get(VARIABLE):
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"{VARIABLE}={text}: must be a whole number from 1, or unset for all CPUs")
        return int(text)
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function`` of each item, in the items' order; an exception of the function comes in its item's place.

    ``items`` is read in the calling thread alone.
    """
    pool = ThreadPoolExecutor(workers)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == workers * WINDOW:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
