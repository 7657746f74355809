"""Stages of a test's project, started in a moment by the server of stages (`stage_server.py`).

Two ways lead to it. Where a test runs ``dvc repro`` or ``python pipelines/STAGE.py``, the ``dvc`` and the ``python`` on
its path are small scripts that hand both over. Where a test limits, kills or breaks a stage, ``start`` asks for one
directly.
"""

import io
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from projects import Project, stage_socket
from stage_client import connect, read_number, request
from stage_hooks import HELD

ROWS_PER_SHARD = 16  # at the fewest, so that tiny data has several
PATIENCE = 600  # seconds until a stage counts as hanging, on a machine that has much else to do


class Stage:
    """A stage that runs, or has run.

    Attributes:
        pid: its process, which leads a process group of its own.
        exitcode: None while it runs; negative is the signal that ended it.
    """

    def __init__(self, server: socket.socket, pid: int) -> None:
        self._server, self.pid, self.exitcode = server, pid, None

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, or for so many seconds."""
        if self.exitcode is None and select.select([self._server], [], [], seconds)[0]:
            self.exitcode = read_number(self._server)
            self._server.close()

    def is_alive(self) -> bool:
        """Whether it runs."""
        self.join(0)
        return self.exitcode is None

    def kill(self) -> None:
        """Kill it."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def start(project: Project, stage: str, **more: str | float | None) -> Stage:
    """Start a stage.

    Args:
        project: where.
        stage: its name.
        more: what `stage_hooks` offers, by name; anything else is a variable of its environment.
    """
    import stage_hooks

    hooks = {name: value for name, value in more.items() if hasattr(stage_hooks, name) and value is not None}
    hooks = {"rows_per_shard": ROWS_PER_SHARD, "no_bytecode": True} | hooks
    environment = {name: str(value) for name, value in more.items() if not hasattr(stage_hooks, name)}
    return start_script(project, [f"pipelines/{stage}.py"], environment, hooks)


def start_script(project: Project, argv: list[str], environment: dict[str, str], hooks: dict[str, object]) -> Stage:
    """Start any script in a project, with more variables and with hooks of `stage_hooks`."""
    environment = project.environment | {"PYTHONPATH": "src"} | environment
    server = connect(str(stage_socket()))
    with open(_log(project.folder), "wb") as log, open(os.devnull) as nothing:
        files = [nothing.fileno(), log.fileno(), log.fileno()]
        command = {"argv": argv, "folder": str(project.folder)}
        return Stage(server, request(server, files, **command, environment=environment, hooks=hooks))


def end(project: Project, process: Stage) -> str:
    """Wait for a stage that ``start`` gave; what it printed."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a stage hung for {PATIENCE} s:\n{printed(project)}")
    return printed(project)


def printed(project: Project) -> str:
    """What the last stage that was started has printed so far."""
    log = _log(project.folder)
    return log.read_text() if log.exists() else ""


def finish(project: Project, stage: str, **more: str | float | None) -> str:
    """Run a stage to its good end, with what ``start`` takes; what it printed."""
    process = start(project, stage, **more)
    said = end(project, process)
    assert process.exitcode == 0, said
    return said


def kill(process: Stage) -> bool:
    """Kill a stage and see all of its processes go; whether it had not ended yet."""
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while _has_processes(process.pid):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("a minute after a stage was killed, processes that it started were still there")
        time.sleep(0.01)
    return process.exitcode == -signal.SIGKILL


def run_to(project: Project, stage: str, written: str) -> Stage:
    """Start a stage and wait until a file that matches is written; there it waits, for a signal, or to be killed."""
    process = start(project, stage, hold_at=written)
    wait_for_hold(project, lambda: process.is_alive() or pytest.fail(f"{stage} ended: {end(project, process)}"))
    return process


def wait_for_hold(project: Project, still_runs: Callable[[], object]) -> None:
    """Wait until what was started with the hook ``hold_at`` has come there."""
    while not (project.folder / HELD).exists():
        still_runs()
        time.sleep(0.01)
    (project.folder / HELD).unlink()


def kill_at(project: Project, stage: str, written: str) -> None:
    """Kill a stage where a file that matches is written."""
    assert kill(run_to(project, stage, written))


def copy_project(project: Project, folder: Path) -> Project:
    """A copy of a project's files, without its git, its DVC and what its stages keep beside their outs."""
    ignored = shutil.ignore_patterns(".git", ".dvc", ".state", "mlartifacts")
    shutil.copytree(project.folder, folder, ignore=ignored, dirs_exist_ok=True)
    return replace(project, folder=folder)


def read_outs(project: Project, stage: str) -> dict[str, bytes]:
    """The files of a stage's outs, metrics and plots: path in the project -> bytes; no temporary files."""
    return {
        str(path.relative_to(project.folder)): path.read_bytes()
        for out in _out_paths(project, stage)
        for path in sorted(out.rglob("*") if out.is_dir() else [out] if out.exists() else [])
        if path.is_file() and not path.name.startswith(".")
    }


def is_whole(path: str, content: bytes, finished: bytes) -> bool:
    """Whether a file that an interrupted stage left is the ``finished`` one, or does a reader no harm."""
    if path.endswith(".csv"):  # a curve so far
        return content.endswith(b"\n") and finished.startswith(content)
    if path.startswith("data/images/") and content != finished:  # the splits are final when the manifest is there
        left, right = (pq.read_table(io.BytesIO(data)).drop_columns("split") for data in (content, finished))
        return left.equals(right)
    return content == finished


def remove_outs(project: Project, stage: str) -> None:
    """What DVC does before it runs a stage."""
    for path in _out_paths(project, stage):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _out_paths(project: Project, stage: str) -> list[Path]:
    stages = yaml.safe_load((project.folder / "dvc.yaml").read_text())["stages"]
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stages[stage].get(kind, [])]
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return [project.folder / name for name in names]


def _log(folder: Path) -> Path:
    return folder.parent / "printed.txt"


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
