"""Parts run in processes of their own: what one of them does costs its own figures alone."""

import os
import time
from pathlib import Path

import pytest
from gpu.page import render
from gpu.parts import Job, Part, Record, Unmeasurable, run_parts
from on_gpu import ROOT, TINY


def well(job: Job, record: Record) -> None:
    record.add("row", value=1.5)


def raises(job: Job, record: Record) -> None:
    record.add("before", value=2)
    raise ValueError("a sentence\nand more")


def crashes(job: Job, record: Record) -> None:
    record.add("before", value=3)
    os._exit(7)


def lasts(job: Job, record: Record) -> None:
    record.add("before", value=4)
    time.sleep(60)


def cannot(job: Job, record: Record) -> None:
    raise Unmeasurable("no such thing here")


def rows_fail(job: Job, record: Record) -> None:
    record.measure("broken", lambda: {"value": 1 / 0})
    record.measure("late", lambda: {"value": 1}, needs=1000)
    record.measure("good", lambda: {"value": job.earlier["well"][0]["value"]})


@pytest.fixture
def run(tmp_path: Path):
    """``run((function, limit), …)`` runs parts of those functions; gives outcomes by name, and how often they grew."""

    def run(*functions, seconds: float = 60.0, reserve: float = 0.0, method: str = "fork"):
        job = Job("cpu", TINY, None, tmp_path, tmp_path, tmp_path, {})
        parts = [Part(function.__name__, "A sentence.", function, limit) for function, limit in functions]
        calls = []
        outcomes = run_parts(parts, job, seconds=seconds, reserve=reserve, method=method, changed=calls.append)
        return {outcome.name: outcome for outcome in outcomes}, len(calls)

    return run


def test_a_part_that_fails_crashes_or_lasts_too_long_keeps_its_rows_and_the_next_runs(run):
    outcomes, calls = run((well, 30), (raises, 30), (crashes, 30), (lasts, 1.5), (rows_fail, None))
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "well": "done",
        "raises": "failed",
        "crashes": "crashed",
        "lasts": "too long",
        "rows_fail": "done",
    }
    assert outcomes["raises"].why == "ValueError: a sentence"
    assert "exit code 7" in outcomes["crashes"].why
    kept = [outcomes[name].rows for name in ("raises", "crashes", "lasts")]
    assert kept == [[{"name": "before", "value": value}] for value in (2, 3, 4)]
    broken, late, good = outcomes["rows_fail"].rows
    assert (broken["error"], good["value"]) == ("ZeroDivisionError: division by zero", 1.5)
    assert "needs 1000 s" in late["skipped"]
    assert calls >= 5


def test_a_part_that_cannot_be_measured_here_says_why(run):
    outcomes, _ = run((well, 10), (cannot, 10))
    assert (outcomes["cannot"].status, outcomes["cannot"].why) == ("skipped", "no such thing here")


def test_time_that_is_kept_for_the_last_part_is_taken_by_no_other(run):
    outcomes, _ = run((well, 30), (lasts, 30), (rows_fail, None), seconds=5.0, reserve=3.0)
    assert outcomes["lasts"].status == "too long"
    assert outcomes["lasts"].seconds < 4.0
    assert outcomes["rows_fail"].status == "done"


@pytest.mark.slow
def test_where_the_first_part_fails_in_a_fork_all_run_in_new_interpreters(run, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "src", Path(__file__).parent)))
    )
    outcomes, _ = run((fails_in_a_fork, 30), (fails_in_a_fork_too, 30))
    assert [outcome.status for outcome in outcomes.values()] == ["done", "done"]


PARENT = os.getpid()


def fails_in_a_fork(job: Job, record: Record) -> None:
    if os.getppid() == PARENT:  # a new interpreter has imported this module itself
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    record.add("row", value=1)


def fails_in_a_fork_too(job: Job, record: Record) -> None:
    fails_in_a_fork(job, record)


def test_the_page_has_a_table_for_rows_alike_and_a_line_for_what_was_passed_over():
    rows = [
        {"name": "one", "images/s": 12_345.6, "holds": True},
        {"name": "two", "images/s": 1.25, "holds": False},
        {"name": "other", "steps": 1200},
        {"name": "broken", "error": "ValueError: no"},
        {"name": "late", "skipped": "needs 9 s, 1 s are left"},
    ]
    part = {"name": "step", "about": "A sentence.", "status": "done", "seconds": 3.2, "why": "", "rows": rows}
    page = render({"title": "Measured", "about": "Today.", "parts": [part]})
    assert page.splitlines() == [
        "# Measured",
        "",
        "Today.",
        "",
        "## step",
        "",
        "A sentence. (done; 3 s)",
        "",
        "|  | images/s | holds |",
        "| --- | --- | --- |",
        "| one | 12,346 | yes |",
        "| two | 1.25 | NO |",
        "",
        "|  | steps |",
        "| --- | --- |",
        "| other | 1,200 |",
        "",
        "- broken: ValueError: no",
        "- late: skipped: needs 9 s, 1 s are left",
    ]


def test_a_row_of_many_figures_is_a_table_of_its_own():
    row = {"name": "evaluation"} | {f"figure {number}": number for number in range(13)}
    part = {"name": "training", "about": "A sentence.", "status": "done", "seconds": 1.0, "why": "", "rows": [row]}
    lines = render({"title": "Measured", "about": "Today.", "parts": [part]}).splitlines()
    assert "| evaluation |  |" in lines and "| figure 12 | 12 |" in lines
