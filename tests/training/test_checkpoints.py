"""Checkpoints are whole or passed over, belong to one training, and do not pile up."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from latentloom.params import Params
from latentloom.training.checkpoints import Checkpoint, Checkpoints, training_fingerprint

INPUTS = {"latents": "a" * 64, "text": "b" * 64}


def checkpoint(step: int) -> Checkpoint:
    tensors = {"network.weight": torch.full((2, 3), float(step)), "average.weight": torch.zeros(4)}
    return Checkpoint(step, tensors, {"seconds": 0.1 * step})


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path, "f" * 16, keep=2, limit=10**9)


def steps_in(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("*") if path.is_dir())


def test_what_is_saved_comes_back_bit_by_bit(checkpoints):
    weights = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    checkpoints.save(Checkpoint(7, {"weights": weights}, {"mae": 0.1, "best": None}))
    loaded = checkpoints.latest()
    assert (loaded.step, loaded.facts) == (7, {"mae": 0.1, "best": None})
    assert torch.equal(loaded.tensors["weights"], weights)


def test_without_any_there_is_none(checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.read_run() == {}


def test_the_last_few_are_kept_and_the_pinned_one(checkpoints):
    for step in (10, 20, 30, 40):
        checkpoints.save(checkpoint(step), pinned=step == 20)
    assert steps_in(checkpoints) == ["step-000020", "step-000030", "step-000040"]
    assert checkpoints.latest().step == 40


def damage_tensors(folder):
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_tensors(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def lose_tensors(folder):
    (folder / "state.safetensors").unlink()


def damage_json(folder):
    (folder / "state.json").write_text("{")


def lose_json(folder):
    (folder / "state.json").unlink()


def other_fingerprint(folder):
    about = json.loads((folder / "state.json").read_text()) | {"fingerprint": "0" * 16}
    (folder / "state.json").write_text(json.dumps(about))


def rename_step(folder):
    folder.rename(folder.with_name("step-000031"))


def lose_a_key(folder):
    about = json.loads((folder / "state.json").read_text())
    del about["facts"]
    (folder / "state.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        cut_tensors,
        lose_tensors,
        damage_json,
        lose_json,
        other_fingerprint,
        rename_step,
        lose_a_key,
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(checkpoints, damage):
    checkpoints.save(checkpoint(20))
    checkpoints.save(checkpoint(30))
    damage(checkpoints.folder / "step-000030")
    with pytest.warns(UserWarning, match=r"step-00003[01] is damaged and passed over"):
        assert checkpoints.latest().step == 20


def test_one_that_was_being_written_when_the_process_died_is_not_seen(checkpoints):
    checkpoints.save(checkpoint(20))
    half = checkpoints.folder / ".step-000030.123.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest().step == 20
    checkpoints.begin({}, checkpoints.latest())
    assert not half.exists()


def test_a_checkpoint_of_another_training_is_never_met(tmp_path, checkpoints):
    checkpoints.save(checkpoint(20))
    assert Checkpoints(tmp_path, "0" * 16, keep=2, limit=10**9).latest() is None


def test_one_that_cannot_be_written_leaves_the_earlier_ones(checkpoints, monkeypatch):
    checkpoints.save(checkpoint(20))
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"write .*/step-000030/state\.safetensors: No space left; it needs 0\.1 MiB"):
        checkpoints.save(checkpoint(30))
    monkeypatch.undo()
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.latest().step == 20


def test_going_on_deletes_what_lies_beyond(checkpoints):
    for step in (20, 30):
        checkpoints.save(checkpoint(step))
    damage_tensors(checkpoints.folder / "step-000030")
    with pytest.warns(UserWarning, match="damaged"):
        resumed = checkpoints.latest()
    checkpoints.begin({"mlflow_run_id": "x"}, resumed)
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.read_run() == {"mlflow_run_id": "x"}


def test_after_a_success_nothing_is_left(checkpoints):
    checkpoints.begin({"mlflow_run_id": "x"}, None)
    checkpoints.save(checkpoint(20))
    checkpoints.end({"mlflow_run_id": "x", "finished_steps": 20})
    assert not checkpoints.folder.exists()


def test_after_the_success_of_a_run_that_can_be_extended_its_pinned_checkpoint_is_left(checkpoints):
    checkpoints.begin({"mlflow_run_id": "x"}, None)
    checkpoints.save(checkpoint(20), pinned=True)
    checkpoints.save(checkpoint(30))
    checkpoints.end({"mlflow_run_id": "x", "finished_steps": 30})
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.read_run()["finished_steps"] == 30


def test_checkpoints_of_other_trainings_are_deleted_beyond_the_limit_the_oldest_first(tmp_path):
    for number, name in enumerate("abc"):
        other = Checkpoints(tmp_path, name, keep=2, limit=10**9)
        other.begin({}, None)
        (other.folder / "step-000001").mkdir()
        (other.folder / "step-000001" / "state.safetensors").write_bytes(bytes(1000))

        os.utime(other.folder, (number, number))
    Checkpoints(tmp_path, "own", keep=2, limit=2500).begin({}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "own"]


SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def changed(section: str, **values) -> Params:
    return Params.model_validate(SHIPPED | {section: SHIPPED[section] | values})


AS_SHIPPED = Params.model_validate(SHIPPED)


def fingerprint(params: Params, **others) -> str:
    return training_fingerprint(params, **{"inputs": INPUTS, "code": "c", "precision": "fp32"} | others)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"learning_rate": 2e-3}),
        ("train", {"steps": 1301}),
        ("train", {"batch_size": 32}),
        ("diffusion", {"label_dropout": 0.2}),
        ("model", {"block_depth": 2}),
    ],
)
def test_whatever_decides_the_training_changes_the_fingerprint(section, values):
    assert fingerprint(changed(section, **values)) != fingerprint(AS_SHIPPED)


@pytest.mark.parametrize("others", [{"inputs": INPUTS | {"text": "d"}}, {"code": "d"}, {"precision": "bf16"}])
def test_inputs_code_and_precision_change_the_fingerprint(others):
    assert fingerprint(AS_SHIPPED, **others) != fingerprint(AS_SHIPPED)


@pytest.mark.parametrize(
    ("section", "values"), [("machine", {"checkpoint_every": 7}), ("evaluate", {"class_guidance": 5.0})]
)
def test_what_does_not_decide_the_training_leaves_the_fingerprint(section, values):
    assert fingerprint(changed(section, **values)) == fingerprint(AS_SHIPPED)


@pytest.mark.parametrize("schedule", ["constant", "warmup_stable_decay"])
def test_runs_that_differ_in_length_alone_share_a_fingerprint_where_the_rate_does_not_know_the_end(schedule):
    short = changed("train", lr_schedule=schedule)
    longer = changed("train", lr_schedule=schedule, steps=5000, decay_steps=900)
    assert fingerprint(short) == fingerprint(longer)
    assert fingerprint(short) != fingerprint(AS_SHIPPED)
