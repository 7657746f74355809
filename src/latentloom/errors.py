"""What a person is told: the errors that they can fix, whose message alone is shown, and lines while work goes on.

Any other error is a bug, and shows its traceback.
"""

import sys


class UserError(ValueError):
    """Something that the person at the keyboard can fix: params, data, files, the environment.

    The message says what is wrong, where (file, row or key), and what to do. Stages and the command line show it
    without a traceback, and end with exit status 1.
    """


class WriteError(OSError, UserError):
    """A file could not be written, as on a full disk; the message names it, the room it needs and the room left."""

    def __str__(self) -> str:
        return str(self.strerror)


def notify(line: str) -> None:
    """Show a line beside the output, at once."""
    print(line, file=sys.stderr, flush=True)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, a machine's or a GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch's, of a CPU
