"""A disk that is full stops a stage with the file and the room it needs, and the rerun with room resumes from there.

The disks are real and small. `test_every_write.py` lets every single write fail.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable

import pytest
from projects import Project
from stages import copy_project, end, finish, is_whole, read_outs, remove_outs, start

pytestmark = pytest.mark.fault

MESSAGE = re.compile(
    r"could not write (\S+): .*(No space left on device|File too large).*; "
    r"it needs (\d+\.\d) MiB, \d+ MiB are free there\. Make room and run the stage again"
)
# Stage, and the name that ends its big files. Captions are stored as images are.
STAGES = [
    ("ingest", ".parquet"),
    ("encode_images", ".safetensors"),
    ("train", ".safetensors"),
]


@pytest.fixture
def small_disk(uninterrupted, tmp_path):
    """``small_disk(stage, room)``: a project on a disk of its own, with ``room`` bytes for what ``stage`` writes."""
    folder = tmp_path / "project"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = mount(folder, "size=64m")
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")

    def make(stage: str, room: int) -> Project:
        project = copy_project(uninterrupted.project, folder)
        remove_outs(project, stage)
        disk = os.statvfs(folder)
        mount(folder, f"remount,size={(disk.f_blocks - disk.f_bfree) * disk.f_frsize + room}").check_returncode()
        return project

    yield make
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(folder, options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("stage", "suffix"), STAGES)
def test_a_full_disk_stops_a_stage_and_the_rerun_with_room_resumes(uninterrupted, small_disk, stage, suffix):
    big = [len(content) for path, content in uninterrupted.outs[stage].items() if path.endswith(suffix)]
    pages = sum(-(-size // 4096) for size in big)
    project = small_disk(stage, 4096 * (pages // 2) if stage != "train" else sum(big) // 2)
    stops_and_resumes(
        uninterrupted, project, stage, start(project, stage), lambda: mount(project.folder, "remount,size=64m")
    )


def test_a_disk_that_takes_the_checkpoint_but_not_the_model_loses_no_step(uninterrupted, small_disk):
    model = len(uninterrupted.outs["train"]["models/unet/model.safetensors"])
    project = small_disk("train", state_size(uninterrupted) + int(0.7 * model))
    process = start(project, "train")
    printed = end(project, process)
    assert process.exitcode == 1
    assert "could not write models/unet/model.safetensors: " in printed
    mount(project.folder, "remount,size=64m")
    remove_outs(project, "train")
    assert "train: resuming from step 4 of 4" in finish(project, "train")
    assert read_outs(project, "train") == uninterrupted.outs["train"]


def stops_and_resumes(uninterrupted, project, stage, process, make_room: Callable[[], object]) -> None:
    """Wait for the stage to stop on its full disk, then make room and run it as DVC does, its outs removed."""
    whole = uninterrupted.outs[stage]
    printed = end(project, process)
    assert process.exitcode == 1, printed
    assert "Traceback" not in printed
    found = MESSAGE.search(printed)
    assert found, printed
    needed = len(whole.get(found[1], b"")) / 2**20
    if stage == "train":
        assert found[1].endswith("/step-000004/state.safetensors")
        needed = state_size(uninterrupted) / 2**20
        assert needed < float(found[3]) < 1.1 * needed + 0.1
    elif stage == "ingest":  # shards are written as they come: their size is an estimate, from a typical number of rows
        assert needed / 4 < float(found[3]) <= needed * 4 + 0.1
    else:
        assert float(found[3]) == pytest.approx(needed + 0.05, abs=0.051)  # rounded up
    left = read_outs(project, stage)
    for path, content in left.items():
        assert is_whole(path, content, whole[path]), f"{path}: {len(content)} bytes"
    make_room()
    remove_outs(project, stage)
    printed = finish(project, stage)
    if stage.startswith("encode"):
        assert reused(printed) > 0 or not any(path.endswith(".safetensors") for path in left)
    assert read_outs(project, stage) == whole


def state_size(uninterrupted) -> int:
    """About the bytes of a checkpoint with Muon: the weights, their averages, a moment of each, and little else."""
    return 3 * 4 * json.loads(uninterrupted.outs["train"]["reports/train/metrics.json"])["parameters"]


def reused(printed: str) -> int:
    return int(re.search(r"reused (\d+)", printed)[1])
