"""How far a training is, as a terminal and as a log show it."""

import io

import pytest

from latentloom.training.progress import Progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute_with_step_error_rate_and_time_left(clock, capsys):
    with Progress(100, 1000) as progress:
        for step in range(101, 201):
            clock[0] += 2
            progress.step(step, None if step < 120 else 0.5 - step / 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "train: step 115 of 1000, 0.5 steps/s, 29:30 left",
        "train: step 130 of 1000, mae 0.3700, 0.5 steps/s, 29:00 left",
    ]
    assert [line.split()[2] for line in lines] == ["115", "130", "145", "160", "175", "190"]


def test_a_terminal_gets_a_bar_that_counts_steps_and_no_lines(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(2, 8) as progress:
        for step in range(3, 9):
            clock[0] += 40
            progress.step(step, 0.25)
    shown = terminal.getvalue()
    assert "8/8" in shown and "step" in shown and "mae=0.25" in shown
    assert "image" not in shown and "left" not in shown


def test_the_other_processes_of_a_job_show_nothing(clock, capsys):
    with Progress(0, 2, shown=False) as progress:
        for step in (1, 2):
            clock[0] += 40
            progress.step(step, 0.25)
    assert capsys.readouterr().err == ""
