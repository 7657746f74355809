"""Pictures of several shapes at two resolutions: from their files to latents in memory."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from PIL import Image

from latentloom import sharding
from latentloom.encoding.captions import encode_captions
from latentloom.encoding.dataset import load_caches
from latentloom.encoding.latents import encode_images
from latentloom.encoding.reconstruction import reconstruct
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.files import read_json
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.shards import iterate_images, prepared_sizes, read_manifest, read_metadata
from latentloom.params import IngestParams

PARAMS = {
    "source": "folder",
    "limit": None,
    "skin_tones": 0,
    "val_fraction": 0.2,
    "max_reject_fraction": 0.5,
    "max_pixels": 2**20,
    "max_aspect_ratio": 9.0,
    "near_duplicate_distance": None,
    "shape": "buckets",
    "image_size": [32, 64],
    "bucket_multiple": 8,
    "max_bucket_ratio": 2.0,
}
ORIGINALS = [(64, 64), (100, 48), (40, 24), (30, 31)] * 5  # width, height
PREPARED = [(64, 64), (88, 48), (40, 24), (32, 32)] * 5
SHAPES = {(64, 64): (4, 8, 8), (88, 48): (4, 6, 11), (40, 24): (4, 3, 5), (32, 32): (4, 4, 4)}


class Project:
    """Pictures of noise in a folder, and what the stages make of them beside it."""

    def __init__(self, root: Path, vae) -> None:
        self.vae, self.pictures = vae, root / "pictures"
        self.images, self.latents, self.text = (root / name for name in ("images", "latents", "text"))
        self.rejects, self.near, self.store = root / "rejects.parquet", root / "near.parquet", root / "store"
        self.pictures.mkdir()
        self.pixels = {}

    def add(self, width: int, height: int) -> None:
        name = f"{len(self.pixels):02d}.png"
        self.pixels[name] = np.random.default_rng(len(self.pixels)).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(self.pixels[name]).save(self.pictures / name)
        (self.pictures / name).with_suffix(".txt").write_text(f"picture {name}")

    def ingest(self):
        params = IngestParams(path=str(self.pictures), **PARAMS)
        return ingest(params, self.images, self.rejects, self.near, progress=False)

    def encode(self, flip: bool = False):
        return encode_images(self.vae, self.images, self.latents, RowStore(self.store, 2**30), flip=flip)

    def shards(self, folder: str, suffix: str) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(getattr(self, folder).glob(suffix))]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(str(tiny_models.save_tiny_vae(tmp_path_factory.mktemp("vae"))))


@pytest.fixture
def make_project(tmp_path, vae, monkeypatch):
    rows = sharding.ShardBytes(2, 2, 6)  # of the smallest shape
    monkeypatch.setattr(sharding, "IMAGES", sharding.ShardBytes(*(3000 * own for own in rows)))
    monkeypatch.setattr(sharding, "TENSORS", sharding.ShardBytes(*(2 * 4 * 4 * 4 * own for own in rows)))

    def make(sizes: list[tuple[int, int]]) -> Project:
        project = Project(tmp_path, vae)
        for width, height in sizes:
            project.add(width, height)
        project.ingest()
        return project

    return make


def test_each_picture_is_prepared_encoded_and_read_in_its_own_shape(make_project, tmp_path):
    project = make_project(ORIGINALS)
    report = project.ingest()
    manifest, metadata, pixels = read_manifest(project.images), read_metadata(project.images), {}
    assert manifest["image_size"] == [32, 64]
    assert manifest["sizes"] == [[32, 32, 5], [40, 24, 5], [64, 64, 5], [88, 48, 5]]
    assert prepared_sizes(project.images).tolist() == [list(size) for size in PREPARED]
    for key, (own, prepared), size in zip(metadata["key"], iterate_images(project.images), PREPARED, strict=True):
        pixels[own] = prepared
        assert prepared.shape == (size[1], size[0], 3)
        if size != (32, 32):  # all others are not scaled: of the widest, 6 columns are cut off on either side
            assert np.array_equal(prepared, project.pixels[key][:, 6:-6] if size == (88, 48) else project.pixels[key])
    assert [(row["size"], row["images"], row["cut_off"]) for row in report.sizes[-2:]] == [
        ("88x48", 5, 0.12),
        ("all", 20, round((5 * 12 / 100 + 5 * 1 / 31) / 20, 4)),
    ]
    assert report.sizes[-1]["cut_off_by_square"] == round((5 * 52 / 100 + 5 * 16 / 40 + 5 * 1 / 31) / 20, 4)
    assert " 88x48" in report.size_table

    assert project.encode(flip=True).rows == 40
    psnr = reconstruct(project.vae, project.images, project.latents, RowStore(project.store, 2**30))
    encoder = load_text_encoder(str(tiny_models.save_clip(tmp_path / "clip")))
    encode_captions(encoder, project.images, project.text, RowStore(tmp_path / "texts", 2**30))
    index = pd.read_parquet(project.latents / "index.parquet")
    statistics = read_json(project.latents / "stats.json")
    assert index["id"].tolist() == [
        own for size in sorted(set(PREPARED)) for own, of in zip(metadata["id"], PREPARED, strict=True) if of == size
    ]
    assert statistics["latent_shape"] == [4, 4, 4]
    assert statistics["latent_shapes"] == [[*SHAPES[size], 5] for size in sorted(set(PREPARED))]
    latents, errors = {}, []
    for own, prepared in pixels.items():
        views = [project.vae.encode(view[None])["mean"].half().float() for view in (prepared, prepared[:, ::-1].copy())]
        latents[own] = torch.cat(views).double().numpy()
        decoded = project.vae.decode(views[0])[0].astype(float)
        errors.append(10 * np.log10(255**2 / np.square(decoded - prepared).mean()))
    assert psnr == pytest.approx(np.mean(errors), abs=1e-2)

    caches = load_caches(project.latents, project.text)
    in_train = metadata["id"][metadata["split"] == "train"]
    values = np.concatenate([view.reshape(4, -1) for own in in_train for view in latents[own]], axis=1)
    assert statistics["mean"] == pytest.approx(values.mean(1), abs=1e-4)
    assert statistics["std"] == pytest.approx(values.std(1), abs=1e-4)
    assert sorted(caches.train.names()) == sorted(in_train)
    assert set(caches.train.shapes) <= set(SHAPES.values())
    assert caches.latent_shape == (4, 4, 4)
    for split in (caches.train, caches.validation):
        for bucket in split.buckets:
            expected = np.stack([latents[own][view] for view in (0, 1) for own in bucket.names()])
            expected = (expected - values.mean(1)[:, None, None]) / values.std(1)[:, None, None]
            assert bucket.first_mirrored == len(bucket)
            np.testing.assert_allclose(bucket.latents_at(slice(0, 2 * len(bucket)))[0], expected, atol=2e-3)
            key_of = dict(zip(metadata["id"], metadata["key"], strict=True))
            assert bucket.primary_texts() == [f"picture {key_of[own]}" for own in bucket.names()]


def test_one_added_picture_changes_one_shard_of_each_kind(make_project):
    project = make_project(ORIGINALS)
    project.encode()
    images, latents = project.shards("images", "*.parquet"), project.shards("latents", "*.safetensors")
    project.add(66, 64)
    project.ingest()
    counts = project.encode()
    assert (counts.rows, counts.encoded) == (21, 1)
    assert len(set(project.shards("images", "*.parquet")) - set(images)) == 1
    assert len(set(project.shards("latents", "*.safetensors")) - set(latents)) == 1


def test_a_killed_encoding_of_several_shapes_resumes_to_the_same_bytes(make_project, monkeypatch, tmp_path):
    project = make_project(ORIGINALS)
    encode, calls = project.vae.encode, []

    def killed(pixels, **options):
        calls.append(pixels.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(pixels, **options)

    monkeypatch.setattr(project.vae, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        project.encode()
    assert calls == [(32, 32, 32, 3), (32, 24, 40, 3), (32, 64, 64, 3)]
    assert project.encode().encoded < 20
    resumed = project.shards("latents", "*")
    project.store, project.latents = tmp_path / "another store", tmp_path / "another"
    assert project.encode().encoded == 20
    assert project.shards("latents", "*") == resumed


def test_where_the_square_is_not_trained_on_the_shape_of_most_pictures_is_the_models(make_project):
    project = make_project([(40, 24)] * 3 + [(88, 48)] * 9)
    project.encode()
    assert read_json(project.latents / "stats.json")["latent_shape"] == [4, 6, 11]
