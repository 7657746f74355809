"""Parts of a measurement, each in a process of its own, with a time limit and a file to which it writes at once.

A part that raises, crashes, or outlasts its limit costs its own figures alone: what it measured before is kept, its
error stands beside it, and the next part starts on a device that nobody holds.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 10.0  # seconds between asking a part to stop and killing it


@dataclass(frozen=True)
class Preset:
    """A file of params, and sections of which some values are others: ``{"train": {"steps": 6}}``."""

    path: Path
    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        widths, depth, rows: of the network whose steps and samples are measured, and of its synthetic data.
        batches: of the training step, the most important first.
        matrices: sides of the matrix products that the device is measured with.
        seconds: how long one figure is measured, at least.
        pictures, samples, steps: sampled at once, sampled in all, and in how many steps each.
        presets: to train, the largest first.
        fewest_steps: a preset is trained where so many of its steps fit into the time.
        closing: seconds that are kept for what follows a training: weights, evaluation, the sheet.
    """

    widths: tuple[int, ...]
    depth: int
    rows: int
    batches: tuple[int, ...]
    matrices: tuple[int, ...]
    seconds: float
    pictures: int
    samples: int
    steps: int
    presets: tuple[Preset, ...]
    fewest_steps: int
    closing: float


@dataclass(frozen=True)
class Job:
    """What a part is given.

    Attributes:
        device: its name.
        sizes: of what is measured.
        carry: the folder that `carry` made; None where there is none.
        out, weights: folders for what is taken along.
        work: a folder for what is needed meanwhile, or to resume.
        earlier: the rows of the parts before, by name.
    """

    device: str
    sizes: Sizes
    carry: Path | None
    out: Path
    weights: Path
    work: Path
    earlier: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


class Unmeasurable(Exception):
    """A part, or a row of one, cannot be measured here; the message says why."""


class Record:
    """The rows that a part has measured so far, in a file of JSON lines; each is on the disk when `add` returns."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline

    def left(self) -> float:
        """The seconds that this part has left."""
        return self.deadline - time.monotonic()

    def add(self, name: str, **figures: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name} | figures) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measure(self, name: str, action: Callable[[], dict[str, Any]], *, needs: float = 0.0) -> None:
        """Add the figures of ``action``, or why there are none: no time for ``needs`` seconds, or an error."""
        if self.left() < needs:
            self.add(name, skipped=f"needs {needs:.0f} s, {max(self.left(), 0.0):.0f} s are left")
            return
        try:
            figures = action()
        except Unmeasurable as error:
            self.add(name, skipped=str(error))
        except Exception as error:  # whatever it is, the next row may be well
            self.add(name, error=first_line(error))
        else:
            self.add(name, **figures)

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # its writer was killed within it
                continue
        return rows


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Attributes:
        name: of the part.
        about: a sentence for the page.
        run: measures; must be importable by name.
        limit: seconds; None: all that is left.
    """

    name: str
    about: str
    run: Callable[[Job, Record], None]
    limit: float | None


@dataclass
class Outcome:
    """What came of a part; ``status`` is running, done, failed, crashed, too long, or skipped."""

    name: str
    about: str
    status: str = "running"
    seconds: float = 0.0
    why: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_parts(
    parts: list[Part],
    job: Job,
    *,
    seconds: float,
    reserve: float,
    method: str,
    changed: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run ``parts`` one after another in at most ``seconds``.

    Args:
        job: for all of them; each is given the rows of those before.
        reserve: seconds that are kept for the parts without a limit.
        method: how processes start, as `multiprocessing` names it. Where a fork cannot use the device, ``spawn``.
        changed: is called whenever something new is known.
    """
    end, outcomes = time.monotonic() + seconds, []
    waiting = list(parts)
    while waiting:
        part = waiting.pop(0)
        left = end - time.monotonic()
        limit = left if part.limit is None else min(part.limit, left - reserve)
        outcome = Outcome(part.name, part.about)
        outcomes.append(outcome)
        if limit <= 1.0:
            outcome.status, outcome.why = "skipped", "no time was left"
        else:
            for rows in _run(part, job, limit, method, outcome):
                outcome.rows = rows
                changed(outcomes)
        if method == "fork" and len(outcomes) == 1 and outcome.status in ("failed", "crashed"):
            # Something has touched the device before the fork: every other part would fail as this one did.
            print(f"{part.name}: {outcome.why}; once more in a new interpreter", file=sys.stderr, flush=True)
            method, waiting = "spawn", [part, *waiting]
            outcomes.pop()
        else:
            job.earlier[part.name] = outcome.rows
        changed(outcomes)
    return outcomes


def _run(part: Part, job: Job, limit: float, method: str, outcome: Outcome) -> Iterator[list[dict[str, Any]]]:
    """Run one part and fill in its outcome; yield its rows whenever there are more."""
    path = job.work / f"{part.name}.jsonl"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    record = Record(path, started + limit)
    process = multiprocessing.get_context(method).Process(target=_child, args=(part.run, job, record))
    process.start()
    known = 0
    while process.is_alive() and record.left() > 0:
        process.join(0.5)
        if len(rows := record.rows()) > known:
            known = len(rows)
            yield _shown(rows)
    if process.is_alive():
        outcome.status, outcome.why = "too long", f"stopped after {limit:.0f} s"
        process.terminate()
        process.join(GRACE)
        process.kill()
    process.join()
    outcome.seconds = round(time.monotonic() - started, 1)
    rows = record.rows()
    ended = next((row["ended"] for row in rows if "ended" in row), None)
    if outcome.status == "running" and ended is None:
        outcome.status, outcome.why = "crashed", f"its process ended with exit code {process.exitcode}"
    elif outcome.status == "running":
        outcome.status, outcome.why = ended["status"], ended["why"]
    yield _shown(rows)


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "ended" not in row]


def _child(run: Callable[[Job, Record], None], job: Job, record: Record) -> None:
    status, why = "done", ""
    try:
        run(job, record)
    except Unmeasurable as error:
        status, why = "skipped", str(error)
    except Exception as error:
        status, why = "failed", first_line(error)
        traceback.print_exc()
    record.add("", ended={"status": status, "why": why})
