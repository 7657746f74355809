"""Several processes train what one would; one that dies ends the job, and the rerun resumes with any number of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from projects import Project
from safetensors.torch import load_file
from stages import copy_project, finish, remove_outs

pytestmark = pytest.mark.fault

SCRIPT = Path(__file__).parents[1] / "training" / "train_in_processes.py"
A_MINUTE = 60


def launch(processes: int, *command: object, folder: Path | None = None) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    environment |= {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "LATENTLOOM_DEVICE": "cpu"}
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, command)],
        cwd=folder or SCRIPT.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def printed_by(process: subprocess.Popen[str], seconds: float = 240) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        pytest.fail(f"the job was still there after {seconds} s:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """What one process, and what two, saw and got: tensors by name, a list of them by process."""
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        job = launch(processes, SCRIPT, folder / str(processes))
        printed = printed_by(job)
        assert job.returncode == 0, printed
    return (
        load_file(folder / "1/0.safetensors"),
        [load_file(folder / f"2/{rank}.safetensors") for rank in (0, 1)],
    )


def test_two_processes_have_the_losses_of_one_step_by_step(alone_and_together):
    alone, together = alone_and_together
    assert len(alone["loss"]) == 20
    for process in together:
        torch.testing.assert_close(process["loss"], alone["loss"], rtol=0.0, atol=1e-4)
    assert torch.equal(together[0]["loss"], together[1]["loss"])


@pytest.mark.parametrize("name", ["noisy", "levels", "labels"])
def test_two_processes_train_on_the_very_batches_of_one(alone_and_together, name):
    alone, together = alone_and_together
    steps = 20
    whole = alone[name].unflatten(0, (steps, -1)).flatten(1, 2)  # (steps, batch, ...)
    joined = torch.cat([process[name].unflatten(0, (steps, -1)).flatten(1, 2) for process in together], dim=1)
    assert torch.equal(joined, whole)


def test_a_process_that_fails_ends_the_job_within_a_minute_and_its_own_traceback_is_shown(tmp_path):
    job = launch(2, SCRIPT, tmp_path, 1)
    printed = printed_by(job, A_MINUTE)
    assert job.returncode != 0
    assert "Traceback (most recent call last)" in printed
    assert "RuntimeError: the power of this node went out" in printed
    assert not list(tmp_path.iterdir())


@pytest.fixture
def project(uninterrupted, tmp_path) -> Project:
    copy = copy_project(uninterrupted.project, tmp_path / "project")
    copy.set_params(
        train__steps=60,
        monitor__log_every=1,
        train__precision="fp32",
        machine__checkpoint_every=5,
        monitor__sample_every=60,
    )
    remove_outs(copy, "train")
    return copy


def workers(job: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(job.pid).children() if "pipelines/train.py" in child.cmdline()]


def wait_for_checkpoint(project: Project, job: subprocess.Popen[str]) -> None:
    while not list(project.folder.glob(".state/checkpoints/*/step-*/state.json")):
        assert job.poll() is None, printed_by(job)
        time.sleep(0.01)


def losses(project: Project) -> list[float]:
    lines = (project.folder / "reports/train/plots/train.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[1]) for line in lines]


def test_a_job_whose_process_is_killed_ends_and_resumes_with_another_number_of_processes(project):
    job = launch(2, "pipelines/train.py", folder=project.folder)
    wait_for_checkpoint(project, job)
    workers(job)[1].kill()
    printed = printed_by(job, A_MINUTE)
    assert job.returncode != 0
    assert "SIGKILL" in printed or "Signal 9" in printed
    remove_outs(project, "train")

    assert "train: resuming from step" in finish(project, "train")
    resumed = losses(project)
    remove_outs(project, "train")
    assert "resuming from step" not in finish(project, "train")
    assert len(resumed) == 60
    assert resumed == pytest.approx(losses(project), abs=1e-4)


def test_a_job_asked_to_stop_saves_its_state_once_and_resumes(project):
    job = launch(2, "pipelines/train.py", folder=project.folder)
    wait_for_checkpoint(project, job)
    job.send_signal(signal.SIGTERM)
    printed = printed_by(job, A_MINUTE)
    assert "of 60; the state is saved, the same command resumes from there" in printed
    step = int(printed.split("stopped at step ")[1].split()[0])
    assert list(project.folder.glob(f".state/checkpoints/*/step-{step:06d}"))
    remove_outs(project, "train")
    job = launch(2, "pipelines/train.py", folder=project.folder)
    printed = printed_by(job)
    assert job.returncode == 0, printed
    assert f"train: resuming from step {step} of 60" in printed
    assert printed.count("train: 60 steps on") == 1
