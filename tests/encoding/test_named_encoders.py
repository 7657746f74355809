"""What `find_sources` leaves of the encoders that params name: one file a stage, which changes where their bytes do."""

import os
import shutil
import time

import huggingface_hub.constants
import pytest
import tiny_models
from projects import ROOT

from latentloom.encoding.named_encoders import current_fingerprint, find_encoders, pinned_reference, recorded
from latentloom.encoding.pretrained import fingerprint
from latentloom.encoding.references import text_folder, vae_folder
from latentloom.errors import UserError
from latentloom.file_hashes import FileHashes
from latentloom.files import read_json, sha256_file, write_json

VAE, TEXT = "encode_images.vae", "encode_text.model"
OWN = "somebody/some-vae"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """``project()`` finds the VAE of the folder ``vae``, or of another reference; gives what was written of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    read = []

    def find(reference: str = "vae", text: str = "bundled", features: str | None = None) -> dict:
        hashes = FileHashes(tmp_path / ".state/file_hashes.db")
        hashed = hashes.__call__
        monkeypatch.setattr("latentloom.file_hashes.sha256_file", lambda file: read.append(file) or sha256_file(file))
        find_encoders({VAE: reference, TEXT: text, "evaluate.features": features}, tmp_path / "data/encoders", hashed)
        hashes.save()
        return read_json("data/encoders/encode_images.json")["vae"]

    tiny_models.save_tiny_vae("vae")
    find.read = read
    return find


def test_each_stage_has_a_file_and_what_is_not_named_is_null(project):
    found = project()
    assert found == {"reference": "vae", "pinned": "vae", "fingerprint": fingerprint(vae_folder("vae"))}
    assert read_json("data/encoders/encode_text.json")["model"]["reference"] == "bundled"
    assert read_json("data/encoders/evaluate.json") == {"features": None}
    assert current_fingerprint(VAE, "vae") == found["fingerprint"]


def test_other_bytes_are_noticed_though_size_and_time_are_the_same_and_a_touch_changes_nothing(project, tmp_path):
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    before, status = project(), weights.stat()
    os.utime(weights)
    assert project() == before
    tiny_models.save_tiny_vae("other", seed=1)
    shutil.copyfile("other/diffusion_pytorch_model.safetensors", weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_size == status.st_size
    assert project()["fingerprint"] == fingerprint(vae_folder("other")) != before["fingerprint"]


def test_what_has_not_changed_is_not_read_again(project, monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr("latentloom.file_hashes.time.time_ns", lambda: now + 10**10)  # all is long settled
    before = project()
    project.read.clear()
    assert project() == before
    assert project.read == []
    shutil.rmtree(".state")
    assert project() == before
    assert project.read


def test_an_encoder_that_is_not_here_keeps_what_was_found_elsewhere(project):
    before = project()
    shutil.rmtree("vae")
    assert project() == before
    assert current_fingerprint(VAE, "vae") == before["fingerprint"]
    write_json("data/encoders/encode_images.json", {"vae": before | dict.fromkeys(("reference", "pinned"), "/no/vae")})
    assert project("/no/vae")["fingerprint"] == before["fingerprint"]
    with pytest.raises(UserError, match=r"encode_images\.vae: './other' is neither a folder here nor a hub id"):
        project("./other")


def test_a_relative_folder_is_found_from_a_temporary_copy_of_the_project(project, tmp_path, monkeypatch):
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert fingerprint(vae_folder("vae")) == fingerprint(tmp_path / "vae")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(commit, seed)``: the hub's own cache holds a VAE as the latest of `OWN`; there is no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{OWN.replace('/', '--')}"

    def save(commit: str, seed: int = 0):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text(commit)
        return tiny_models.save_tiny_vae(repository / "snapshots" / commit, seed=seed)

    return save


def test_what_the_hub_gave_is_pinned_to_its_commit_until_params_name_another(project, hub):
    hub("a" * 40)
    before = project(OWN)
    assert before["pinned"] == f"{OWN}@{'a' * 40}"
    hub("b" * 40, seed=1)
    assert project(OWN) == before
    write_json("data/encoders/encode_images.json", {"vae": before | {"fingerprint": "of an earlier version"}})
    assert project(OWN) == before
    assert pinned_reference(VAE, OWN) == before["pinned"]
    assert fingerprint(vae_folder(pinned_reference(VAE, OWN))) == before["fingerprint"]
    assert pinned_reference(VAE, "vae") == "vae"
    after = project(f"{OWN}@main")
    assert after["pinned"] == f"{OWN}@{'b' * 40}"
    assert after["fingerprint"] == fingerprint(vae_folder(f"{OWN}@{'b' * 40}")) != before["fingerprint"]
    commit = project(f"{OWN}@{'a' * 40}")
    assert commit["fingerprint"] == before["fingerprint"]
    shutil.rmtree("hub")  # as in a clone on another machine
    assert project(f"{OWN}@{'a' * 40}") == commit


def test_what_another_library_fetched_is_used_without_a_network_where_it_is_whole(hub, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = hub("a" * 40)
    assert vae_folder(OWN) == folder

    def incomplete(*_, **__):
        raise LocalEntryNotFoundError("1 file(s) are missing (README.md)")

    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    assert vae_folder(OWN) == folder
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"could not fetch .* and \S*a{40} holds no weights \(diffusion_pytorch_model"):
        vae_folder(OWN)


def test_the_file_that_an_interrupted_download_lacks_is_named(hub):
    folder = hub("a" * 40)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"not fetched whole.* holds no weights \(diffusion_pytorch_model\.safetensors"):
        vae_folder(OWN)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"not fetched whole.*a{40} has no config\.json"):
        vae_folder(OWN)


def test_the_recorded_fingerprints_are_those_of_the_encoders_that_ship():
    for key, folder in ((VAE, vae_folder("bundled")), (TEXT, text_folder("bundled"))):
        assert recorded(key, "bundled", ROOT / "data/encoders").fingerprint == fingerprint(folder)
