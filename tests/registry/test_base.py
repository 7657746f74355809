"""What ``train.init`` names: its hash before a training, and its files in a clone that has them elsewhere."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from tiny_models import save_clip
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.dvc_outs import out_hash
from latentloom.errors import UserError
from latentloom.files import read_json, write_json
from latentloom.layout import INIT
from latentloom.model_files import model_hash
from latentloom.params import Params
from latentloom.registry.base import Base, base_folder, find_base, named_base
from latentloom.tracking.provenance import HASH_TAG
from latentloom.tracking.store import open_client

SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def given(init: str | None, strict: bool = False, text_encoder: str = "bundled", **model) -> Params:
    model = {"widths": [16, 32], "block_depth": 1, "emb_size": 16, "text": "pooled"} | model
    train = SHIPPED["train"] | {"init": init, "init_strict": strict}
    encode_text = SHIPPED["encode_text"] | {"model": text_encoder}
    return Params.model_validate(SHIPPED | {"model": model, "train": train, "encode_text": encode_text})


def test_a_folder_is_recorded_by_its_hash_which_changes_where_its_bytes_do(project_root, tiny_unets):
    shutil.copytree(tiny_unets[0], "old")
    base = find_base(given("old"), project_root)
    assert base == Base("old", model_hash(tiny_unets[0]), out_hash(tiny_unets[0]))
    assert base_folder(base, project_root) == Path("old")
    written = INIT.read_bytes()
    find_base(given("old"), project_root)
    assert INIT.read_bytes() == written
    shutil.copytree(tiny_unets[1], "old", dirs_exist_ok=True)
    assert find_base(given("old"), project_root).sha256 == model_hash(tiny_unets[1])
    assert find_base(given(None), project_root) is None
    assert read_json(INIT) is None


def test_a_relative_folder_is_found_from_a_temporary_copy_of_the_project(project_root, tiny_unets, monkeypatch):
    shutil.copytree(tiny_unets[0], "old")
    Path("copy").mkdir()
    monkeypatch.chdir("copy")
    base = find_base(given("old"), project_root)
    assert model_hash(base_folder(base, project_root)) == base.sha256


def test_a_clone_without_the_folder_or_the_store_keeps_what_was_found_and_trains_nothing_else(
    project_root, tiny_unets, capsys
):
    recorded = {"reference": "/elsewhere/old", "sha256": model_hash(tiny_unets[0]), "out": None}
    write_json(INIT, recorded)
    base = find_base(given("/elsewhere/old"), project_root)
    assert read_json(INIT) == recorded
    assert f"stays model {base.sha256[:12]}: /elsewhere/old holds no model" in capsys.readouterr().err
    assert named_base("/elsewhere/old") == base
    with pytest.raises(UserError, match=r"/elsewhere/old: the model \w{12}, as it was found, is not on this machine"):
        base_folder(base, project_root)
    with pytest.raises(UserError, match=r"init\.json is of other params; run `dvc repro`"):
        named_base(None)


def test_a_run_is_kept_from_the_model_that_the_training_replaces(project_root, train, tiny_unets):
    shutil.copytree(tiny_unets[0], "models/unet")
    run_id = train(tiny_unets[0], name="gentle", provenance={"outs": {"models/unet": "0" * 32 + ".dir"}})
    base = find_base(given(f"runs:/{run_id}"), project_root)
    assert base == Base(f"runs:/{run_id}", model_hash(tiny_unets[0]), "0" * 32 + ".dir")
    shutil.rmtree("models")
    assert model_hash(base_folder(base, project_root)) == base.sha256


def test_a_clone_fetches_the_base_from_dvcs_remote(project_root, train, tiny_unets, monkeypatch):
    shutil.copytree(tiny_unets[0], "models/unet")
    with Repo.init(no_scm=True) as repo:
        repo.add("models/unet")
    run_id = train(tiny_unets[0], provenance={"outs": {"models/unet": out_hash(Path("models/unet"))}})
    base = find_base(given(run_id), project_root)
    clone, remote = project_root / "clone", project_root / "remote"
    shutil.copytree(".dvc/cache/files/md5", remote / "files/md5")
    (clone / ".dvc").mkdir(parents=True)
    settings = f"[core]\n    no_scm = true\n    remote = r\n['remote \"r\"']\n    url = {remote}\n"
    (clone / ".dvc/config").write_text(settings)
    monkeypatch.chdir(clone)
    write_json(INIT, asdict(base))
    assert find_base(given(run_id), clone) == base  # though the store of the runs is not here
    assert not (clone / ".state").exists()
    assert model_hash(base_folder(named_base(run_id), clone)) == base.sha256


def test_an_alias_that_moves_is_another_base(project_root, train, tiny_unets):
    client = open_client(project_root)
    client.create_registered_model("latentloom")
    for folder in tiny_unets[:2]:
        tags = {HASH_TAG: model_hash(folder)}
        version = client.create_model_version("latentloom", "nowhere", train(folder), tags=tags)
        client.set_registered_model_alias("latentloom", "champion", version.version)
        shutil.copytree(folder, "models/unet", dirs_exist_ok=True)
        base = find_base(given("models:/latentloom@champion"), project_root)
        assert base.sha256 == model_hash(folder)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("empty", r"^train\.init = empty: empty holds no model \(config\.json, model\.safetensors\)"),
        (
            "models/unet",
            r"^train\.init = models/unet: a training replaces this very folder; copy it ",
        ),
        ("nobody", r"^train\.init = nobody: no model is called nobody.*; there is showcase"),
        ("models:/latentloom@champion", r"no model is called champion"),
    ],
)
def test_what_is_no_base_is_rejected_with_what_to_do(project_root, tiny_unets, init, message):
    Path("empty").mkdir()
    shutil.copytree(tiny_unets[0], "models/unet")
    with pytest.raises(UserError, match=message):
        find_base(given(init), project_root)
    assert not INIT.exists()


def test_a_base_that_does_not_fit_is_rejected_before_anything_is_encoded(project_root, tiny_unets):
    shutil.copytree(tiny_unets[0], "old")
    with pytest.raises(UserError, match=r"(?s)model\.widths = \[16, 48\].*set model\.widths: \[16, 32\]"):
        find_base(given("old", widths=[16, 48]), project_root)
    with pytest.raises(UserError, match=r"(?s)start anew: token_whitening, token_projection.*init_strict: false"):
        find_base(given("old", strict=True, text="tokens"), project_root)
    save_clip("clip", dim=24)
    with pytest.raises(UserError, match=r"model = clip \(\w{12}\), whose embeddings have 24 numbers.* of 384: set"):
        find_base(given("old", text_encoder="clip"), project_root)
    assert not INIT.exists()


def test_check_prints_what_the_base_is_and_what_starts_anew(project_root, tiny_unets):
    shutil.copytree(tiny_unets[0], "old")
    params = SHIPPED | {"train": SHIPPED["train"] | {"init": "old"}}
    params["model"] = {"widths": [16, 32], "block_depth": 2, "emb_size": 16, "text": "pooled"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    result = CliRunner().invoke(app, ["check"])
    *lines, note = result.output.splitlines()
    assert note.startswith("  note: which pictures are held out follows their pixels")  # at 128 px, not at 64
    assert lines == [
        f"train.init old: model {model_hash(tiny_unets[0])[:12]}, widths 16/32, trained on latents of 8x8",
        "  taken: 128 tensors with 333,044 weights",
        "  start anew: downs.0.layers.1, downs.1.layers.1, ups.0.layers.1, ups.1.layers.1",
    ]
