"""What a test may ask of a stage before it runs: limits and faults, set in the stage's own process, by name."""

import errno
import functools
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PNG_BYTES = 3000  # of a picture of 32x32 pixels of noise
DIED = 99  # the exit status of a stage that died at a write


def largest_file(size: int) -> None:
    """Let no file grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_bytecode(_: object = True) -> None:
    """Write no compiled modules: a small disk is for the stage's own files."""
    sys.dont_write_bytecode = True


def rows_per_shard(count: int) -> None:
    """Make shards small enough for tiny data to have several, whatever a row is: about so many at the fewest."""
    from latentloom import sharding

    ranges, size = sharding.shard_ranges, sharding.ShardBytes(count, count, 4 * count)
    sharding.shard_ranges = lambda ids, _, __, groups=None: ranges(ids, 1, size, groups)
    sharding.IMAGES = sharding.ShardBytes(*(PNG_BYTES * rows for rows in size))


def die_at_write(number: int) -> None:
    """End the process before the ``number``-th new name of any file, and clean nothing up."""
    _at_write(number, NAMES, lambda: os._exit(DIED))


def fail_at_write(number: int) -> None:
    """Let the ``number``-th step of any write fail, as on a full disk; those after it succeed."""
    _at_write(number, (*NAMES, "fsync"), _no_room)


def hold_at(pattern: str) -> None:
    """Let the stage wait where a file that matches has got its name, until a signal comes; ``HELD`` is there then."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    held = HELD.resolve()
    held.unlink(missing_ok=True)

    def holding(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            given = call(*arguments, **more)
            if Path(arguments[-1]).match(pattern) and not held.exists():
                held.touch()
                select.select([woken], [], [])
            return given

        return wrapper

    for step in NAMES:
        setattr(os, step, holding(getattr(os, step)))


HELD = Path("../held")
NAMES = ("replace", "rename", "link")  # what another process sees; a flush that follows shows it nothing new


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def writes_done() -> int:
    """How many steps of writing this process has made since ``die_at_write`` or ``fail_at_write`` began to count."""
    return _done


# Which write is which differs from run to run: a thread delivers to MLflow, and has tests of its own.
NOT_COUNTED = (".state/tracking", "mlartifacts", "mlflow.db")
_done = 0


def _at_write(number: int, steps: Sequence[str], act: Callable[[], None]) -> None:
    root = os.path.realpath(".")

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            global _done
            if call.__name__ == "fsync":
                path = os.path.realpath(f"/proc/self/fd/{arguments[0]}")
                counts = Path(path).is_dir()  # before a file's own flush, the disk looks as before its new name
            else:
                path, counts = os.path.realpath(os.fspath(arguments[-1])), True
            if counts and path.startswith(root) and not any(part in path for part in NOT_COUNTED):
                _done += 1
                if _done == number:
                    act()
            return call(*arguments, **more)

        return wrapper

    for step in steps:
        setattr(os, step, counted(getattr(os, step)))
