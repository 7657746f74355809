"""Made ahead by a thread: in order, not too far ahead, errors told where they belong, and no thread left behind."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from latentloom.training.prefetch import AHEAD, THREAD_NAME, made_ahead

CPU = torch.device("cpu")


def make(step: int) -> list[list[torch.Tensor]]:
    return [[torch.tensor(step)]]


def threads() -> int:
    return sum(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate())


def steps_of(items) -> list[int]:
    return [int(parts[0][0]) for parts in items]


@pytest.mark.parametrize("count", [0, 1, AHEAD, 20])
def test_every_step_comes_once_in_order_and_the_thread_ends(count):
    assert steps_of(made_ahead(make, range(5, 5 + count), CPU)) == list(range(5, 5 + count))
    assert threads() == 0


def test_no_more_is_made_ahead_than_agreed():
    made = []
    items = made_ahead(lambda step: made.append(step) or make(step), range(100), CPU)
    for taken in range(1, 6):
        next(items)
        deadline = time.monotonic() + 10
        while len(made) < taken + AHEAD and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # for what must not come
        assert made == list(range(taken + AHEAD))
    items.close()


def test_it_is_made_in_another_thread():
    makers = []
    list(made_ahead(lambda step: makers.append(threading.current_thread()) or make(step), range(3), CPU))
    assert threading.current_thread() not in makers


def test_an_error_reaches_the_consumer_where_it_is_due_and_ends_the_thread():
    def fails(step: int):
        if step == 4:
            raise OSError("the disk is gone")
        return make(step)

    items, seen = made_ahead(fails, range(10), CPU), []
    with pytest.raises(OSError, match="the disk is gone"):
        for parts in items:
            seen += steps_of([parts])
    assert seen == [0, 1, 2, 3]
    assert threads() == 0


def test_a_consumer_that_stops_ends_the_thread():
    items = made_ahead(make, range(10**9), CPU)
    next(items)
    assert threads() == 1
    items.close()
    assert threads() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_consumer_that_fails_ends_the_thread(error):
    def consume(items):
        for _ in items:
            raise error

    with pytest.raises(error):
        consume(made_ahead(make, range(10**9), CPU))
    assert threads() == 0


def test_a_process_ends_while_more_is_still_to_be_made():
    script = "import test_prefetch as t; items = t.made_ahead(t.make, range(10**9), t.CPU); next(items); print('first')"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\n", "")
