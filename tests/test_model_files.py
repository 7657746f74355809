"""The model on disk: what is saved comes back, what does not fit is named."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latentloom.errors import WriteError
from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, load_model, save_model

CONFIG = ModelConfig(
    format_version=FORMAT_VERSION,
    latent_shape=(4, 8, 8),
    widths=(16, 32),
    block_depth=1,
    emb_size=16,
    text_dim=12,
    schedule="vp",
    latent_mean=(0.0,) * 4,
    latent_std=(1.0,) * 4,
    latent_bound=3.0,
    vae=EncoderReference(reference="bundled", class_name="AutoencoderTiny", fingerprint="0" * 64),
    text_encoder=EncoderReference(reference="bundled", class_name="BertModel", fingerprint="1" * 64),
    attribution="somebody",
    licence=None,
)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    network = CONFIG.build()
    save_model(tmp_path / "unet", network.state_dict(), CONFIG)
    return tmp_path / "unet", network


def test_a_saved_model_answers_as_it_did(model):
    folder, network = model
    loaded, config = load_model(folder)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 12)
    torch.testing.assert_close(loaded(*inputs), network.eval()(*inputs))
    assert config.model_copy(update={"weights_sha256": None}) == CONFIG


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    folder, network = model
    save_model(tmp_path / "again", network.state_dict(), CONFIG)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_only_a_model_of_several_shapes_says_so_and_is_told_the_size(model, tmp_path):
    folder, network = model
    assert "latent_shapes" not in json.loads((folder / "config.json").read_text())
    assert (network.size_projection, load_model(folder)[1].trained_shapes) == (None, ((4, 8, 8),))
    several = CONFIG.model_copy(update={"latent_shapes": ((4, 6, 10), (4, 8, 8))})
    save_model(tmp_path / "several", several.build().state_dict(), several)
    network, config = load_model(tmp_path / "several")
    assert network.size_projection is not None and config.trained_shapes == several.latent_shapes
    with pytest.raises(ValueError, match="halves the latent 1 times, so its sides must be multiples of 2, not 5x8"):
        CONFIG.model_copy(update={"latent_shapes": ((4, 5, 8), (4, 8, 8))}).build()


def test_any_user_may_read_a_model(model):
    folder, _ = model
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.safetensors")} == {0o644}


@pytest.mark.parametrize(
    "message", ["I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind: X })"]
)
def test_a_full_disk_is_reported_with_the_room_that_the_model_needs_and_the_old_model_stays(
    model, monkeypatch, message
):
    folder, network = model
    before = (folder / "model.safetensors").read_bytes()

    def fail(*_):
        raise SafetensorError(f"Error while serializing: {message}")

    monkeypatch.setattr("latentloom.tensor_files.save_file", fail)
    with pytest.raises(WriteError, match=r"model\.safetensors: No space left on device; it needs \d+\.\d MiB"):
        save_model(folder, network.state_dict(), CONFIG)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_tensor_of_another_shape_is_named(model):
    folder, _ = model
    tensors = load_file(folder / "model.safetensors")
    tensors["head.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: (.|\n)*head\.weight(.|\n)*\[3, 3\](.|\n)*\[4, 16, 3, 3\]"):
        load_model(folder)


def test_missing_and_unknown_tensors_are_named(model):
    folder, _ = model
    tensors = load_file(folder / "model.safetensors")
    tensors["zzz"] = tensors.pop("head.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: (.|\n)*Missing(.|\n)*head\.bias"):
        load_model(folder)


def test_two_tensors_of_one_shape_that_were_swapped_are_noticed(model):
    folder, _ = model
    tensors = load_file(folder / "model.safetensors")
    one, other = [name for name in tensors if name.endswith("weight") and tensors[name].shape == (16, 16, 3, 3)][:2]
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds other weights than its config\.json"):
        load_model(folder)


def test_truncated_weights_are_named(model):
    folder, _ = model
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"widths": "wide"}, "widths"), ({"surprise": 1}, "surprise"), ({"format_version": 99}, "format version 99")],
)
def test_a_config_that_is_not_ours_is_rejected_with_the_key(model, change, message):
    folder, _ = model
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(folder)
