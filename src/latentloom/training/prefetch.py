"""Batches made ahead by a thread, so that reading and copying them hides behind the steps before.

On CUDA the thread works on a stream of its own, and hands a batch over when it is complete.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

AHEAD = 2  # steps
THREAD_NAME = "batches-ahead"

Parts = TypeVar("Parts", bound=Sequence[Iterable[torch.Tensor]])


def made_ahead(make: Callable[[int], Parts], steps: Iterable[int], device: torch.device) -> Iterator[Parts]:
    """Yield ``make(step)`` for each of ``steps``, in order; a thread makes at most ``AHEAD`` of them in advance.

    The thread lives from the first item asked for until the last one was given, or the iterator is closed. What
    ``make`` raises is raised here, where its item is due.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # where what `make` reads may still be written

    def complete(step: int) -> Parts:
        with torch.cuda.stream(stream) if stream else nullcontext():
            parts = make(step)
        if stream:
            stream.synchronize()
        return parts

    waiting: deque[Future[Parts]] = deque()

    def next_parts() -> Parts:
        parts = waiting.popleft().result()
        if stream:  # their memory is the stream's own: it must not be used again before the consumer has done with it
            consumer = torch.cuda.current_stream(device)
            for tensors in parts:
                for tensor in tensors:
                    tensor.record_stream(consumer)
        return parts

    # An executor's thread waits for work, never for a place to put it, so it cannot keep a process from ending.
    thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)
    threads = torch.get_num_threads()
    thread.submit(_compute_alone).result()
    torch.set_num_threads(threads)  # for all but that thread
    try:
        for step in steps:
            waiting.append(thread.submit(complete, step))
            if len(waiting) > AHEAD:
                yield next_parts()
        while waiting:
            yield next_parts()
    finally:
        for future in waiting:
            future.cancel()
        thread.shutdown()


def _compute_alone() -> None:
    """Let this thread have no helpers of its own: waiting for work they would spin, and slow the training's own."""
    torch.get_num_threads()  # what a thread inherits it takes over at its first look, here and not later
    torch.set_num_threads(1)
