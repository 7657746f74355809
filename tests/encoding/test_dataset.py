"""The training data as the caches hold it: standardised, joined with its captions, in the order of ids."""

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from latent_data import read_cache

from latentloom.encoding.cache import save_shard
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.dataset import load_caches
from latentloom.encoding.latents import encode_images
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import load_shard
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.errors import UserError
from latentloom.files import read_json, write_json
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
    mean, std = caches.train.latents_at(slice(0, 30))
    samples = mean + std * torch.randn(200, *mean.shape)
    np.testing.assert_allclose(samples.mean((0, 1, 3, 4)), 0, atol=0.02)
    np.testing.assert_allclose(samples.transpose(2, 4).flatten(0, 3).std(0), 1, atol=0.02)


def test_splits_share_no_image_and_are_in_the_order_of_ids(caches):
    assert (len(caches.train), len(caches.validation)) == (30, 10)
    assert not set(caches.train.names()) & set(caches.validation.names())
    assert caches.train.names() == sorted(caches.train.names())


def test_each_image_has_its_own_captions_and_latent(caches, tmp_path):
    metadata = read_metadata(tmp_path / "images").set_index("id")
    index, tensors, statistics = read_cache(tmp_path / "latents")
    text_index, text_tensors, _ = read_cache(tmp_path / "text")
    row_of_text = {text: row for row, text in enumerate(text_index["text"])}
    row_of_id = {own: row for row, own in enumerate(index["id"])}
    scale, center = (np.array(statistics[name])[:, None, None] for name in ("std", "mean"))
    latents, _ = caches.train.latents_at(slice(0, 30))
    for position, own in enumerate(caches.train.names()):
        own_texts = caches.train.texts.at(caches.train.captions[torch.tensor([position])].flat()[1])
        assert own_texts == list(metadata.loc[own, "captions"])
        raw = tensors["mean"][row_of_id[own]].double().numpy()
        np.testing.assert_allclose(latents[position], (raw - center) / scale, atol=1e-4)
        primary = text_tensors["embedding"][row_of_text[own_texts[0]]].float()
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
    assert train.weights.tolist() == [weight_of[own] for own in train.names()]
    assert train.take(3).weights.tolist() == train.weights.tolist()[:3]
    mean, std = train.latents_at(slice(0, 2 * len(train)))
    np.testing.assert_allclose(mean.double().mean((0, 2, 3)), 0, atol=1e-3)
    _, tensors, statistics = read_cache(tmp_path / "latents")
    row = index["id"].tolist().index(train.names()[0])
    scale = np.array(statistics["std"])[:, None, None]
    np.testing.assert_allclose(std[train.first_mirrored], tensors["flipped_std"][row].double() / scale, rtol=1e-3)


def test_a_splits_digest_follows_images_and_captions(write_caches):
    latents, text = write_caches(20)
    digests = [load_caches(latents, text).digests, load_caches(latents, text).digests]
    assert digests[0] == digests[1]
    assert digests[0]["training"] != digests[0]["validation"]
    for path in (latents / "index.parquet", text / "pairs.parquet"):
        table = pd.read_parquet(path)
        table[::-1].to_parquet(path)  # another content of the same length
        digests.append(load_caches(latents, text).digests)
    assert len({own["training"] for own in digests}) == 3


def test_an_empty_validation_split_is_said_and_can_be_asked_for_nothing(write_caches):
    latents, text = write_caches(20)
    assert load_caches(latents, text).has_validation
    index = pd.read_parquet(latents / "index.parquet")
    index.assign(split="train").to_parquet(latents / "index.parquet")
    for memory_share in (1.0, 0.0):
        caches = load_caches(latents, text, memory_share=memory_share)
        assert not caches.has_validation
        assert caches.validation.primary_texts() == []
        assert caches.validation.primary_embeddings().shape == (0, 12)
        assert list(caches.validation.parts(8)) == []


def test_an_empty_training_split_is_an_error_of_the_users(write_caches):
    latents, text = write_caches(20)
    pd.read_parquet(latents / "index.parquet").assign(split="validation").to_parquet(latents / "index.parquet")
    with pytest.raises(UserError, match="has no training image"):
        load_caches(latents, text)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(UserError, match=r"latents/stats\.json does not exist: run `dvc repro`"):
        load_caches(tmp_path / "latents", tmp_path / "text")


@pytest.mark.parametrize(("column", "says"), [("caption_id", "has no embedding"), ("image_id", "no caption in the")])
def test_caches_that_do_not_belong_together_are_rejected(caches, tmp_path, column, says):
    path = tmp_path / "text" / "pairs.parquet"
    pairs = pd.read_parquet(path)
    path.unlink()
    pairs.loc[pairs[column] == pairs.loc[0, column], column] = "f" * 64
    pairs.to_parquet(path, index=False)
    with pytest.raises(UserError, match=says):
        load_caches(tmp_path / "latents", tmp_path / "text")


def test_captions_keep_their_order_whatever_the_order_of_pairs_and_whichever_images_were_rejected(
    write_caches,
):
    latents, text = write_caches(40)
    index, pairs = pd.read_parquet(latents / "index.parquet"), pd.read_parquet(text / "pairs.parquet")
    index.drop(index=[0, 7, 33]).to_parquet(latents / "index.parquet", index=False)
    pairs.sample(frac=1, random_state=0).to_parquet(text / "pairs.parquet", index=False)
    text_of = pd.read_parquet(text / "index.parquet").set_index("id")["text"]
    train = load_caches(latents, text).train
    assert len(train) == 32 - 3
    for position, own in enumerate(train.names()):
        expected = [text_of[caption] for caption in pairs[pairs["image_id"] == own]["caption_id"]]
        assert train.texts.at(train.captions[torch.tensor([position])].flat()[1]) == expected


@pytest.mark.parametrize("memory_share", [1.0, 0.0])
def test_a_split_of_two_shapes_is_a_data_set_of_each(write_caches, memory_share):
    latents, text = write_caches(40)
    index, statistics = pd.read_parquet(latents / "index.parquet"), read_json(latents / "stats.json")
    plain = load_caches(latents, text)
    wide = index["shard"] == "00001.safetensors"
    for path in (latents / "00001.safetensors", latents / "flipped" / "00001.safetensors"):
        save_shard(path, {name: tensor[..., :6].contiguous() for name, tensor in load_shard(path).items()}, ["keys"])
    index["height"], index["width"] = 8, np.where(wide, 6, 8)
    index.to_parquet(latents / "index.parquet", index=False)
    write_json(latents / "stats.json", statistics | {"latent_shape": [4, 8, 8], "latent_shapes": []})

    caches = load_caches(latents, text, memory_share=memory_share)
    train = caches.train
    assert train.shapes == ((4, 8, 6), (4, 8, 8))
    assert caches.latent_shape == (4, 8, 8)
    known_ids = plain.train.names()
    assert sorted(train.names()) == known_ids
    for bucket in train.buckets:
        assert bucket.names() == sorted(set(known_ids) & set(index["id"][wide == (bucket.latent_shape[2] == 6)]))
        rows = [known_ids.index(own) for own in bucket.names()]
        for own, known in ((0, 0), (bucket.first_mirrored, plain.train.first_mirrored)):
            mean, std = bucket.latents_at(slice(own, own + len(bucket)))
            expected = plain.train.latents_at(torch.tensor(rows) + known)
            assert torch.equal(mean, expected[0][..., : mean.shape[3]])
            assert torch.equal(std, expected[1][..., : std.shape[3]])
        assert bucket.primary_texts() == [plain.train.primary_texts()[row] for row in rows]
        assert torch.equal(bucket.weights, plain.train.weights[rows])
    at = torch.tensor([known_ids.index(own) for own in train.names()])
    for own, expected in zip(train.captions.flat(), plain.train.captions[at].flat(), strict=True):
        assert torch.equal(own, expected)
    assert set(train.all_texts()) == set(plain.train.all_texts())
    assert torch.equal(train.primary_embeddings(), plain.train.primary_embeddings()[at])
    for count in (0, 3, 100):
        assert sorted(train.take(count).names()) == known_ids[:count]
