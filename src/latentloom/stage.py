"""How a stage script starts and ends: params in, one closing line out, errors told to the person at the keyboard."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from latentloom.params import Params, load_params


def run_stage(name: str, main: Callable[[Params], str | None]) -> None:
    """Load ``params.yaml``, run ``main`` and print what it did, if it says so, and how long it took.

    Errors that a person can mend (``ValueError``, ``OSError``, ``ArithmeticError``) end the process with exit status 1
    and their message alone; so does a stage that was interrupted, with the status that its signal asks for. Anything
    else is a fault of ours and shows its traceback.
    """
    started = time.monotonic()
    try:
        line = main(load_params())
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as stop:
        print(f"{name}: {str(stop) or 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(getattr(stop, "exit_status", 130))
    if line:
        print(f"{name}: {line} ({time.monotonic() - started:.1f} s)", flush=True)


def project_root() -> Path:
    """The project's root, which DVC names in ``DVC_ROOT`` when it runs an experiment in a temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def state_folder(name: str) -> Path:
    """Where a stage keeps what only saves work, for all experiments alike; it may be deleted at any time."""
    return project_root() / ".state" / name


def state_limit() -> int:
    """The bytes that each folder of `.state` may hold besides what the last run used: ``LATENTLOOM_STATE_GIB``, or 50.

    Raises:
        ValueError: when it is not a number of GiB.
    """
    value = os.environ.get("LATENTLOOM_STATE_GIB") or "50"
    try:
        limit = int(float(value) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(f"LATENTLOOM_STATE_GIB={value} is not a number of GiB; try 50")
    return limit
