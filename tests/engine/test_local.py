"""Work on all cores: the order, the window, the errors, the state of a worker."""

import itertools
import os
import sys
import threading

import pytest

from latentloom.engine import WINDOW, engine_name, ordered_map, threaded_map, worker_count
from latentloom.errors import UserError


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(workers):
    late = threading.Event()

    def square(number: int) -> int:
        if number == 0 and workers > 1:
            assert late.wait(10)  # the first is done after the second
        if number == 1:
            late.set()
        return number**2

    assert list(threaded_map(square, range(300), workers)) == [number**2 for number in range(300)]


@pytest.mark.parametrize(("workers", "window"), [(1, None), (2, None), (4, None), (4, 3)])
def test_items_are_read_no_further_ahead_than_the_window_and_in_the_calling_thread(workers, window):
    read = []

    def items():
        for number in itertools.count():
            read.append(threading.current_thread())
            yield number

    results = threaded_map(lambda number: number, items(), workers, window=window)
    for number in range(500):
        assert next(results) == number
        assert len(read) - number <= (window or workers * WINDOW)
    results.close()
    assert set(read) == {threading.current_thread()}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_in_its_items_place(workers):
    results = threaded_map(lambda number: 1 // (3 - number), range(9), workers)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_as_many_work_at_once_as_are_asked_for():
    together = threading.Barrier(3, timeout=10)
    list(threaded_map(lambda _: together.wait(), range(3), 3))  # a barrier of three breaks with fewer threads


def test_the_environment_decides_the_number_of_workers(monkeypatch):
    monkeypatch.setenv("LATENTLOOM_WORKERS", "3")
    assert worker_count() == 3
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("LATENTLOOM_WORKERS", wrong)
        with pytest.raises(UserError, match=f"LATENTLOOM_WORKERS={wrong}: must be a whole number from 1"):
            worker_count()
    monkeypatch.delenv("LATENTLOOM_WORKERS")
    assert 1 <= worker_count() <= os.cpu_count()


def test_a_state_is_made_once_and_only_for_items():
    made = []

    def setup() -> int:
        made.append(10)
        return 10

    assert list(ordered_map(lambda ten, number: ten + number, range(3), setup=setup)) == [10, 11, 12]
    assert list(ordered_map(lambda ten, number: ten + number, (), setup=setup)) == []
    assert made == [10]


def test_an_unknown_engine_is_rejected_by_name(monkeypatch):
    monkeypatch.setenv("LATENTLOOM_ENGINE", "spark")
    with pytest.raises(UserError, match="LATENTLOOM_ENGINE=spark: must be local or ray"):
        engine_name()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a CPU")
def test_only_the_cpus_that_this_process_may_use_count(monkeypatch):
    monkeypatch.delenv("LATENTLOOM_WORKERS", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert worker_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_without_ray_installed_the_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("LATENTLOOM_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "latentloom.engine_ray", raising=False)
    with pytest.raises(UserError, match=r'pip install "latentloom\[ray\]"'):
        ordered_map(abs, range(3))
