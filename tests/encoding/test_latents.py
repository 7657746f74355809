"""The latent cache, from prepared images by VAEs of both classes."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch

from latentloom.encoding.latents import ChannelStatistics, encode_images, read_latents
from latentloom.encoding.vae import load_vae, vae_fingerprint
from latentloom.ingestion.shards import iterate_images, read_metadata


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_vae(str(tiny_models.save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")))


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return load_vae(str(tiny_models.save_kl_vae(tmp_path_factory.mktemp("vae") / "kl")))


def test_latents_of_a_deterministic_vae_are_diffusers_own(tiny, prepare_images, tmp_path):
    images = prepare_images(range(6))
    counts = encode_images(tiny, images, tmp_path / "latents", tmp_path / "state")
    index, tensors, statistics = read_latents(tmp_path / "latents")
    assert (counts.rows, counts.encoded, counts.reused) == (6, 6, 0)
    assert set(tensors) == {"mean"}
    assert statistics["latent_shape"] == [4, 4, 4]
    assert statistics["distribution"] == "mean"
    pixels = np.stack([array for _, array in iterate_images(images)])
    with torch.no_grad():
        direct = tiny.module.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    torch.testing.assert_close(tensors["mean"].float(), direct, atol=2e-3, rtol=2e-3)
    assert index["id"].tolist() == read_metadata(images)["id"].tolist()


def test_latents_of_a_vae_with_a_distribution_are_moments(kl, prepare_images, tmp_path):
    images = prepare_images(range(3))
    encode_images(kl, images, tmp_path / "latents", tmp_path / "state")
    _, tensors, statistics = read_latents(tmp_path / "latents")
    assert statistics["distribution"] == "moments"
    pixels = np.stack([array for _, array in iterate_images(images)])
    with torch.no_grad():
        posterior = kl.module.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(tensors["mean"].float(), posterior.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tensors["std"].float(), posterior.std, atol=2e-3, rtol=2e-3)


def test_statistics_are_those_of_the_training_split(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(40)), tmp_path / "latents", tmp_path / "state")
    index, tensors, statistics = read_latents(tmp_path / "latents")
    chosen = tensors["mean"].numpy().astype(np.float64)[(index["split"] == "train").to_numpy()]
    np.testing.assert_allclose(statistics["mean"], chosen.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(statistics["std"], chosen.std((0, 2, 3)), rtol=1e-9)
    assert statistics["train_rows"] == len(chosen) == 30


def test_one_pass_statistics_do_not_lose_digits_far_from_zero():
    values = torch.randn(300, 2, 3, 3, dtype=torch.float64) + 1e6
    statistics = ChannelStatistics()
    for part in values.split(7):
        statistics.add({"mean": part})
    mean, std = statistics.result()
    np.testing.assert_allclose(mean, values.numpy().mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.numpy().std((0, 2, 3)), rtol=1e-6)


def test_statistics_of_moments_are_those_of_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, 1, 2, 2, generator=generator)
    std = torch.rand(2000, 1, 2, 2, generator=generator)
    statistics = ChannelStatistics()
    statistics.add({"mean": mean, "std": std})
    samples = mean + std * torch.randn(50, *mean.shape, generator=generator)
    assert statistics.result()[1][0] == pytest.approx(float(samples.std()), rel=0.01)


def test_the_index_describes_each_row(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(5)), tmp_path / "latents", tmp_path / "state")
    index, tensors, _ = read_latents(tmp_path / "latents")
    rows = tensors["mean"].float().flatten(1).numpy()
    np.testing.assert_allclose(index["mean"], rows.mean(1), atol=1e-5)
    np.testing.assert_allclose(index["std"], rows.std(1), atol=1e-5)
    np.testing.assert_allclose(index["abs_max"], np.abs(rows).max(1))
    assert index["finite"].all()
    assert index["key"].is_unique


def test_a_row_does_not_depend_on_its_neighbours_order_or_name(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(40), name="a"), tmp_path / "la", tmp_path / "sa")
    encode_images(tiny, prepare_images([33, 7, 20], name="b"), tmp_path / "lb", tmp_path / "sb")
    all_index, all_tensors, _ = read_latents(tmp_path / "la")
    few_index, few_tensors, _ = read_latents(tmp_path / "lb")
    by_id = dict(zip(all_index["id"], all_tensors["mean"], strict=True))
    for own, row in zip(few_index["id"], few_tensors["mean"], strict=True):
        assert torch.equal(row, by_id[own])
    assert set(few_index["key"]) <= set(all_index["key"])


def test_added_images_alone_are_encoded(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(20), name="a"), tmp_path / "la", tmp_path / "state")
    counts = encode_images(tiny, prepare_images(range(22), name="b"), tmp_path / "lb", tmp_path / "state")
    assert (counts.encoded, counts.reused) == (2, 20)


def test_other_weights_of_the_same_class_are_never_served_from_the_store(tiny, prepare_images, tmp_path):
    other = load_vae(str(tiny_models.save_tiny_vae(tmp_path / "other", seed=1)))
    images = prepare_images(range(4))
    encode_images(tiny, images, tmp_path / "a", tmp_path / "state")
    counts = encode_images(other, images, tmp_path / "b", tmp_path / "state")
    assert counts.reused == 0
    assert not torch.equal(read_latents(tmp_path / "a")[1]["mean"], read_latents(tmp_path / "b")[1]["mean"])


def test_two_runs_from_nothing_write_the_same_bytes(tiny, prepare_images, tmp_path):
    images = prepare_images(range(10))
    for name in ("a", "b"):
        encode_images(tiny, images, tmp_path / name, tmp_path / f"state-{name}")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.safetensors", "index.parquet", "stats.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_decoding_gives_pictures_of_the_size_that_was_encoded(kl):
    decoded = kl.decode(torch.randn(3, 4, 4, 4))
    assert decoded.shape == (3, 32, 32, 3)
    assert decoded.dtype == np.uint8


def test_the_fingerprint_follows_the_weights_not_the_folder(tmp_path):
    first = tiny_models.save_tiny_vae(tmp_path / "first")
    same = tiny_models.save_tiny_vae(tmp_path / "same")
    other = tiny_models.save_tiny_vae(tmp_path / "other", seed=1)
    assert vae_fingerprint(str(first)) == vae_fingerprint(str(same)) != vae_fingerprint(str(other))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nowhere", "no folder here and no hub id"),
        ("just-a-word", "allowed: bundled, a hub id"),
        ("somebody/unheard-of-vae", "could not fetch 'somebody/unheard-of-vae'"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(reference, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(reference)
    assert str(caught.value).startswith("encode_images.vae")


def test_another_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel; supported: AutoencoderKL, AutoencoderTiny"):
        load_vae(str(tmp_path))


def test_a_damaged_index_is_named(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(2)), tmp_path / "latents", tmp_path / "state")
    (tmp_path / "latents" / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"index\.parquet is missing or damaged"):
        read_latents(tmp_path / "latents")


def test_pandas_opens_the_index(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(2)), tmp_path / "latents", tmp_path / "state")
    assert len(pd.read_parquet(tmp_path / "latents" / "index.parquet")) == 2
