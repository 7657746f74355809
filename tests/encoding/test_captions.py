"""The text cache: CLIP's projected embeddings, sentence embeddings, and which caption belongs to which image."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_data import read_cache
from safetensors.torch import load_file, save_file

from latentloom import sharding
from latentloom.encoding import captions
from latentloom.encoding.cache import RowStore
from latentloom.encoding.captions import caption_id, encode_captions
from latentloom.encoding.pretrained import text_folder
from latentloom.encoding.text_encoder import TextEncoder, load_text_encoder
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


def test_a_caption_longer_than_the_model_reads_is_cut_not_rejected(clip, bundled):
    for encoder in (clip, bundled):
        assert np.isfinite(encoder.encode(["word " * 5000])).all()


def test_an_embedding_does_not_depend_on_its_neighbours(bundled):
    captions = [f"caption number {'very ' * (i % 9)} {i}" for i in range(70)]
    together = bundled.encode(captions)
    assert np.array_equal(together[::-1], bundled.encode(captions[::-1]))
    assert np.array_equal(together[17:18], bundled.encode(captions[17:18]))


def test_each_distinct_caption_is_one_row_and_pairs_say_whose_it_is(clip, prepare_images, tmp_path):
    images = prepare_images(range(6))
    counts = encode_captions(clip, images, tmp_path / "text", RowStore(tmp_path / "state", 2**30))
    index, tensors, statistics = read_cache(tmp_path / "text")
    pairs, embeddings = pd.read_parquet(tmp_path / "text" / "pairs.parquet"), tensors["embedding"]
    texts = {f"picture {i}" for i in range(6)} | {f"noise of kind {i}" for i in range(3)}
    assert set(index["text"]) == texts
    assert counts.rows == len(embeddings) == statistics["rows"] == len(texts)
    assert statistics["dim"] == 24
    assert index["id"].tolist() == [caption_id(text) for text in index["text"]]
    text_of = dict(zip(index["id"], index["text"], strict=True))
    for image_id, texts in zip(*(read_metadata(images)[name] for name in ("id", "captions")), strict=True):
        own = pairs[pairs["image_id"] == image_id].sort_values("position")
        assert [text_of[caption] for caption in own["caption_id"]] == list(texts)


def test_the_stored_rows_are_the_encoders_and_the_index_describes_them(clip, prepare_images, tmp_path):
    encode_captions(clip, prepare_images(range(6)), tmp_path / "text", RowStore(tmp_path / "state", 2**30))
    index, tensors, _ = read_cache(tmp_path / "text")
    embeddings = tensors["embedding"]
    np.testing.assert_allclose(embeddings.float(), clip.encode(index["text"].tolist()), atol=1e-3)
    np.testing.assert_allclose(index["norm"], np.linalg.norm(embeddings.float().numpy(), axis=1), rtol=1e-5)


def test_new_captions_alone_are_embedded(clip, prepare_images, tmp_path):
    encode_captions(clip, prepare_images(range(6), name="a"), tmp_path / "a", RowStore(tmp_path / "state", 2**30))
    counts = encode_captions(
        clip, prepare_images(range(7), name="b"), tmp_path / "b", RowStore(tmp_path / "state", 2**30)
    )
    assert (counts.encoded, counts.reused) == (1, 9)


def test_another_encoder_is_never_served_from_the_store(clip, prepare_images, tmp_path):
    other = load_text_encoder(str(tiny_models.save_clip(tmp_path / "other", seed=1)))
    images = prepare_images(range(3))
    encode_captions(clip, images, tmp_path / "a", RowStore(tmp_path / "state", 2**30))
    assert encode_captions(other, images, tmp_path / "b", RowStore(tmp_path / "state", 2**30)).reused == 0


def test_two_runs_from_nothing_write_the_same_bytes(clip, prepare_images, tmp_path):
    images = prepare_images(range(5))
    for name in ("a", "b"):
        encode_captions(clip, images, tmp_path / name, RowStore(tmp_path / f"state-{name}", 2**30))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_encoder_that_leads_nowhere_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"encode_text\.model: '\./nowhere' is neither a folder here"):
        load_text_encoder("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"encode_text\.model: .* cannot be loaded"):
        load_text_encoder(str(tmp_path))


@pytest.mark.slow
def test_one_percent_more_captions_cost_at_most_two_percent_of_the_encoders_work(bundled, prepare_images, tmp_path):
    work = []
    hook = bundled.model.register_forward_pre_hook(
        lambda *arguments: work.append(len(arguments[2]["input_ids"])), with_kwargs=True
    )
    try:
        encode_captions(bundled, prepare_images(range(1600), name="a"), tmp_path / "a", RowStore(tmp_path / "s", 2**30))
        whole = sum(work)
        work.clear()
        grown = sorted(range(1616), key=lambda seed: seed * 7919 % 1616)  # the new ones anywhere in the list
        images = prepare_images(grown, name="b")
        counts = encode_captions(bundled, images, tmp_path / "b", RowStore(tmp_path / "s", 2**30))
    finally:
        hook.remove()
    assert counts.encoded == 16
    assert 0 < sum(work) <= 0.02 * whole


IMAGES = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=10)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(IMAGES, st.integers(0, 3)), min_size=1, max_size=4))
def test_after_any_history_the_cache_equals_a_rebuild(clip, prepare_images, tmp_path, monkeypatch, history):
    """Additions, removals, another order, crashes after a number of batches."""
    monkeypatch.setattr(sharding, "FEWEST_ROWS", 3)
    monkeypatch.setattr(sharding, "MOST_ROWS", 5)
    monkeypatch.setattr(captions, "CAPTIONS_AT_ONCE", 2)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for seeds, batches in history:
        images = prepare_images(seeds, name=f"{folder.name}-images")
        with contextlib.suppress(KeyboardInterrupt):
            crash = crashing_after(clip, batches)
            encode_captions(crash, images, folder / "out", RowStore(folder / "state", 2**30))
    encode_captions(clip, images, folder / "out", RowStore(folder / "state", 2**30))
    encode_captions(clip, images, folder / "rebuilt", RowStore(folder / "fresh", 2**30))
    assert contents(folder / "out") == contents(folder / "rebuilt")


def crashing_after(encoder: TextEncoder, batches: int) -> TextEncoder:
    """``encoder``, interrupted in the batch after so many."""
    remaining = iter(range(batches))

    class Interrupted(TextEncoder):
        def encode(self, texts):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return super().encode(texts)

    return Interrupted(encoder.reference)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_decides_an_embedding_is_known_without_loading_the_model(clip, bundled, tmp_path):
    for loaded in (clip, bundled):
        encoder = TextEncoder(loaded.reference)
        known = (encoder.class_name, encoder.dim, encoder.max_tokens, encoder.pooling)
        assert not {"model", "tokenizer"} & vars(encoder).keys()
        config, length = loaded.model.config, loaded.tokenizer.model_max_length
        dim = config.projection_dim if loaded is clip else config.hidden_size
        assert known[:3] == (type(loaded.model).__name__, dim, min(length, config.max_position_embeddings))


def test_what_a_config_leaves_to_the_defaults_of_transformers_is_taken_from_the_model(clip, tmp_path):
    folder = Path(shutil.copytree(clip.reference, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 512}))
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] = torch.zeros(512, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del config["projection_dim"], config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    encoder = TextEncoder(str(folder))
    assert (encoder.dim, encoder.max_tokens) == (512, 77)
