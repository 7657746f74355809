"""A training that is killed, stopped or extended ends with the bytes of one that was never interrupted."""

import os
import shutil
import signal
import time
from dataclasses import dataclass

import pytest
from projects import Project
from stages import copy_project, end, finish, kill_at, printed, read_outs, remove_outs, run_to, start

pytestmark = pytest.mark.fault

STEPS = 24
EVERY = 3  # steps from one checkpoint to the next


@dataclass(frozen=True)
class Whole:
    """A training that nothing interrupted, and the files of its outs."""

    project: Project
    outs: dict[str, bytes]


def with_longer_training(project: Project, **changes) -> Project:
    project.set_params(
        **{
            "train__steps": STEPS,
            "monitor__log_every": 2,
            "monitor__validate_every": 5,
            "previews__every": 12,
            "train__keep": "best",
            "machine__checkpoint_every": EVERY,
        }
        | changes
    )
    return project


@pytest.fixture(scope="module")
def whole(uninterrupted, tmp_path_factory) -> Whole:
    project = with_longer_training(copy_project(uninterrupted.project, tmp_path_factory.mktemp("whole") / "project"))
    remove_outs(project, "train")
    finish(project, "train")
    return Whole(project, read_outs(project, "train"))


@pytest.fixture
def project(whole, tmp_path) -> Project:
    copy = copy_project(whole.project, tmp_path / "project")
    remove_outs(copy, "train")
    return copy


def checkpoints(project: Project) -> list[str]:
    return sorted(path.parent.name for path in project.folder.glob(".state/checkpoints/*/step-*/state.json"))


def checkpoint(step: int) -> str:
    """What is written last of the one after so many steps."""
    return f"step-{step:06d}/state.json"


def mlflow_runs(project: Project):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("latentloom")
    return client, client.search_runs([experiment.experiment_id])


def steps_logged(client, run_id: str, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def test_a_training_killed_twice_and_with_a_damaged_checkpoint_ends_with_the_same_bytes_and_is_one_run_without_gaps(
    whole, project
):
    _, before = mlflow_runs(project)
    kill_at(project, "train", checkpoint(9))
    remove_outs(project, "train")
    *_, good, damaged = checkpoints(project)
    (path,) = project.folder.glob(f".state/checkpoints/*/{damaged}/state.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    kill_at(project, "train", checkpoint(21))
    said = printed(project)
    assert f"{damaged} cannot be used and is skipped" in said
    assert f"resuming from step {int(good.removeprefix('step-'))} " in said
    remove_outs(project, "train")
    assert "train: resuming from step 21 " in finish(project, "train")
    assert read_outs(project, "train") == whole.outs
    assert not list(project.folder.glob(".state/checkpoints/*/step-*"))
    client, after = mlflow_runs(project)
    (new,) = {run.info.run_id for run in after} - {run.info.run_id for run in before}
    assert client.get_run(new).info.status == "FINISHED"
    for key in ("train/mae", "train/learning_rate", "train/gradient_norm", "train/images_per_second"):
        assert steps_logged(client, new, key) == list(range(2, STEPS + 1, 2))
    assert steps_logged(client, new, "val/mae") == [5, 10, 15, 20, 24]
    pictures = [artifact.path for artifact in client.list_artifacts(new, "images") if artifact.path.endswith(".png")]
    assert len(pictures) == 3  # at two steps, and the last grid once more beside those of other trainings


def test_a_training_asked_to_stop_saves_its_state_first_and_says_how_to_resume(whole, project):
    step = 0
    for number, status, asked_at in ((signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 12)):
        process = run_to(project, "train", checkpoint(asked_at))
        os.kill(process.pid, number)
        said = end(project, process)
        assert process.exitcode == status, said
        assert ("resuming from step" in said) == (step > 0)
        assert f"of {STEPS}; the state is saved, the same command resumes from there" in said
        assert "Traceback" not in said
        step = int(said.split("stopped at step ")[1].split()[0])
        assert f"step-{step:06d}" in checkpoints(project)
        _, runs = mlflow_runs(project)
        assert "KILLED" in {run.info.status for run in runs}
        remove_outs(project, "train")
    assert f"resuming from step {step} of {STEPS}" in finish(project, "train")
    assert read_outs(project, "train") == whole.outs


def test_a_finished_training_is_extended_from_its_end_to_the_bytes_of_one_that_ran_at_once(uninterrupted, tmp_path):
    first, decay = 11, 4
    options = {"train__lr_schedule": "warmup_stable_decay", "train__warmup_steps": 2, "train__decay_steps": decay}
    project = with_longer_training(copy_project(uninterrupted.project, tmp_path / "project"), **options)
    project.set_params(train__steps=first)
    remove_outs(project, "train")
    finish(project, "train")
    project.set_params(train__steps=STEPS)
    remove_outs(project, "train")
    assert f"resuming from step {first - decay} of {STEPS}" in finish(project, "train")  # where the decay began
    client, runs = mlflow_runs(project)
    newest = max(runs, key=lambda run: run.info.start_time).info.run_id
    assert steps_logged(client, newest, "train/mae") == list(range(2, STEPS + 1, 2))
    extended = read_outs(project, "train")
    remove_outs(project, "train")  # asked for again, as `dvc repro --force` does, it runs at once from its beginning
    assert "resuming from step" not in finish(project, "train")
    assert read_outs(project, "train") == extended


def test_a_training_that_diverges_stops_by_itself_and_keeps_its_last_good_checkpoint(project):
    project.set_params(train__learning_rate=1e30, train__lr_schedule="constant", train__warmup_steps=20)
    process = start(project, "train")
    said = end(project, process)
    assert process.exitcode == 1
    assert "train: training diverged at step" in said
    assert "Try a lower train.learning_rate" in said
    assert "Traceback" not in said
    step = int(said.split("diverged at step ")[1].split(":")[0])
    kept = [int(name.removeprefix("step-")) for name in checkpoints(project)]
    assert not any(later >= step for later in kept)
    assert not (project.folder / "models/unet/model.safetensors").exists()


def test_the_state_may_be_deleted_while_a_training_runs_and_code_that_changes_meanwhile_is_warned_of(whole, project):
    process = run_to(project, "train", checkpoint(EVERY))
    with open(project.folder / "src/latentloom/training/loop.py", "a") as file:
        file.write("# changed\n")
    os.kill(process.pid, signal.SIGUSR1)
    while process.is_alive():
        if checkpoints(project):
            shutil.rmtree(project.folder / ".state", ignore_errors=True)
        time.sleep(0.002)
    said = end(project, process)
    assert process.exitcode == 0, said
    assert "the code changed while the training ran: run `dvc repro --force train`" in said
    assert read_outs(project, "train") == whole.outs
