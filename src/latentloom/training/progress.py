"""How far a training is: a bar on a terminal, and a line every half minute anywhere else, as in a log or a queue."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from latentloom.errors import notify

EVERY = 30.0  # seconds from one line to the next


class Progress:
    """Shows the steps of a training, from ``done`` to ``total``, on the standard error stream.

    Args:
        shown: False shows nothing, as in all processes of a job but the main one.
    """

    def __init__(self, done: int, total: int, *, shown: bool = True) -> None:
        self._total, terminal = total, sys.stderr.isatty()
        self._bar = tqdm(desc="train", initial=done, total=total, unit="step", disable=not (shown and terminal))
        self._lines = shown and not terminal
        self._last_step, self._last_time = done, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def step(self, step: int, mae: float | None) -> None:
        """``step`` steps are done; ``mae`` is the training error where it has been measured."""
        if mae is not None:
            self._bar.set_postfix(mae=mae, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._lines and now - self._last_time >= EVERY:
            rate = (step - self._last_step) / (now - self._last_time)
            left = tqdm.format_interval((self._total - step) / rate)
            error = "" if mae is None else f"mae {mae:.4f}, "
            notify(f"train: step {step} of {self._total}, {error}{rate:.3g} steps/s, {left} left")
            self._last_step, self._last_time = step, now
