"""What a step draws is a function of the seed and the step."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from latentloom.training.draws import batch_rows, draw_batch, epoch_rows

SETTINGS = {"seed": 1, "batch_size": 16, "distribution": "cosine", "label_dropout": 0.25}


def test_the_same_seed_and_step_draw_the_same(make_data):
    data = make_data(20)
    first, again = draw_batch(data, step=3, **SETTINGS), draw_batch(data, step=3, **SETTINGS)
    for name in ("latents", "noise", "noise_levels", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.noise, draw_batch(data, step=4, **SETTINGS).noise)
    assert not torch.equal(first.noise, draw_batch(data, step=3, **SETTINGS | {"seed": 2}).noise)


def test_global_random_state_neither_matters_nor_changes(make_data):
    data = make_data(20)
    torch.manual_seed(5)
    first = draw_batch(data, step=3, **SETTINGS)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(draw_batch(data, step=3, **SETTINGS).noise, first.noise)


@pytest.mark.parametrize(("batch_size", "size"), [(4, 12), (5, 12), (16, 6)])
def test_each_row_comes_once_an_epoch(batch_size, size):
    epochs = 10
    rows = torch.cat([batch_rows(0, step, batch_size, size) for step in range(-(-epochs * size // batch_size))])
    for epoch in range(epochs):
        assert sorted(rows[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    assert not torch.equal(rows[:size], rows[size : 2 * size])


def test_noise_levels_are_stratified_over_the_batch(make_data):
    batch = draw_batch(make_data(20), step=0, **SETTINGS | {"distribution": "uniform"})
    strata = (batch.noise_levels.sort().values * 16).long()
    assert strata.tolist() == list(range(16))


def test_labels_are_dropped_to_zero_at_the_rate_asked_for(make_data):
    data = make_data(20)
    labels = torch.cat([draw_batch(data, step=step, **SETTINGS).labels for step in range(200)])
    dropped = (labels == 0).all(1).float().mean()
    assert abs(float(dropped) - 0.25) < 0.03


def test_without_dropout_no_label_is_dropped(make_data):
    batch = draw_batch(make_data(20), step=0, **SETTINGS | {"label_dropout": 0.0})
    assert not (batch.labels == 0).all(1).any()


def test_all_captions_of_an_image_are_drawn_alike(make_data):
    data = make_data(4)
    counts: Counter[bool] = Counter()
    for step in range(200):
        labels = draw_batch(data, step=step, **SETTINGS | {"label_dropout": 0.0}).labels
        counts.update((labels == data.embeddings[-1]).all(1).tolist())
    assert 0.45 < counts[True] / counts.total() < 0.55


def test_a_label_belongs_to_its_latent(make_data):
    data = replace(make_data(20), caption_counts=torch.ones(20, dtype=torch.long))
    batch = draw_batch(data, step=0, **SETTINGS | {"label_dropout": 0.0})
    for latent, label in zip(batch.latents, batch.labels, strict=True):
        row = int((data.mean == latent).all(dim=(1, 2, 3)).nonzero())
        assert torch.equal(label, data.embeddings[row])


def test_a_latent_with_a_distribution_is_sampled_anew_each_step(make_data):
    data = make_data(16, std=True)
    differences = []
    for step in range(100):
        batch = draw_batch(data, step=step, **SETTINGS)
        rows = batch_rows(1, step, 16, 16)
        differences.append(batch.latents - data.mean[rows])
    assert float(torch.stack(differences).std()) == pytest.approx(0.1, rel=0.02)


def test_weighted_rows_come_as_often_as_their_weights_ask():
    weights = torch.tensor([1.0] * 10 + [2.0] * 10 + [0.5] * 10, dtype=torch.float64)
    share = weights / weights.sum() * len(weights)
    counts = torch.stack([epoch_rows(0, epoch, 30, weights).bincount(minlength=30) for epoch in range(400)])
    assert (counts.sum(1) == 30).all()
    assert (counts >= share.floor()).all() and (counts <= share.ceil()).all()
    torch.testing.assert_close(counts.double().mean(0), share, atol=0.1, rtol=0.0)


def test_equal_weights_make_an_epoch_a_permutation():
    rows = epoch_rows(3, 5, 1000, torch.full((1000,), 0.3, dtype=torch.float64))
    assert sorted(rows.tolist()) == list(range(1000))


def test_an_epoch_with_weights_is_in_random_order():
    rows = epoch_rows(0, 0, 1000, torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(500))
    assert 250 < int((rows.diff() > 0).sum()) < 650


def test_mirrored_latents_are_drawn_half_the_time_and_belong_to_their_image(make_data):
    plain = make_data(16, std=True)
    data = replace(plain, flipped_mean=plain.mean.flip(-1) + 100, flipped_std=torch.zeros_like(plain.std))
    flipped = 0
    for step in range(100):
        rows = batch_rows(1, step, 16, 16)
        for row, latent in zip(rows, draw_batch(data, step=step, **SETTINGS).latents, strict=True):
            if latent.mean() > 50:
                flipped += 1
                assert torch.equal(latent, data.flipped_mean[row])
            else:
                assert float((latent - data.mean[row]).abs().max()) < 1
    assert 0.45 < flipped / 1600 < 0.55


def test_without_mirrored_latents_the_draws_are_those_of_before(make_data):
    batch = draw_batch(make_data(20), step=3, **SETTINGS)
    flipped = replace(make_data(20), flipped_mean=make_data(20).mean)
    assert torch.equal(batch.labels, draw_batch(flipped, step=3, **SETTINGS).labels)
