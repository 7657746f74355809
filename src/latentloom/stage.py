"""How a stage script starts and ends: params in, one closing line out, errors for the person at the keyboard."""

import os
import sys
import time
from collections.abc import Callable

from latentloom.errors import UserError, notify
from latentloom.params import Params
from latentloom.params_file import load_params


def use_utf8() -> None:
    """Start this process anew in Python's UTF-8 mode, where the locale is another.

    Names of files would be other texts in it, and so other keys, and messages could not be printed.
    """
    if sys.getfilesystemencoding() != "utf-8":
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run_stage(name: str, main: Callable[[Params], str | None]) -> None:
    """Load ``params.yaml``, run ``main`` and print what it did, if it says so, and how long it took.

    A ``UserError`` ends the process with exit status 1 and its message alone; so does a stage that was interrupted,
    with the status that its signal asks for. Anything else is a bug and shows its traceback.
    """
    use_utf8()
    started = time.monotonic()
    try:
        line = main(load_params())
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as stop:
        notify(f"{name}: {str(stop) or 'interrupted'}")
        sys.exit(getattr(stop, "exit_status", 130))
    if line:
        print(f"{name}: {line} ({time.monotonic() - started:.1f} s)", flush=True)
