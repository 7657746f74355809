"""The text cache: CLIP's projected embeddings, sentence embeddings, and which caption belongs to which image."""

import numpy as np
import pytest
import tiny_models
import torch

from latentloom.encoding.captions import caption_id, encode_captions, read_captions
from latentloom.encoding.text_encoder import load_text_encoder, text_folder
from latentloom.ingestion.shards import read_metadata


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_text_encoder(str(tiny_models.save_clip(tmp_path_factory.mktemp("text") / "clip")))


@pytest.fixture(scope="module")
def bundled():
    return load_text_encoder("bundled")


def test_clip_gives_its_projected_pooled_embedding(clip):
    captions = ["a red apple", "a"]
    tokens = clip.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        direct = clip.model(**tokens).text_embeds.numpy()
    assert clip.dim == 24
    np.testing.assert_allclose(clip.encode(captions), direct, atol=1e-5)


def test_the_bundled_encoder_gives_what_sentence_transformers_gives(bundled):
    from sentence_transformers import SentenceTransformer

    captions = ["red apple", "a very long caption about a smiling cat with heart-eyes", "é"]
    direct = SentenceTransformer(str(text_folder("bundled")), device="cpu").encode(captions, normalize_embeddings=True)
    assert bundled.dim == direct.shape[1]
    np.testing.assert_allclose(bundled.encode(captions), direct, atol=1e-5)


def test_captions_with_like_meaning_lie_closer(bundled):
    cat, kitten, lorry = bundled.encode(["a cat", "a kitten", "a lorry on a motorway"])
    assert cat @ kitten > cat @ lorry + 0.2


def test_a_caption_longer_than_the_model_reads_is_cut_not_refused(clip, bundled):
    for encoder in (clip, bundled):
        assert np.isfinite(encoder.encode(["word " * 5000])).all()


def test_an_embedding_does_not_depend_on_its_neighbours(bundled):
    captions = [f"caption number {'very ' * (i % 9)} {i}" for i in range(70)]
    together = bundled.encode(captions)
    assert np.array_equal(together[::-1], bundled.encode(captions[::-1]))
    assert np.array_equal(together[17:18], bundled.encode(captions[17:18]))


def test_each_distinct_caption_is_one_row_and_pairs_tell_whose_it_is(clip, prepare_images, tmp_path):
    images = prepare_images(range(6))
    counts = encode_captions(clip, images, tmp_path / "text", tmp_path / "state")
    index, pairs, embeddings, statistics = read_captions(tmp_path / "text")
    texts = {f"picture {i}" for i in range(6)} | {f"noise of kind {i}" for i in range(3)}
    assert set(index["text"]) == texts
    assert counts.rows == len(embeddings) == statistics["rows"] == len(texts)
    assert statistics["dim"] == 24
    assert index["id"].tolist() == [caption_id(text) for text in index["text"]]
    text_of = dict(zip(index["id"], index["text"], strict=True))
    for image_id, captions in zip(*(read_metadata(images)[name] for name in ("id", "captions")), strict=True):
        own = pairs[pairs["image_id"] == image_id].sort_values("position")
        assert [text_of[caption] for caption in own["caption_id"]] == list(captions)


def test_the_stored_rows_are_the_encoders_and_the_index_describes_them(clip, prepare_images, tmp_path):
    encode_captions(clip, prepare_images(range(6)), tmp_path / "text", tmp_path / "state")
    index, _, embeddings, _ = read_captions(tmp_path / "text")
    np.testing.assert_allclose(embeddings.float(), clip.encode(index["text"].tolist()), atol=1e-3)
    np.testing.assert_allclose(index["norm"], np.linalg.norm(embeddings.float().numpy(), axis=1), rtol=1e-5)


def test_new_captions_alone_are_embedded(clip, prepare_images, tmp_path):
    encode_captions(clip, prepare_images(range(6), name="a"), tmp_path / "a", tmp_path / "state")
    counts = encode_captions(clip, prepare_images(range(7), name="b"), tmp_path / "b", tmp_path / "state")
    assert (counts.encoded, counts.reused) == (1, 9)


def test_another_encoder_is_never_served_from_the_store(clip, prepare_images, tmp_path):
    other = load_text_encoder(str(tiny_models.save_clip(tmp_path / "other", seed=1)))
    images = prepare_images(range(3))
    encode_captions(clip, images, tmp_path / "a", tmp_path / "state")
    assert encode_captions(other, images, tmp_path / "b", tmp_path / "state").reused == 0


def test_two_runs_from_nothing_write_the_same_bytes(clip, prepare_images, tmp_path):
    images = prepare_images(range(5))
    for name in ("a", "b"):
        encode_captions(clip, images, tmp_path / name, tmp_path / f"state-{name}")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_encoder_that_leads_nowhere_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"encode_text\.model: '\./nowhere' is no folder here"):
        load_text_encoder("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"encode_text\.model: .* cannot be loaded"):
        load_text_encoder(str(tmp_path))
