"""Parts of a measurement that fail in a fork; a new interpreter imports this module in a moment."""

import os

from gpu.parts import Job, Record

PARENT = os.getpid()


def fails_in_a_fork(job: Job, record: Record) -> None:
    if os.getppid() == PARENT:  # a new interpreter has imported this module itself
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    record.add("row", value=1)


def fails_in_a_fork_too(job: Job, record: Record) -> None:
    fails_in_a_fork(job, record)
