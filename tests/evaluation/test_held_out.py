"""Held-out figures tell a model that generalises from one that copies, mixes captions up, or knows only its words."""

import numpy as np
import pytest
import torch
from latent_data import TensorDataset, captions_of
from PIL import Image
from scipy.stats import binomtest

from latentloom.encoding.dataset import Caches, LatentDataset, Split
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.evaluation import recall
from latentloom.evaluation.held_out import combinations, measure
from latentloom.evaluation.recall import nearest, recalled, with_interval

COLOURS, SHAPES = ("red", "green", "blue", "medium-dark"), tuple("abcdefghij")
TEXTS = [f"{shape}, {colour}" for shape in SHAPES for colour in COLOURS]  # 40


def split(texts: list[str], among: list[str], seed: int) -> LatentDataset:
    """A latent for each caption, at random; captions are rows of ``among``."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset.from_tensors(
        ids=[f"{seed}-{number}" for number in range(len(texts))],
        mean=torch.randn(len(texts), 4, 4, 4, generator=generator),
        std=None,
        embeddings=torch.zeros(len(among), 8),
        texts=among,
        captions=torch.tensor([among.index(text) for text in texts], dtype=torch.long)[:, None],
    )


def caches_of(train: list[str], validation: list[str]) -> Caches:
    among = sorted({*train, *validation})
    return Caches(split(train, among, 0), split(validation, among, 1), {}, {})


@pytest.fixture
def caches() -> Caches:
    """40 captions held out of 120; each of their words is in training captions."""
    texts = [f"{text}, {size}" for text in TEXTS for size in ("big", "small", "old")]
    held_out = [texts[3 * row + row % 3] for row in range(40)]
    return caches_of([text for text in texts if text not in held_out], held_out)


def test_a_model_that_draws_the_held_out_images_has_full_recall_and_copies_nothing(caches):
    figures = measure(caches.validation.mean, caches.validation, caches).figures
    assert figures["held_out_combinations"] == len(caches.validation) == 40
    assert figures["held_out_recall_at_1"] == figures["held_out_recall_at_5"] == 1.0
    assert figures["copied_share"] <= 0.05
    assert figures["new_words_captions"] == 0
    assert not any(name.startswith("new_words_recall") for name in figures)


def test_a_model_that_returns_training_images_is_caught(caches):
    noise = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    copies = caches.train.mean[torch.arange(40)] + 0.05 * noise
    measured = measure(copies, caches.validation, caches)
    assert measured.figures["copied_share"] == 1.0
    assert measured.figures["held_out_recall_at_1"] == 0.0
    assert measured.nearest_ids == caches.train.names()[:40]


def test_a_model_that_mixes_captions_up_falls_to_chance(caches):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    figures = measure(caches.validation.mean[order], caches.validation, caches).figures
    assert figures["held_out_recall_at_1_low"] <= 1 / 40 <= figures["held_out_recall_at_1_high"] < 0.3
    assert figures["held_out_recall_at_5"] < 0.25


def test_the_share_of_copies_is_that_of_samples_nearer_than_the_5_percent_quantile_of_real_images(caches):
    generator = torch.Generator().manual_seed(4)
    samples = caches.validation.mean * torch.rand(40, 1, 1, 1, generator=generator)
    train, real, drawn = (
        tensor.flatten(1).double().numpy() for tensor in (caches.train.mean, caches.validation.mean, samples)
    )
    limit, near = (np.linalg.norm(each[:, None] - train[None], axis=2).min(1) for each in (real, drawn))
    figures = measure(samples, caches.validation, caches).figures
    assert 0 < figures["copied_share"] < 1
    assert figures["copied_share"] == pytest.approx((near < np.quantile(limit, 0.05)).mean())
    assert figures["copied_limit"] == pytest.approx(np.quantile(limit, 0.05) / 8, abs=1e-4)  # of 64 = 8² numbers


def test_any_image_of_the_caption_is_right():
    caches = caches_of(["red a", "blue b", "red b"], ["blue a", "red b", "red b"])
    samples = caches.validation.mean[[0, 2, 1]]  # each of the last two is the other's image
    assert measure(samples, caches.validation, caches).figures["held_out_recall_at_1"] == 1.0
    samples[1] = caches.train.mean[2]
    assert measure(samples, caches.validation, caches).figures["held_out_recall_at_1"] == 1.0
    samples[1] = caches.train.mean[0]
    assert measure(samples, caches.validation, caches).figures["held_out_recall_at_1"] == pytest.approx(2 / 3, abs=1e-4)


def test_any_caption_of_an_image_makes_it_right():
    data = split(["a", "b"], ["a", "b"], 0)
    both = TensorDataset(**{**data.__dict__, "captions": captions_of(torch.tensor([[0, 1], [1, 1]]))})
    rows, _ = nearest(data.mean[[0, 1]], [both])
    assert recalled(rows, [both], torch.tensor([1, 0])).tolist() == [True, False]


def test_captions_with_a_word_of_no_training_caption_are_counted_apart():
    caches = caches_of(["Red cat", "blue dog", "a dog's life"], ["Blue cat", "green cat", "red DOG", "red-blue dog"])
    assert combinations(caches.validation.primary_texts(), caches.train).tolist() == [True, False, True, False]
    samples = caches.validation.mean.clone()
    samples[1] = caches.train.mean[0]
    figures = measure(samples, caches.validation, caches).figures
    assert (figures["held_out_combinations"], figures["new_words_captions"]) == (2, 2)
    assert (figures["held_out_recall_at_1"], figures["new_words_recall_at_1"]) == (1.0, 0.5)


def test_words_are_those_of_all_captions_of_training_images_and_of_no_others():
    among = ["a cat", "kitten", "a kitten", "a puppy"]
    train = TensorDataset(**{**split(["a cat"], among, 0).__dict__, "captions": captions_of(torch.tensor([[0, 1]]))})
    assert combinations(["a kitten", "a puppy"], train).tolist() == [True, False]


def test_without_held_out_images_there_are_no_shares():
    caches = caches_of(["a", "b"], [])
    figures = measure(caches.validation.mean, caches.validation, caches).figures
    assert figures == {"held_out_combinations": 0, "new_words_captions": 0}


def test_a_single_image_of_each_kind_is_measured():
    caches = caches_of(["red a"], ["a red"])
    figures = measure(caches.validation.mean, caches.validation, caches).figures
    assert figures["held_out_recall_at_1"] == figures["held_out_recall_at_5"] == 1.0
    assert figures["copied_share"] == 0.0
    assert figures["held_out_recall_at_1_low"] == pytest.approx(0.2065, abs=1e-4)  # 1 / (1 + 1.96²)


@pytest.mark.parametrize(("right", "of"), [(0, 5), (3, 4), (70, 96), (96, 96)])
def test_the_interval_is_wilsons(right, of):
    figures = with_interval("share", np.arange(of) < right)
    z, p = 1.959964, right / of
    middle, half = (p + z**2 / (2 * of)), z * np.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    assert figures["share"] == pytest.approx(p, abs=1e-4)
    assert figures["share_low"] == pytest.approx((middle - half) / (1 + z**2 / of), abs=1e-4)
    assert figures["share_high"] == pytest.approx((middle + half) / (1 + z**2 / of), abs=1e-4)
    scipys = binomtest(right, of).proportion_ci(method="wilson")
    assert (figures["share_low"], figures["share_high"]) == pytest.approx((scipys.low, scipys.high), abs=1e-4)


@pytest.mark.parametrize("part", [3, 7, 100])
def test_the_nearest_of_several_data_sets_are_found_as_numpy_finds_them_whatever_the_parts(monkeypatch, part):
    monkeypatch.setattr(recall, "PART", part)
    first, second = split(TEXTS[:20], TEXTS, 0), split(TEXTS[20:], TEXTS, 1)
    first.mean[13] = first.mean[2]  # of two alike, the first
    samples = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    samples[0] = first.mean[13]
    rows, near = nearest(samples, [first, second], 5)
    references = torch.cat([first.mean, second.mean]).flatten(1).numpy()
    distances = np.linalg.norm(samples.flatten(1).numpy()[:, None] - references[None], axis=2)
    np.testing.assert_array_equal(rows, distances.argsort(1, kind="stable")[:, :5])
    np.testing.assert_allclose(near, np.sort(distances, 1)[:, :5] / 8, rtol=1e-5)  # of 64 = 8² numbers
    assert nearest(samples, [first], 50)[0].shape == (6, 20)


@pytest.mark.parametrize("part", [3, 100])
def test_pictures_of_other_shapes_are_candidates_at_the_samples_own_shape(monkeypatch, part):
    """Compared with what NumPy finds among pictures that Pillow resized, which filters as is meant here."""
    monkeypatch.setattr(recall, "PART", part)
    generator = torch.Generator().manual_seed(0)

    def bucket(first: int, height: int, width: int) -> LatentDataset:
        mean = torch.randn(6, 4, height, width, generator=generator)
        return TensorDataset(
            **{**split(TEXTS[first : first + 6], TEXTS, 0).__dict__, "latents": InMemoryRows({"mean": mean})}
        )

    buckets = [bucket(0, 4, 8), bucket(6, 6, 6), bucket(12, 8, 4)]
    pictures = [latent for data in buckets for latent in data.mean.numpy()]
    samples = [torch.randn(4, *size, generator=generator) for size in ((6, 6), (4, 8), (6, 6))]
    samples[1] = torch.from_numpy(resized(pictures[14], 4, 8)) + 0.01  # a copy of a picture of another shape
    rows, near = nearest(samples, [Split(tuple(buckets[:2])), buckets[2]], 5)
    for sample, own_rows, own_near in zip(samples, rows, near, strict=True):
        others = np.stack([resized(picture, *sample.shape[1:]) for picture in pictures])
        distances = np.sqrt(np.square(others - sample.numpy()).mean((1, 2, 3)))
        np.testing.assert_array_equal(own_rows, distances.argsort(kind="stable")[:5])
        np.testing.assert_allclose(own_near, np.sort(distances)[:5], rtol=1e-4)
    assert rows[1, 0] == 14


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR) for channel in picture]
    return np.stack([np.asarray(channel) for channel in channels])
