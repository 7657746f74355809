"""A stage that is killed from outside leaves nothing half-written, and the rerun ends where an uninterrupted run does.

`test_every_write.py` ends stages at each step of their writing; here the kills are real, one for each stage.
"""

import random
import re

import pytest
from projects import STAGES
from safetensors import safe_open
from stages import end, finish, is_whole, kill, kill_when, read_outs, remove_outs, start

pytestmark = pytest.mark.fault

EARLIER = b"what an earlier run left"
ENCODERS = ("encode_images", "encode_text")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_amid_its_work_leaves_whole_files_and_reruns_to_the_same_result(uninterrupted, project, stage):
    whole = uninterrupted.outs[stage]
    remove_outs(project, stage)
    for path in whole:
        (project.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / path).write_bytes(EARLIER)
    first = next(project.folder / path for path in whole)

    def finished_shards():
        return list(project.folder.glob(".state/*/*.safetensors"))

    def amid_its_work():
        return finished_shards() if stage in ENCODERS else not first.exists() or first.read_bytes() != EARLIER

    kill_when(project, stage, amid_its_work)
    for path, content in read_outs(project, stage).items():
        assert content == EARLIER or is_whole(path, content, whole[path]), f"{path}: {len(content)} bytes"
    encoded = sum(rows_of(shard) for shard in finished_shards())
    printed = finish(project, stage)
    assert read_outs(project, stage) == whole
    if stage in ENCODERS:  # no finished shard is lost
        assert encoded > 0
        assert int(re.search(r"reused (\d+)", printed)[1]) >= encoded


def test_a_killed_ingest_is_not_taken_for_finished(project):
    remove_outs(project, "ingest")
    kill_when(project, "ingest", (project.folder / "data/images/00000.parquet").exists)
    assert not (project.folder / "data/images/manifest.json").exists()
    process = start(project, "encode_images")
    printed = end(project, process)
    assert process.exitcode == 1
    assert "manifest.json does not exist: run `dvc repro`" in printed


def test_a_training_killed_while_mlflow_makes_its_store_is_tracked_when_it_reruns(project):
    moments = random.Random(0)
    for path in project.folder.glob("*mlflow*"):
        path.unlink()
    for _ in range(2):
        process = start(project, "train")
        process.join(moments.uniform(0.3, 1.5))  # the store comes first, and takes long
        kill(process)
        if process.exitcode == 0:
            break
    assert "MLflow could not be written to" not in finish(project, "train")
    assert (project.folder / "mlflow.db").exists()


def rows_of(shard) -> int:
    with safe_open(shard, framework="np") as file:
        return file.get_slice(next(iter(file.keys()))).get_shape()[0]
