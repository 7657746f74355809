"""What is said of the VAE's own quality: the PSNR of some images, decoded from the latents that are trained on."""

import io

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from latent_data import read_cache
from PIL import Image

from latentloom.encoding import reconstruction
from latentloom.encoding.latents import encode_images
from latentloom.encoding.reconstruction import psnr, reconstruct
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import load_vae
from latentloom.ingestion.shards import iterate_images


def test_the_ratio_is_that_of_its_definition_and_finite_for_equal_pictures():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    others = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    others[2] = pictures[2]
    noise = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(pictures[:2], others[:2], strict=True)]
    expected = 20 * np.log10(255) - 10 * np.log10(noise)
    np.testing.assert_allclose(psnr(pictures, others), [*expected, 99.0])


@pytest.fixture
def encoded(tmp_path, prepare_images, monkeypatch):
    """``encoded(seeds)`` encodes images and decodes a sample of five; how many were decoded by the VAE, and what was
    written."""
    monkeypatch.setattr(reconstruction, "SAMPLE", 5)
    monkeypatch.setattr(reconstruction, "SHOWN", 2)
    monkeypatch.setattr(reconstruction, "BATCH_SIZE", 3)
    vae, store = load_vae(str(tiny_models.save_kl_vae(tmp_path / "vae"))), RowStore(tmp_path / "state", 2**30)
    calls = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda raw, **options: calls.append(len(raw)) or decode(raw, **options))

    def run(seeds, name):
        images, out = prepare_images(seeds, name=f"{name} images"), tmp_path / name
        encode_images(vae, images, out, store)
        calls.clear()
        mean = reconstruct(vae, images, out, store)
        frame = pd.read_parquet(out / "reconstructions.parquet")
        assert mean == pytest.approx(frame["psnr"].mean(), abs=1e-5)
        return list(calls), frame, images

    run.vae = vae
    return run


def test_the_sample_is_decoded_from_the_stored_latents_and_the_worst_are_kept(encoded, tmp_path):
    _, frame, images = encoded(range(20), "out")
    index, tensors, _ = read_cache(tmp_path / "out")
    assert set(frame["id"]) == set(sorted(index["id"], key=lambda own: own[::-1])[:5])
    originals = dict(iterate_images(images))
    rows = dict(zip(index["id"], tensors["mean"], strict=True))
    for row in frame.itertuples():
        with torch.no_grad():
            direct = encoded.vae.module.decode(rows[row.id][None].float()).sample
        direct = ((direct[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        assert row.psnr == pytest.approx(psnr(originals[row.id][None], direct[None])[0], abs=0.05)
        if row.preview is not None:
            with Image.open(io.BytesIO(row.preview)) as preview:
                assert np.abs(np.asarray(preview, dtype=int) - direct).max() <= 1
    worst = frame.sort_values("psnr")["preview"].notna().tolist()
    assert worst == [True, True, False, False, False]


def test_what_was_decoded_before_is_not_decoded_again_and_changes_no_byte(encoded, tmp_path):
    calls, before, _ = encoded(range(20), "first")
    assert calls == [3, 3]
    assert encoded(range(20), "second")[0] == []
    first, second = ((tmp_path / name / "reconstructions.parquet").read_bytes() for name in ("first", "second"))
    assert first == second
    calls, after, _ = encoded(range(30), "third")
    new = set(after["id"]) - set(before["id"])
    assert sum(calls) == 3 * -(-len(new) // 3)


def test_a_decoder_that_was_damaged_shows(tmp_path, prepare_images):
    """A download that ended early may leave a whole file with zeros; its latents look like any others."""
    images = prepare_images(range(8))
    ratios = []
    for part in (None, "decoder.conv_out"):
        vae = load_vae(str(tiny_models.save_kl_vae(tmp_path / "vae")))
        for name, weight in vae.module.named_parameters():
            weight.data *= 0.0 if part and name.startswith(part) else 1.0
        encode_images(vae, images, tmp_path / "out", RowStore(tmp_path / str(part), 2**30))
        ratios.append(reconstruct(vae, images, tmp_path / "out", RowStore(tmp_path / str(part), 2**30)))
    assert ratios[0] != ratios[1]
