"""Checkpoints are whole or skipped, belong to one training, survive edits of the code, and do not pile up."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from latentloom.errors import UserError, WriteError
from latentloom.params import Params
from latentloom.training.checkpoints import Checkpoints, CodeVersion, training_fingerprint

INPUTS = {"latents": "a" * 64, "text": "b" * 64}
CODE = CodeVersion("c" * 64, "d" * 40)
SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def of_training(folder: Path, fingerprint: str = "f" * 16, *, limit: int = 10**9, pinned: int = 0) -> Checkpoints:
    return Checkpoints(folder / fingerprint, code=CODE, keep=2, pinned=pinned, limit=limit)


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return of_training(tmp_path)


def save(checkpoints: Checkpoints, step: int, curves: Path = Path("none")) -> None:
    tensors = {"network.weight": torch.full((2, 3), float(step)), "average.weight": torch.zeros(4)}
    checkpoints.save(step, tensors, {"seconds": 0.1 * step}, curves)


def steps_in(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("*") if path.is_dir())


def test_what_is_saved_comes_back_bit_by_bit(checkpoints):
    weights = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    checkpoints.save(7, {"weights": weights}, {"mae": 0.1, "best": None}, Path("none"))
    loaded = checkpoints.latest()
    assert (loaded.step, loaded.metadata, loaded.code) == (7, {"mae": 0.1, "best": None}, CODE)
    assert torch.equal(loaded.load_tensors()["weights"], weights)


def test_the_curves_are_kept_as_they_were_at_its_step(checkpoints, tmp_path):
    curve = tmp_path / "plots" / "train.csv"
    curve.parent.mkdir()
    curve.write_text("step\n10\n")
    save(checkpoints, 10, curve.parent)
    curve.write_text("step\n10\n11\n")
    assert (checkpoints.latest().curves / "train.csv").read_text() == "step\n10\n"


def test_any_user_may_read_it(checkpoints):
    save(checkpoints, 10)
    assert (checkpoints.latest().folder / "state.safetensors").stat().st_mode & 0o777 == 0o644


def test_without_any_there_is_none(checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.read_run() == {}


def test_the_last_few_are_kept_and_the_pinned_one(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints = of_training(tmp_path, pinned=20)  # as in another process, after a kill
        save(checkpoints, step)
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


def older_format(folder):
    about = json.loads((folder / "state.json").read_text()) | {"format_version": 1}
    (folder / "state.json").write_text(json.dumps(about))


def lose_a_key(folder):
    about = json.loads((folder / "state.json").read_text())
    del about["metadata"]
    (folder / "state.json").write_text(json.dumps(about))


@pytest.mark.parametrize("damage", [damage_tensors, cut_tensors, lose_tensors, damage_json, older_format, lose_a_key])
def test_one_that_is_damaged_or_of_another_format_is_skipped_with_a_warning(checkpoints, damage):
    save(checkpoints, 20)
    save(checkpoints, 30)
    damage(checkpoints.folder / "step-000030")
    with pytest.warns(UserWarning, match="step-000030 cannot be used and is skipped"):
        assert checkpoints.latest().step == 20


def test_one_that_was_being_written_when_the_process_died_is_not_seen(checkpoints):
    save(checkpoints, 20)
    save(checkpoints, 30)
    half = checkpoints.folder / "step-000030"
    (half / "state.json").unlink()  # which is written last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest().step == 20
    checkpoints.begin({}, checkpoints.latest())
    assert not half.exists()


def test_a_checkpoint_of_another_training_is_never_met(tmp_path, checkpoints):
    save(checkpoints, 20)
    assert of_training(tmp_path, "0" * 16).latest() is None


def test_one_that_cannot_be_written_leaves_the_earlier_ones(checkpoints, monkeypatch):
    save(checkpoints, 20)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("latentloom.tensor_files.save_file", lambda *_: (_ for _ in ()).throw(full))
    message = r"write .*/step-000030/state\.safetensors: No space left on device; it needs 0\.1 MiB"
    with pytest.raises(WriteError, match=message):
        save(checkpoints, 30)
    monkeypatch.undo()
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.latest().step == 20


def test_resuming_deletes_what_lies_beyond(checkpoints):
    for step in (20, 30):
        save(checkpoints, step)
    damage_tensors(checkpoints.folder / "step-000030")
    with pytest.warns(UserWarning, match="its checksum does not match"):
        resumed = checkpoints.latest()
    checkpoints.begin({"mlflow_run_id": "x"}, resumed)
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.read_run() == {"mlflow_run_id": "x"}


def test_after_a_success_nothing_is_left(checkpoints):
    checkpoints.begin({"mlflow_run_id": "x"}, None)
    save(checkpoints, 20)
    checkpoints.end({"mlflow_run_id": "x", "finished_steps": 20})
    assert not checkpoints.folder.exists()


def test_after_the_success_of_a_run_that_can_be_extended_its_pinned_checkpoint_is_left(tmp_path):
    checkpoints = of_training(tmp_path, pinned=20)
    checkpoints.begin({"mlflow_run_id": "x"}, None)
    save(checkpoints, 20)
    save(checkpoints, 30)
    checkpoints.end({"mlflow_run_id": "x", "finished_steps": 30})
    assert steps_in(checkpoints) == ["step-000020"]
    assert checkpoints.read_run()["finished_steps"] == 30


def test_checkpoints_of_other_trainings_are_deleted_beyond_the_limit_the_oldest_first(tmp_path):
    for number, name in enumerate("abc"):
        other = of_training(tmp_path, name)
        other.begin({}, None)
        (other.folder / "step-000001").mkdir()
        (other.folder / "step-000001" / "state.safetensors").write_bytes(bytes(1000))

        os.utime(other.folder, (number, number))
    of_training(tmp_path, "own", limit=2500).begin({}, None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["b", "c", "own"]


def test_checkpoints_of_a_training_that_runs_are_never_deleted(tmp_path):
    running, ended = of_training(tmp_path, "running"), of_training(tmp_path, "ended")
    for other in (running, ended):
        save(other, 20)
    with running.locked():
        of_training(tmp_path, "own", limit=0).begin({}, None)
    assert running.latest() is not None
    assert ended.latest() is None


def test_a_second_training_of_the_same_fingerprint_waits_for_the_first_and_says_so(checkpoints, tmp_path, capsys):
    order, waits = [], threading.Event()

    def second() -> None:
        waits.set()
        with of_training(tmp_path).locked():
            order.append(("second", of_training(tmp_path).latest().step))

    thread = threading.Thread(target=second)
    with checkpoints.locked():
        thread.start()
        waits.wait()
        time.sleep(0.3)
        save(checkpoints, 20)
        order.append("first")
    thread.join(30)
    assert order == ["first", ("second", 20)]
    assert "train: another training of the same params and data is running" in capsys.readouterr().err


def test_a_job_of_several_processes_does_not_wait_but_says_what_runs(checkpoints, tmp_path):
    with (
        checkpoints.locked(),
        pytest.raises(UserError, match="another training of the same params and data is running"),
        of_training(tmp_path).locked(wait=False),
    ):
        pass


def test_waiting_can_be_interrupted(tmp_path):
    def wait() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        with open(tmp_path / "printed.txt", "w", buffering=1) as printed, contextlib.redirect_stderr(printed):
            try:
                with of_training(tmp_path).locked():
                    print("held", file=sys.stderr)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)

    def printed() -> str:
        return (tmp_path / "printed.txt").read_text() if (tmp_path / "printed.txt").exists() else ""

    with of_training(tmp_path).locked():
        waiting = get_context("fork").Process(target=wait)
        waiting.start()
        while "waiting until it has ended" not in printed():
            assert waiting.is_alive(), printed()
            time.sleep(0.01)
        os.kill(waiting.pid, signal.SIGINT)
        waiting.join(60)
    assert printed().endswith("interrupted\n")
    assert "held" not in printed()


def test_the_state_may_be_deleted_while_it_is_held(checkpoints, tmp_path):
    with checkpoints.locked():
        save(checkpoints, 20)
        shutil.rmtree(tmp_path)
        save(checkpoints, 30)
    assert checkpoints.latest().step == 30


def changed(section: str, **values) -> Params:
    return Params.model_validate(SHIPPED | {section: SHIPPED[section] | values})


AS_SHIPPED = Params.model_validate(SHIPPED)


def fingerprint(params: Params, **others) -> str:
    return training_fingerprint(params, **{"inputs": INPUTS, "precision": "fp32"} | others)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"learning_rate": 2e-3}),
        ("train", {"steps": 1301}),
        ("train", {"batch_size": 32}),
        ("diffusion", {"label_dropout": 0.2}),
        ("model", {"block_depth": 2}),
        ("train", {"keep": "best"}),
        ("train", {"loss": "huber"}),
        ("train", {"reduce_precision": "bf16"}),
        ("train", {"block_rows": 64}),
    ],
)
def test_whatever_decides_the_training_changes_the_fingerprint(section, values):
    assert fingerprint(changed(section, **values)) != fingerprint(AS_SHIPPED)


@pytest.mark.parametrize(
    "others", [{"inputs": INPUTS | {"text": "d"}}, {"inputs": INPUTS | {"base": "d"}}, {"precision": "bf16"}]
)
def test_data_base_and_precision_change_the_fingerprint(others):
    assert fingerprint(AS_SHIPPED, **others) != fingerprint(AS_SHIPPED)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        *(("monitor", {key: 7}) for key in SHIPPED["monitor"]),
        ("previews", {"every": 7, "captions": 7, "prompts": ["another"], "seed": 7, "guidance": 7.0, "steps": 7}),
        *(("machine", {key: not value}) for key, value in SHIPPED["machine"].items() if isinstance(value, bool)),
        ("machine", {"checkpoint_every": 7}),
        ("evaluate", {"class_guidance": 5.0}),
        ("train", {"huber_delta": 0.5}),  # not in use, as the loss is mae
        ("train", {"decay_steps": 7}),  # not in use, as the schedule is cosine
        ("train", {"precision": "fp32"}),  # what auto comes to here
        ("train", {"init": "champion", "init_strict": True}),  # the hash of what it names is an input
    ],
)
def test_what_does_not_decide_the_weights_leaves_the_fingerprint(section, values):
    assert fingerprint(changed(section, **values)) == fingerprint(AS_SHIPPED)


def test_keys_that_are_new_leave_the_fingerprint_of_the_version_before_at_the_value_that_changes_nothing():
    before = AS_SHIPPED.model_dump(mode="json", include={"seed", "model", "diffusion", "train"})
    new, not_in_use = ("init", "init_strict", "block_rows", "reduce_precision"), ("decay_steps", "huber_delta")
    for key in (*new, *not_in_use):
        del before["train"][key]
    before["train"]["precision"] = "fp32"
    expected = hashlib.sha256(json.dumps([before, INPUTS], sort_keys=True).encode()).hexdigest()[:16]
    assert fingerprint(changed("train", block_rows=None)) == expected


@pytest.mark.parametrize(
    ("key", "decides"), [("validate_every", True), ("validation_images", True), ("log_every", False)]
)
def test_when_the_best_weights_are_kept_what_is_measured_decides_too(key, decides):
    best = {"train": SHIPPED["train"] | {"keep": "best"}}
    one, other = (
        Params.model_validate(SHIPPED | best | {"monitor": SHIPPED["monitor"] | {key: value}}) for value in (10, 20)
    )
    assert (fingerprint(one) != fingerprint(other)) == decides


def test_the_delta_of_the_huber_loss_decides_where_it_is_in_use():
    one, other = (changed("train", loss="huber", huber_delta=delta) for delta in (0.1, 0.2))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("schedule", ["constant", "warmup_stable_decay"])
def test_runs_that_differ_in_length_alone_share_a_fingerprint_where_the_rate_does_not_know_the_end(schedule):
    short = changed("train", lr_schedule=schedule)
    longer = changed("train", lr_schedule=schedule, steps=5000, decay_steps=900)
    assert fingerprint(short) == fingerprint(longer)
    assert fingerprint(short) != fingerprint(AS_SHIPPED)
