"""A stage that is killed from outside leaves nothing half-written, and the rerun ends where an uninterrupted run does.

`test_every_write.py` ends every stage at each step of its writing, and `test_resume.py` kills trainings; here are the
kills of which more is promised.
"""

import random
import re

import pytest
from safetensors import safe_open
from stages import end, finish, is_whole, kill, kill_at, read_outs, remove_outs, start

pytestmark = pytest.mark.fault

EARLIER = b"what an earlier run left"


def test_a_killed_encoding_loses_no_finished_shard(uninterrupted, project):
    whole = uninterrupted.outs["encode_images"]
    for path in whole:
        (project.folder / path).write_bytes(EARLIER)
    kill_at(project, "encode_images", ".state/*/*.safetensors")
    for path, content in read_outs(project, "encode_images").items():
        assert content == EARLIER or is_whole(path, content, whole[path]), f"{path}: {len(content)} bytes"
    encoded = sum(map(rows_of, project.folder.glob(".state/*/*.safetensors")))
    printed = finish(project, "encode_images")
    assert read_outs(project, "encode_images") == whole
    assert int(re.search(r"reused (\d+)", printed)[1]) >= encoded > 0


def test_a_killed_ingest_is_not_taken_for_finished(uninterrupted, project):
    remove_outs(project, "ingest")
    kill_at(project, "ingest", "data/images/00000.parquet")
    assert not (project.folder / "data/images/manifest.json").exists()
    process = start(project, "encode_images")
    printed = end(project, process)
    assert process.exitcode == 1
    assert "manifest.json does not exist: run `dvc repro`" in printed
    finish(project, "ingest")
    assert read_outs(project, "ingest") == uninterrupted.outs["ingest"]


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
