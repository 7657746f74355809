"""What a step draws is a function of the seed and the step."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from latentloom.training.draws import batch_rows, draw_batch

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
