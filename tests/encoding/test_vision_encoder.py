"""Features of pictures: what transformers gives, whatever else is encoded with them, and computed once per content."""

import shutil

import numpy as np
import pytest
import torch
from tiny_models import save_bert, save_clip, save_dinov2, save_whole_clip

from latentloom.encoding import features
from latentloom.encoding.features import features_of
from latentloom.encoding.vision_encoder import VisionEncoder, load_clip
from latentloom.errors import UserError
from latentloom.ingestion.shards import iterate_images, read_metadata

KEY = "evaluate.features"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    base = tmp_path_factory.mktemp("vision")
    return {"clip": save_whole_clip(base / "clip"), "dinov2": save_dinov2(base / "dinov2")}


def pictures(count: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "width", "crop"), [("clip", 24, 32), ("dinov2", 16, 28)])
def test_features_are_those_of_the_whole_model_of_the_picture_resized_cropped_and_scaled(folders, kind, width, crop):
    from PIL import Image
    from transformers import AutoModel

    images = pictures(11)
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # CLIP's
    resized = np.stack([np.asarray(Image.fromarray(own).resize((32, 32), Image.Resampling.BICUBIC)) for own in images])
    margin = (32 - crop) // 2
    cropped = resized[:, margin : margin + crop, margin : margin + crop]
    scaled = torch.from_numpy(((cropped / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    model = AutoModel.from_pretrained(folders[kind])
    with torch.no_grad():
        if kind == "clip":
            expected = model.visual_projection(model.vision_model(scaled).pooler_output)
        else:
            expected = model(scaled).last_hidden_state[:, 0]
    found = VisionEncoder(str(folders[kind]), KEY).encode(images)
    assert found.shape == (11, width) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_pictures_features_do_not_depend_on_how_many_others_there_are(folders):
    encoder, images = VisionEncoder(str(folders["dinov2"]), KEY), pictures(11)
    np.testing.assert_array_equal(encoder.encode(images)[9:], encoder.encode(images[9:]))


def test_of_a_picture_that_is_not_square_the_middle_is_read(folders):
    encoder, (wide,) = VisionEncoder(str(folders["clip"]), KEY), pictures(1, size=64)
    middle = wide[:32, 16:48]
    np.testing.assert_allclose(encoder.encode([wide[:32], middle])[0], encoder.encode([middle])[0], atol=1e-6)


def test_both_towers_of_clip_give_features_of_one_space(folders):
    clip = load_clip(str(folders["clip"]), "evaluate.clip")
    assert clip.vision.encode(pictures(2)).shape == clip.text.encode(["a cat", "a dog"]).shape == (2, 24)


def test_another_preprocessing_and_other_weights_have_other_names(folders, tmp_path):
    encoder = VisionEncoder(str(folders["dinov2"]), KEY)
    shutil.copytree(folders["dinov2"], tmp_path / "other")
    path = tmp_path / "other/preprocessor_config.json"
    path.write_text(path.read_text().replace('"shortest_edge": 32', '"shortest_edge": 40'))
    other = VisionEncoder(str(tmp_path / "other"), KEY)
    assert other.fingerprint == encoder.fingerprint
    assert other.preprocessing != encoder.preprocessing
    assert VisionEncoder(str(save_dinov2(tmp_path / "seed", seed=1)), KEY).fingerprint != encoder.fingerprint


def test_what_is_no_vision_encoder_is_rejected_by_key(folders, tmp_path):
    with pytest.raises(
        UserError, match=r"^evaluate.features: 'nowhere' is neither a folder here nor a hub id; allowed: null"
    ):
        VisionEncoder("nowhere", KEY)
    with pytest.raises(
        UserError, match=r"^evaluate.features: .*bert.* 'bert'.*allowed are clip, clip_vision_model, din"
    ):
        VisionEncoder(str(save_bert(tmp_path / "bert")), KEY)
    with pytest.raises(UserError, match=r"^evaluate.clip: .*dinov2 has no text tower; give a whole CLIP model"):
        load_clip(str(folders["dinov2"]), "evaluate.clip")
    text_alone = save_clip(tmp_path / "text")
    with pytest.raises(UserError, match=r"^evaluate.features: .*'clip_text_model'"):
        VisionEncoder(str(text_alone), KEY)


def test_a_tower_without_its_projection_is_not_given_a_random_one(folders, tmp_path):
    from transformers import CLIPVisionModel

    CLIPVisionModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"lacks 1 weights of CLIPVisionModelWithProjection, .*visual_projection"):
        _ = VisionEncoder(str(tmp_path / "bare"), KEY).model


@pytest.fixture
def counted(monkeypatch, tmp_path, folders):
    """An encoder, and how many pictures it was given; what it finds is kept in the test's own folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    encoder, given = VisionEncoder(str(folders["dinov2"]), KEY), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels: given.append(len(pixels)) or encode(pixels))
    return encoder, given


def test_real_pictures_are_encoded_once_and_in_the_order_asked_for(counted, prepare_images, monkeypatch, folders):
    encoder, given = counted
    monkeypatch.setattr(features, "BATCH_SIZE", 4)
    images = prepare_images(range(12))
    ids, pixels = sorted(read_metadata(images)["id"])[:7], dict(iterate_images(images))
    found = features_of(encoder, images, ids)
    assert sum(given) == 7
    np.testing.assert_array_equal(features_of(encoder, images, ids[::-1]), found[::-1])
    assert sum(given) == 7
    more = sorted(pixels)
    np.testing.assert_allclose(
        features_of(encoder, images, more), encoder.encode(np.stack([pixels[own] for own in more])), atol=1e-6
    )
    assert sum(given) == 7 + 5 + 12  # those that were new, and those encoded by hand


def test_other_preprocessing_finds_nothing_that_was_kept(counted, prepare_images):
    encoder, given = counted
    images = prepare_images(range(4))
    ids = read_metadata(images)["id"].tolist()
    features_of(encoder, images, ids)
    encoder.__dict__["preprocessing"] = "another"
    features_of(encoder, images, ids)
    assert sum(given) == 8
