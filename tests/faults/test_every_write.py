"""A stage that dies, or meets a full disk, at any step of its writing leaves nothing half-written, and its rerun ends
with the bytes of an undisturbed run."""

import json
import os
from pathlib import Path

import pytest
from stages import ROWS_PER_SHARD, end, start_script

pytestmark = pytest.mark.fault

TESTS = Path(__file__).parents[1]
# Every step of the stages that make data and model. The many pages of the Data Docs are written alike, and so are the
# charts and sheets of the evaluation: a few will do.
STRIDES = {"ingest": 1, "encode_images": 1, "encode_text": 1, "validate": 20, "train": 1, "evaluate": 3}


def break_at_steps(uninterrupted, project, stage: str, fault: str, stride: int) -> dict:
    script = [str(TESTS / "faults" / "every_write.py"), stage, fault, str(uninterrupted.project.folder), str(stride)]
    environment = {"PYTHONPATH": os.pathsep.join(["src", str(TESTS)])}
    process = start_script(project, script, environment, {"rows_per_shard": ROWS_PER_SHARD, "no_bytecode": True})
    printed = end(project, process)
    assert process.exitcode == 0, printed
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("stage", STRIDES)
def test_a_stage_that_dies_at_any_step_of_its_writing_leaves_whole_files_and_reruns_to_the_same_bytes(
    uninterrupted, project, stage
):
    met = break_at_steps(uninterrupted, project, stage, "die", STRIDES[stage])
    assert met["wrong"] == []
    assert met["steps"] >= 3


# Odd: renames and flushes of folders take turns.
@pytest.mark.parametrize(("stage", "stride"), [("ingest", 3), ("encode_images", 3), ("encode_text", 3), ("train", 5)])
def test_a_disk_that_is_full_at_any_write_ends_the_stage_with_the_files_name_and_the_rerun_with_the_same_bytes(
    uninterrupted, project, stage, stride
):
    met = break_at_steps(uninterrupted, project, stage, "full", stride)
    assert met["wrong"] == []
    assert met["statuses"].get("1", 0) >= 3
