"""Several processes train what one would; one that dies ends the job; a stopped job resumes with any number of them."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import train_in_processes
from projects import Project
from safetensors.torch import load_file
from stages import copy_project, finish, remove_outs, wait_for_hold
from train_in_processes import STEPS

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]
A_MINUTE = 60
STAGE_STEPS = 20


def launch(*arguments: object, folder: Path = ROOT, **hooks: object) -> subprocess.Popen[str]:
    """Run a script in two processes, which the server of stages forks, as it does the one that starts them.

    ``hooks``: of `stage_hooks`, in each of the two.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    environment |= {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "LATENTLOOM_DEVICE": "cpu"}
    environment |= {"STAGE_HOOKS": json.dumps(hooks)}
    return subprocess.Popen(
        ["python", *torchrun, "python", *map(str, arguments)],
        cwd=folder,
        env=environment | {"PATH": Project(folder).environment["PATH"]},
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


@dataclass(frozen=True)
class Compared:
    """What one process, and what two, saw and got: tensors by name, a list of them by process; and how the two ended.

    The second of them died right afterwards.
    """

    alone: dict[str, torch.Tensor]
    together: list[dict[str, torch.Tensor]]
    printed: str
    status: int


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("processes")
    train_in_processes.main(folder / "alone")
    job = launch(train_in_processes.__file__, folder / "together", 1)
    saved = [folder / "together" / f"{rank}.safetensors" for rank in (0, 1)]
    while not all(path.exists() for path in saved):
        assert job.poll() is None, printed_by(job)
        time.sleep(0.05)
    printed = printed_by(job, A_MINUTE)
    return Compared(
        load_file(folder / "alone/0.safetensors"), [load_file(path) for path in saved], printed, job.returncode
    )


def test_two_processes_have_the_losses_of_one_step_by_step(compared):
    assert len(compared.alone["loss"]) == STEPS
    for process in compared.together:
        torch.testing.assert_close(process["loss"], compared.alone["loss"], rtol=0.0, atol=1e-4)
    assert torch.equal(compared.together[0]["loss"], compared.together[1]["loss"])


@pytest.mark.parametrize("name", ["noisy", "levels", "labels", "tokens"])
def test_two_processes_train_on_the_very_batches_of_one(compared, name):
    whole = compared.alone[name].unflatten(0, (STEPS, -1)).flatten(1, 2)  # (steps, batch, ...)
    joined = torch.cat([process[name].unflatten(0, (STEPS, -1)).flatten(1, 2) for process in compared.together], dim=1)
    assert torch.equal(joined, whole)


def test_gradients_sent_in_bf16_are_the_same_for_all_and_near_those_of_one_process(compared):
    alone, (first, second) = compared.alone["norm_fp32"], compared.together
    torch.testing.assert_close(first["norm_fp32"], alone, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(first["norm_bf16"], alone, rtol=1e-2, atol=0.0)
    assert not torch.allclose(first["norm_bf16"], alone, rtol=1e-5)
    for name in ("norm_fp32", "norm_bf16"):
        assert torch.equal(first[name], second[name])
    assert torch.equal(compared.alone["norm_bf16"], alone)  # nothing is sent


def test_a_process_that_fails_ends_the_job_within_a_minute_and_its_own_traceback_is_shown(compared):
    assert compared.status != 0
    assert "Traceback (most recent call last)" in compared.printed
    assert "RuntimeError: the power of this node went out" in compared.printed


@pytest.fixture
def project(uninterrupted, tmp_path) -> Project:
    copy = copy_project(uninterrupted.project, tmp_path / "project")
    copy.set_params(
        train__steps=STAGE_STEPS,
        monitor__log_every=1,
        train__precision="fp32",
        machine__checkpoint_every=5,
        previews__every=STAGE_STEPS,
    )
    remove_outs(copy, "train")
    return copy


def losses(project: Project) -> list[float]:
    lines = (project.folder / "reports/train/plots/train.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[1]) for line in lines]


def test_a_job_asked_to_stop_saves_its_state_once_and_resumes_with_any_number_of_processes(project, tmp_path):
    undisturbed = copy_project(project, tmp_path / "undisturbed" / "project")
    finish(undisturbed, "train")

    job = launch("pipelines/train.py", folder=project.folder, hold_at="step-000005/state.json")
    wait_for_hold(project, lambda: job.poll() is None or pytest.fail(printed_by(job)))
    job.send_signal(signal.SIGTERM)
    printed = printed_by(job, A_MINUTE)
    assert f"of {STAGE_STEPS}; the state is saved, the same command resumes from there" in printed
    step = int(printed.split("stopped at step ")[1].split()[0])
    assert list(project.folder.glob(f".state/checkpoints/*/step-{step:06d}/state.json"))
    remove_outs(project, "train")
    by_one = copy_project(project, tmp_path / "by one" / "project")
    shutil.copytree(project.folder / ".state", by_one.folder / ".state")

    job = launch("pipelines/train.py", folder=project.folder)
    printed = printed_by(job)
    assert job.returncode == 0, printed
    resuming = f"train: resuming from step {step} of {STAGE_STEPS}"
    assert resuming in printed
    assert printed.count(f"train: {STAGE_STEPS} steps on") == 1
    assert resuming in finish(by_one, "train")
    for resumed in (project, by_one):
        assert len(losses(resumed)) == STAGE_STEPS
        assert losses(resumed) == pytest.approx(losses(undisturbed), abs=1e-4)
