"""Samples measured beside real pictures, from captions to figures, with a tiny CLIP and a tiny DINOv2."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_data import TensorDataset
from scipy.spatial.distance import cosine
from tiny_models import save_dinov2, save_whole_clip

from latentloom.diffusion import SamplingSettings
from latentloom.encoding.dataset import Caches, LatentDataset
from latentloom.errors import UserError
from latentloom.evaluation import distribution
from latentloom.evaluation.distances import cmmd, frechet_distance, kernel_distance
from latentloom.evaluation.distribution import load_encoders, measure_distribution
from latentloom.ingestion.shards import iterate_images, read_metadata

CPU = torch.device("cpu")
DISTANCES = {"fid", "kid", "kid_standard_error", "cmmd", "fid_real", "kid_real", "cmmd_real"}
OF_CLIP = {"clip_score", "clip_score_standard_error", "clip_score_real", "clip_score_chance"}
COUNTS = {"distribution_samples", "distribution_images"}


class Paints:
    """A model whose sample of a name is what ``paint`` makes of it: pixels (32, 32, 3)."""

    device = CPU

    def __init__(self, paint):
        self.paint, self.names, self.embeddings, self.codec = paint, [], [], self

    def latents(self, embeddings, names, settings, *, seed, shapes):
        self.names += names
        self.embeddings += embeddings[:, 0].tolist()
        return [self.paint(name, seed) for name in names]

    def decode_each(self, latents):
        return latents


def noise(name: str, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *name.encode()]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {"clip": str(save_whole_clip(base / "clip")), "features": str(save_dinov2(base / "dinov2"))}


@pytest.fixture
def data(prepare_images, monkeypatch, tmp_path):
    """Both splits of 24 pictures, 6 of them held out; what is encoded is kept in the test's own folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    images = prepare_images(range(24))
    metadata = read_metadata(images)

    def split(name: str) -> LatentDataset:
        rows = torch.from_numpy(np.flatnonzero(metadata["split"] == name))
        return TensorDataset.from_tensors(
            ids=metadata["id"].iloc[rows.numpy()].tolist(),
            mean=torch.zeros(len(rows), 4, 4, 4),
            std=None,
            embeddings=torch.arange(24.0)[:, None].expand(-1, 8),
            texts=[captions[0] for captions in metadata["captions"]],
            captions=rows[:, None],
        )

    return Caches(split("train"), split("validation"), {}, {}), images


def settings(**changes) -> SimpleNamespace:
    shipped = {"features": None, "clip": None, "samples": 6, "real_images": "held_out", "sampling": SamplingSettings()}
    return SimpleNamespace(**shipped | changes)


def measured(data, model, *, seed=0, **changes):
    chosen = settings(**changes)
    return measure_distribution(load_encoders(chosen, CPU), chosen, model, *data, seed=seed)


def test_the_whole_path_gives_the_figures_of_the_encoders_features(data, folders):
    caches, images = data
    result = measured(data, Paints(noise), **folders)
    pixels, held_out = dict(iterate_images(images)), caches.validation.names()
    of_samples, of_real, of_other = (
        [noise(name, 0) for name in held_out],
        [pixels[name] for name in held_out],
        [pixels[name] for name in caches.train.names()[:6]],
    )
    encoders = load_encoders(settings(**folders), CPU)
    samples, real, other = (encoders.features.encode(np.stack(own)) for own in (of_samples, of_real, of_other))
    figures = result.figures
    assert figures.keys() == DISTANCES | OF_CLIP | COUNTS
    assert figures["fid"] == pytest.approx(frechet_distance(real, samples), rel=1e-3)
    assert figures["cmmd"] == pytest.approx(cmmd(real, samples), rel=1e-3)
    assert (figures["kid"], figures["kid_standard_error"]) == pytest.approx(kernel_distance(real, samples), rel=1e-3)
    assert figures["fid_real"] == pytest.approx(frechet_distance(real, other), rel=1e-3)
    captions = encoders.clip.text.encode(caches.validation.primary_texts())
    for name, shown, own in (
        ("clip_score", of_samples, captions),
        ("clip_score_real", of_real, captions),
        ("clip_score_chance", of_real, captions[[-1, *range(5)]]),
    ):
        pairs = zip(encoders.clip.vision.encode(np.stack(shown)), own, strict=True)
        scores = [max(100 * (1 - cosine(picture, caption)), 0) for picture, caption in pairs]
        assert figures[name] == pytest.approx(np.mean(scores), rel=1e-3, abs=1e-6)
    assert (figures["distribution_samples"], figures["distribution_images"]) == (6, 6)
    assert result.left_out == ""
    assert result.seconds.keys() >= {
        "sampling",
        "sample_features",
        "image_features",
        "fid",
        "kid",
        "cmmd",
        "clip_score",
    }


def test_a_model_that_returns_the_real_pictures_is_no_distance_from_them_and_agrees_as_they_do(data, folders):
    pixels = dict(iterate_images(data[1]))
    figures = measured(data, Paints(lambda name, seed: pixels[name]), **folders).figures
    assert figures["fid"] == pytest.approx(0, abs=1e-3 * figures["fid_real"])
    assert figures["cmmd"] == pytest.approx(0, abs=1e-3 * figures["cmmd_real"])
    assert figures["kid"] <= 0
    assert figures["clip_score"] == figures["clip_score_real"]


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(data, folders):
    first, again, other = (measured(data, Paints(noise), seed=seed, **folders).figures for seed in (0, 0, 1))
    assert first == again
    assert first["fid"] != other["fid"]


def test_captions_come_again_with_other_noise_where_there_are_fewer_than_samples(data, folders, monkeypatch):
    monkeypatch.setattr(distribution, "PART", 4)
    (caches, _), model = data, Paints(noise)
    figures = measured(data, model, features=folders["features"], samples=15).figures
    assert (figures["distribution_samples"], figures["distribution_images"]) == (15, 6)
    assert model.names[:6] == caches.validation.names()  # the samples of which the held-out figures are
    assert len(set(model.names)) == 15
    captions = caches.validation.captions.primary.float().tolist()
    assert model.embeddings == (captions * 3)[:15]


def test_training_pictures_can_be_the_real_ones_and_no_more_of_them_than_samples(data, folders):
    (caches, _), model = data, Paints(noise)
    figures = measured(data, model, features=folders["features"], samples=9, real_images="training").figures
    assert (figures["distribution_samples"], figures["distribution_images"]) == (9, 9)
    assert model.names == caches.train.names()[:9]


@pytest.mark.parametrize(
    ("named", "kept", "left_out"),
    [
        ("features", DISTANCES | COUNTS, "clip_score (evaluate.clip is null)"),
        ("clip", OF_CLIP | COUNTS, "fid, kid, cmmd (evaluate.features is null)"),
    ],
)
def test_a_figure_without_its_encoder_is_left_out_and_named(data, folders, named, kept, left_out):
    result = measured(data, Paints(noise), **{named: folders[named]})
    assert result.figures.keys() == kept
    assert result.left_out == left_out


def test_without_encoders_nothing_is_sampled(data):
    model = Paints(noise)
    result = measured(data, model)
    assert (result.figures, result.seconds, model.names) == ({}, {}, [])
    assert result.left_out == "fid, kid, cmmd (evaluate.features is null), clip_score (evaluate.clip is null)"


@pytest.mark.parametrize(
    ("held_out", "kept", "left_out"),
    [
        (0, set(), "fid, kid, cmmd (there are no held-out images), clip_score (there are no held-out images)"),
        (2, OF_CLIP | COUNTS, "fid, kid, cmmd (of 2 images and samples, at the fewest 3 are needed)"),
    ],
)
def test_figures_of_too_few_real_pictures_are_left_out_and_that_is_said(data, folders, held_out, kept, left_out):
    caches, images = data
    few = Caches(caches.train, caches.validation.take(held_out), {}, {})
    result = measured((few, images), Paints(noise), **folders)
    assert result.figures.keys() == kept
    assert result.left_out == left_out


def test_what_is_wrong_with_an_encoder_is_said_by_its_key(tmp_path):
    with pytest.raises(UserError, match=r"^evaluate.clip: 'nowhere'"):
        load_encoders(settings(clip="nowhere"), CPU)
