"""Work on many items at once, with the results in the items' order whatever does the work, and wherever.

`ordered_map` is the one door. What stands behind it is told by the environment's ``LATENTLOOM_ENGINE``, never by the
params, since the results are the same:

    local   this process. Functions of an item alone run in threads: Pillow, zlib and hashlib let go of Python's lock
            while they work. Functions that need a state, such as an encoder, run one after another in the calling
            thread: an encoder uses the whole device, and all cores, by itself.
    ray     workers of a Ray cluster (`latentloom.engine_ray`): a process per core, or where there is a state, per GPU.

For both, only a window of items is under way at any time, so that memory does not grow with their number.

What a function must keep to, so that it may run on another machine: it, ``setup`` and the items are picklable (module
level functions, partials of them, dataclasses; no lambdas or open files); an item may be computed twice, as when a
worker was killed, so files are written atomically and under names that follow from the item; results are small. A state
may have a method ``halve_batches(times)``: it is called before an item at which so many workers have died, which is how
a lack of memory mostly shows.

Files. A machine may not see the project's disk. An item that reads or writes files names them in its attributes
``reads`` and ``writes`` (sequences of paths, both optional), and the function opens ``here(path)`` in place of
``path``. That is the path itself where the disk is seen; elsewhere it is a copy, brought before the function runs, and
what was written comes back and is put at ``path`` before the result is given.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from latentloom.errors import UserError

VARIABLE = "LATENTLOOM_ENGINE"
WORKERS = "LATENTLOOM_WORKERS"
WINDOW = 32  # items per worker: enough to keep it busy while a shard is flushed to the disk

Item = TypeVar("Item")
Result = TypeVar("Result")

_copies: dict[Path, Path] = {}  # in a worker that does not see the project's disk: of the item under way


def engine_name() -> str:
    """``local`` or ``ray``, as ``LATENTLOOM_ENGINE`` says.

    Raises:
        UserError: when it says something else.
    """
    name = os.environ.get(VARIABLE) or "local"
    if name not in ("local", "ray"):
        raise UserError(f"{VARIABLE}={name}: must be local or ray, or unset for local")
    return name


def worker_count() -> int:
    """The number in the environment's ``LATENTLOOM_WORKERS``, else that of the CPUs this process may use.

    Raises:
        UserError: when the variable holds no whole number from 1.
    """
    if text := os.environ.get(WORKERS):
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"{WORKERS}={text}: must be a whole number from 1, or unset for all CPUs")
        return int(text)
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def here(path: Path) -> Path:
    """Where a file of the item under way is on this machine: ``path`` itself where the project's disk is seen."""
    return _copies.get(path, path)


def ordered_map(
    function: Callable[..., Result],
    items: Iterable[Item],
    *,
    setup: Callable[[], Any] | None = None,
    redo: Callable[[Result], bool] | None = None,
) -> Iterator[Result]:
    """``function(item)`` of each item, in the items' order; an exception of the function comes in its item's place.

    Args:
        function: with ``setup``, it is called as ``function(state, item)``.
        items: read in the calling thread alone, and no further ahead than the window.
        setup: makes the state of a worker, once, before its first item.
        redo: which results of another process are computed again in this one, as it may see files that others do not.

    Raises:
        UserError: when the engine is none, is not installed or cannot be reached.
    """
    if engine_name() == "ray":
        from latentloom.engine_ray import ray_map

        return ray_map(function, items, setup, redo)
    if setup is None:
        return threaded_map(function, items, worker_count())
    return _one_by_one(function, items, setup)


def _one_by_one(function: Callable[..., Result], items: Iterable[Item], setup: Callable[[], Any]) -> Iterator[Result]:
    state = none = object()
    for item in items:
        state = setup() if state is none else state
        yield function(state, item)


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *, window: int | None = None
) -> Iterator[Result]:
    """As `ordered_map`, in threads of this process whatever the engine is; ``function`` need not be picklable.

    ``window``: items under way at any time, at most; `WINDOW` for each worker where None.
    """
    window = workers * WINDOW if window is None else window
    pool = ThreadPoolExecutor(workers)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == window:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
