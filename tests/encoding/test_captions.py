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
from latentloom.encoding.captions import caption_id, encode_captions
from latentloom.encoding.references import text_folder
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import TextEncoder, load_text_encoder
from latentloom.files import read_json
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


def test_captions_that_are_cut_are_counted_also_when_none_is_encoded(clip, prepare_images, tmp_path):
    images = prepare_images(range(6))
    encoder = TextEncoder(clip.reference, max_tokens=len("picture 1") + 2)  # a token for each letter, and two marks
    for encoded in (9, 0):
        counts = encode_captions(encoder, images, tmp_path / "text", RowStore(tmp_path / "state", 2**30))
        assert (counts.encoded, counts.cut) == (encoded, 3)  # "noise of kind 0" and so on
    index, _, statistics = read_cache(tmp_path / "text")
    assert index["tokens"].tolist() == [len(text) + 2 for text in index["text"]]
    assert statistics["max_tokens"] == len("picture 1") + 2


def test_with_token_states_each_row_has_those_of_its_caption_without_padding(clip, prepare_images, tmp_path):
    """Also when some rows come from an earlier run, in shards of other captions."""
    store = tmp_path / "state"
    encode_captions(clip, prepare_images(range(4), name="a"), tmp_path / "a", RowStore(store, 2**30), tokens=True)
    images = prepare_images(range(7), name="b")
    counts = encode_captions(clip, images, tmp_path / "b", RowStore(store, 2**30), tokens=True)
    assert (counts.encoded, counts.reused) == (3, 7)
    index = pd.read_parquet(tmp_path / "b/index.parquet")
    shard = load_file(tmp_path / "b/00000.safetensors")
    ends, states = shard["tokens_ends"].tolist(), clip.encode_tokens(index["text"].tolist()).states
    assert len(shard["tokens"]) == ends[-1] == sum(map(len, states))
    assert shard["tokens"].dtype == torch.float16
    for row, end, own in zip(index["row"], ends, states, strict=True):
        start = ends[row - 1] if row else 0
        np.testing.assert_allclose(shard["tokens"][start:end].float(), own, atol=2e-3)
    assert read_json(tmp_path / "b/stats.json")["token_dim"] == 16


def test_rows_with_token_states_and_rows_without_are_kept_apart(clip, prepare_images, tmp_path):
    images, store = prepare_images(range(4)), tmp_path / "state"
    for tokens, encoded in [(False, 7), (True, 7), (False, 0), (True, 0)]:
        counts = encode_captions(clip, images, tmp_path / str(tokens), RowStore(store, 2**30), tokens=tokens)
        assert counts.encoded == encoded
    vectors = [load_file(tmp_path / name / "00000.safetensors")["embedding"] for name in ("False", "True")]
    assert torch.equal(*vectors)


def test_a_caption_one_of_whose_token_states_is_not_finite_is_marked(clip, prepare_images, tmp_path):
    class Overflowing(TextEncoder):
        def encode_tokens(self, texts, **arguments):
            encoded = super().encode_tokens(texts, **arguments)
            encoded.states[2][1, 3] = 1e30  # infinity in fp16
            return encoded

    encoder = Overflowing(clip.reference)
    encode_captions(encoder, prepare_images(range(6)), tmp_path / "text", RowStore(tmp_path / "s", 2**30), tokens=True)
    assert np.flatnonzero(~pd.read_parquet(tmp_path / "text/index.parquet")["finite"]).tolist() == [2]


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
    folder = tiny_models.save_bert(tmp_path / "bert")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"encode_text\.model: .* cannot be loaded"):
        load_text_encoder(str(folder))


@pytest.mark.slow
def test_one_percent_more_captions_cost_at_most_two_percent_of_the_encoders_work(clip, prepare_images, tmp_path):
    work = []
    hook = clip.model.register_forward_pre_hook(
        lambda *arguments: work.append(len(arguments[2]["input_ids"])), with_kwargs=True
    )
    try:
        encode_captions(clip, prepare_images(range(1600), name="a"), tmp_path / "a", RowStore(tmp_path / "s", 2**30))
        whole = sum(work)
        work.clear()
        grown = sorted(range(1616), key=lambda seed: seed * 7919 % 1616)  # the new ones anywhere in the list
        images = prepare_images(grown, name="b")
        counts = encode_captions(clip, images, tmp_path / "b", RowStore(tmp_path / "s", 2**30))
    finally:
        hook.remove()
    assert counts.encoded == 16
    assert 0 < sum(work) <= 0.02 * whole


ROW_BYTES = 2 * 24  # without token states
IMAGES = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=10)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(IMAGES, st.integers(0, 3), st.booleans()), min_size=1, max_size=4), st.booleans())
def test_after_any_history_the_cache_equals_a_rebuild(clip, prepare_images, tmp_path, monkeypatch, history, tokens):
    """Additions, removals, another order, crashes after a number of batches, with token states and without."""
    monkeypatch.setattr(sharding, "TENSORS", sharding.ShardBytes(*(rows * ROW_BYTES for rows in (3, 2, 5))))
    monkeypatch.setattr(captions, "CAPTIONS_AT_ONCE", 2)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for seeds, batches, with_tokens in history:
        images = prepare_images(seeds, name=f"{folder.name}-images")
        with contextlib.suppress(KeyboardInterrupt):
            crash = crashing_after(clip, batches)
            encode_captions(crash, images, folder / "out", RowStore(folder / "state", 2**30), tokens=with_tokens)
    encode_captions(clip, images, folder / "out", RowStore(folder / "state", 2**30), tokens=tokens)
    encode_captions(clip, images, folder / "rebuilt", RowStore(folder / "fresh", 2**30), tokens=tokens)
    assert contents(folder / "out") == contents(folder / "rebuilt")


def crashing_after(encoder: TextEncoder, batches: int) -> TextEncoder:
    """``encoder``, interrupted in the batch after so many."""
    remaining = iter(range(batches))

    class Interrupted(TextEncoder):
        def encode_tokens(self, texts, **arguments):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return super().encode_tokens(texts, **arguments)

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
