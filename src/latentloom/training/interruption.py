"""SIGTERM and Ctrl-C as a request to stop after the running step, once its state is saved."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_GESTURE = 2.0  # seconds


class TrainingStopped(KeyboardInterrupt):
    """A training stopped when it was asked to; its state is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + number  # as of a process that ends because of this signal


class StopRequest:
    """Within its block, SIGTERM and Ctrl-C only set ``number``; a second Ctrl-C interrupts at once.

    A launcher of several processes passes on the Ctrl-C that the terminal sent to each of them already, so a second
    one within ``ONE_GESTURE`` of the first does not count.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: none came
        self._asked_at = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._asked_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > ONE_GESTURE:
            raise KeyboardInterrupt
