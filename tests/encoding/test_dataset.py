"""The training data as the caches hold it: standardised, joined with its captions, in the order of ids."""

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch

from latentloom.encoding.captions import encode_captions, read_captions
from latentloom.encoding.dataset import load_caches
from latentloom.encoding.latents import encode_images, read_latents
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.ingestion.shards import read_metadata


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return load_vae(str(tiny_models.save_kl_vae(folder / "vae"))), load_text_encoder(
        str(tiny_models.save_clip(folder / "clip"))
    )


@pytest.fixture
def caches(models, prepare_images, tmp_path):
    vae, encoder = models
    images = prepare_images(range(40))
    encode_images(vae, images, tmp_path / "latents", RowStore(tmp_path / "s1", 2**30))
    encode_captions(encoder, images, tmp_path / "text", RowStore(tmp_path / "s2", 2**30))
    return load_caches(tmp_path / "latents", tmp_path / "text")


def test_training_latents_have_zero_mean_and_unit_std_a_channel(caches):
    samples = caches.train.mean + caches.train.std * torch.randn(200, *caches.train.mean.shape)
    np.testing.assert_allclose(samples.mean((0, 1, 3, 4)), 0, atol=0.02)
    np.testing.assert_allclose(samples.transpose(2, 4).flatten(0, 3).std(0), 1, atol=0.02)


def test_splits_share_no_image_and_are_in_the_order_of_ids(caches):
    assert (len(caches.train), len(caches.validation)) == (30, 10)
    assert not set(caches.train.ids) & set(caches.validation.ids)
    assert caches.train.ids == sorted(caches.train.ids)


def test_each_image_has_its_own_captions_and_latent(caches, tmp_path):
    metadata = read_metadata(tmp_path / "images").set_index("id")
    index, tensors, statistics = read_latents(tmp_path / "latents")
    text_index, _, embeddings, _ = read_captions(tmp_path / "text")
    row_of_text = {text: row for row, text in enumerate(text_index["text"])}
    row_of_id = {own: row for row, own in enumerate(index["id"])}
    scale, center = (np.array(statistics[name])[:, None, None] for name in ("std", "mean"))
    for position, own in enumerate(caches.train.ids):
        own_texts = [
            caches.train.texts[row] for row in caches.train.captions[position][: caches.train.caption_counts[position]]
        ]
        assert own_texts == list(metadata.loc[own, "captions"])
        raw = tensors["mean"][row_of_id[own]].double().numpy()
        np.testing.assert_allclose(caches.train.mean[position], (raw - center) / scale, atol=1e-4)
        primary = embeddings[row_of_text[own_texts[0]]].float()
        assert torch.equal(caches.train.primary_embeddings()[position], primary)


def test_mirrored_latents_and_weights_come_from_the_caches(models, prepare_images, tmp_path):
    vae, encoder = models
    images = prepare_images(range(12))
    encode_images(vae, images, tmp_path / "latents", RowStore(tmp_path / "s1", 2**30), flip=True)
    encode_captions(encoder, images, tmp_path / "text", RowStore(tmp_path / "s2", 2**30))
    assert load_caches(tmp_path / "latents", tmp_path / "text").train.weights is None
    path = tmp_path / "latents" / "index.parquet"
    index = pd.read_parquet(path)
    index["weight"] = np.arange(1, 13, dtype=np.float32)
    path.unlink()
    index.to_parquet(path, index=False)
    train = load_caches(tmp_path / "latents", tmp_path / "text").train
    weight_of = dict(zip(index["id"], index["weight"], strict=True))
    assert train.weights.tolist() == [weight_of[own] for own in train.ids]
    assert train.take(3).weights.tolist() == train.weights.tolist()[:3]
    both = torch.cat([train.mean, train.flipped_mean])
    np.testing.assert_allclose(both.double().mean((0, 2, 3)), 0, atol=1e-3)
    _, tensors, statistics = read_latents(tmp_path / "latents")
    row = index["id"].tolist().index(train.ids[0])
    scale = np.array(statistics["std"])[:, None, None]
    np.testing.assert_allclose(train.flipped_std[0], tensors["flipped_std"][row].double() / scale, rtol=1e-3)


def test_the_digest_follows_images_and_captions(caches):
    assert caches.train.digest() == caches.train.digest() != caches.validation.digest()
    assert caches.train.take(29).digest() != caches.train.digest()


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"latents/stats\.json does not exist: run `dvc repro`"):
        load_caches(tmp_path / "latents", tmp_path / "text")


@pytest.mark.parametrize(("column", "says"), [("caption_id", "has no embedding"), ("image_id", "no caption in the")])
def test_caches_that_do_not_belong_together_are_refused(caches, tmp_path, column, says):
    path = tmp_path / "text" / "pairs.parquet"
    pairs = pd.read_parquet(path)
    path.unlink()
    pairs.loc[pairs[column] == pairs.loc[0, column], column] = "another"
    pairs.to_parquet(path, index=False)
    with pytest.raises(ValueError, match=says):
        load_caches(tmp_path / "latents", tmp_path / "text")


def test_captions_are_joined_in_their_order_whatever_the_order_of_pairs_and_whichever_images_were_refused(write_caches):
    latents, text = write_caches(40)
    index, pairs = pd.read_parquet(latents / "index.parquet"), pd.read_parquet(text / "pairs.parquet")
    index.drop(index=[0, 7, 33]).to_parquet(latents / "index.parquet", index=False)
    pairs.sample(frac=1, random_state=0).to_parquet(text / "pairs.parquet", index=False)
    text_of = pd.read_parquet(text / "index.parquet").set_index("id")["text"]
    train = load_caches(latents, text).train
    assert len(train) == 32 - 3
    for own, captions, count in zip(train.ids, train.captions.tolist(), train.caption_counts.tolist(), strict=True):
        expected = [text_of[caption] for caption in pairs[pairs["image_id"] == own]["caption_id"]]
        assert [train.texts[row] for row in captions] == (expected * len(captions))[: len(captions)]
        assert count == len(expected)
