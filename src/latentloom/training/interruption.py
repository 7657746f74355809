"""SIGTERM and Ctrl-C as a request to stop after the running step, once its state is saved."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(KeyboardInterrupt):
    """A training stopped when it was asked to; its state is saved.

    Attributes:
        exit_status: what a process that ends because of this signal tells its parent.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


class StopRequest:
    """Within its block, the first SIGTERM or Ctrl-C only sets ``number``; a second one acts as it would without us."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: nobody asked
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there Python takes signals
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
