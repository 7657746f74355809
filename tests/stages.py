"""Stage scripts started in a moment: a server that has made the slow imports forks a process for each of them.

A fault test kills stages dozens of times, at moments spread over their own work. From a cold interpreter, nine seconds
of imports would come first each time and take most of the kills. The forked process is the whole stage: it imports
the project's own code, runs the script as ``python pipelines/STAGE.py`` does, and is what the tests kill.
"""

import io
import logging
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from projects import Project

# What the stages import, at their top or on their way. Each project has its own copy of `latentloom`: that comes later.
PRELOADED = (
    "pytest",
    "torch",
    "accelerate",
    "pandas",
    "pyarrow.parquet",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.models.clip.modeling_clip",
    "mlflow.tracking",
    "mlflow.data.pandas_dataset",
    "great_expectations",
    "imagehash",
    "matplotlib.pyplot",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(PRELOADED))
PATIENCE = 120  # seconds until a stage counts as hanging
# Not the same in each run: MLflow's run id and the speed, and how many rows were encoded or reused.
CHANGING = ("reports/train/run.json", "reports/encode_images.json", "reports/encode_text.json")


def start(
    project: Project,
    stage: str,
    *,
    largest_file: int | None = None,
    deliver_every: float | None = None,
    pause: float | None = None,
    **more: str,
) -> BaseProcess:
    """Start a stage.

    Args:
        project: where.
        stage: its name.
        largest_file: bounds the bytes of each file that it writes, as a full disk would.
        deliver_every: seconds between two deliveries to MLflow, and the longest pause between two tries.
        pause: seconds of idleness after each step of a training, as if it were a large one.
        more: of its environment.
    """
    environment = project.environment | more
    limits = (largest_file, deliver_every, pause)
    process = SERVER.Process(target=_run, args=(project.folder, environment, stage, *limits))
    process.start()
    return process


def end(project: Project, process: BaseProcess) -> str:
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


def finish(project: Project, stage: str) -> str:
    """Run a stage to its good end; what it printed."""
    process = start(project, stage)
    said = end(project, process)
    assert process.exitcode == 0, said
    return said


def kill(process: BaseProcess) -> bool:
    """Kill a stage and see all of its processes go; whether it had not ended yet."""
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while _has_processes(process.pid):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("ten seconds after a stage was killed, processes that it started were still there")
        time.sleep(0.01)
    return process.exitcode == -signal.SIGKILL


def kill_when(project: Project, stage: str, moment: Callable[[], object]) -> None:
    """Kill a stage at the first look at which ``moment`` is true."""
    process = start(project, stage)
    while not moment():
        assert process.is_alive(), f"{stage} ended before it could be killed: {end(project, process)}"
        time.sleep(0.002)
    assert kill(process)


def copy_project(project: Project, folder: Path) -> Project:
    """A copy of a project's files, without its git, its DVC and what its stages keep beside their outs."""
    ignored = shutil.ignore_patterns(".git", ".dvc", ".state", "mlartifacts", "__pycache__")
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
    return [project.folder / name for name in names if name not in CHANGING]


def _run(
    folder: Path,
    environment: dict[str, str],
    stage: str,
    largest_file: int | None,
    deliver_every: float | None,
    pause: float | None,
) -> None:
    assert "latentloom" not in sys.modules
    logging.captureWarnings(False)  # Great Expectations, which only some stages import, turned it on
    sys.dont_write_bytecode = True  # a small disk is for the stage's own files
    torch.set_num_threads(1)  # tiny models: a second thread only waits for its turn on a busy machine
    os.setpgrp()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(folder / "src"))
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if deliver_every is not None:
        from latentloom.tracking import delivery

        delivery.EVERY = delivery.LONGEST_PAUSE = deliver_every
    if pause is not None:
        from latentloom.training.watch import TrainingWatch

        take_in = TrainingWatch.step
        TrainingWatch.step = lambda watch, step: (take_in(watch, step), time.sleep(pause))[0]
    runpy.run_path(f"pipelines/{stage}.py", run_name="__main__")


def _log(folder: Path) -> Path:
    return folder.parent / "printed.txt"


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
