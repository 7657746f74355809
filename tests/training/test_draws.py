"""What a step draws is a function of the seed, the step, and the position in the global batch."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from latentloom.training.draws import Batch, RowOrder, batches, draw_batch, epoch_rows

SETTINGS = {"seed": 1, "batch_size": 16, "distribution": "cosine", "label_dropout": 0.25}


def drawn(data, *, step: int, positions: slice | None = None, **changes) -> Batch:
    settings = SETTINGS | changes
    return draw_batch(data, RowOrder.of(data, settings["seed"]), step=step, positions=positions, **settings)


def assert_equal(one: Batch, other: Batch) -> None:
    for name, ours, theirs in zip(Batch._fields, one, other, strict=True):
        assert torch.equal(ours, theirs), name


def test_the_same_seed_and_step_draw_the_same(make_data):
    data = make_data(20)
    first = drawn(data, step=3)
    assert_equal(first, drawn(data, step=3))
    assert not torch.equal(first.noise, drawn(data, step=4).noise)
    assert not torch.equal(first.noise, drawn(data, step=3, seed=2).noise)


def test_global_random_state_neither_matters_nor_changes(make_data):
    data = make_data(20)
    torch.manual_seed(5)
    first = drawn(data, step=3)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(drawn(data, step=3).noise, first.noise)


@pytest.mark.parametrize(("batch_size", "size"), [(4, 12), (5, 12), (16, 6)])
def test_each_row_comes_once_an_epoch(batch_size, size):
    epochs = 10
    order = RowOrder(0, size)
    rows = torch.cat([order.rows(step, batch_size) for step in range(-(-epochs * size // batch_size))])
    for epoch in range(epochs):
        assert sorted(rows[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    assert not torch.equal(rows[:size], rows[size : 2 * size])


def test_noise_levels_are_stratified_over_the_batch(make_data):
    batch = drawn(make_data(20), step=0, distribution="uniform")
    strata = (batch.noise_levels.sort().values * 16).long()
    assert strata.tolist() == list(range(16))


def test_labels_are_dropped_to_zero_at_the_rate_asked_for(make_data):
    data = make_data(20)
    labels = torch.cat([drawn(data, step=step).labels for step in range(200)])
    dropped = (labels == 0).all(1).float().mean()
    assert abs(float(dropped) - 0.25) < 0.03


def test_without_dropout_no_label_is_dropped(make_data):
    batch = drawn(make_data(20), step=0, label_dropout=0.0)
    assert not (batch.labels == 0).all(1).any()


def test_all_captions_of_an_image_are_drawn_alike(make_data):
    data = make_data(4)
    counts: Counter[bool] = Counter()
    for step in range(200):
        labels = drawn(data, step=step, label_dropout=0.0).labels
        counts.update((labels == data.embeddings[-1]).all(1).tolist())
    assert 0.45 < counts[True] / counts.total() < 0.55


def test_a_label_belongs_to_its_latent(make_data):
    data = replace(make_data(20), caption_counts=torch.ones(20, dtype=torch.long))
    batch = drawn(data, step=0, label_dropout=0.0)
    for latent, label in zip(batch.latents, batch.labels, strict=True):
        row = int((data.mean == latent).all(dim=(1, 2, 3)).nonzero())
        assert torch.equal(label, data.embeddings[row])


def test_a_latent_with_a_distribution_is_sampled_anew_each_step(make_data):
    data = make_data(16, std=True)
    differences = []
    for step in range(100):
        batch = drawn(data, step=step)
        differences.append(batch.latents - data.mean[batch.rows])
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
    data = make_data(16, std=True, flipped=True)
    flipped = 0
    for step in range(100):
        batch = drawn(data, step=step)
        for row, latent in zip(batch.rows, batch.latents, strict=True):
            if latent.mean() > 50:
                flipped += 1
                assert torch.equal(latent, data.flipped_mean[row])
            else:
                assert float((latent - data.mean[row]).abs().max()) < 1
    assert 0.45 < flipped / 1600 < 0.55


def test_without_mirrored_latents_the_draws_are_those_of_before(make_data):
    batch = drawn(make_data(20), step=3)
    assert torch.equal(batch.labels, drawn(make_data(20, flipped=True), step=3).labels)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rows_of_a_step_are_those_of_its_place_in_the_epochs(weighted):
    weights = torch.arange(1, 8, dtype=torch.float64) if weighted else None
    epochs = torch.cat([epoch_rows(5, epoch, 7, weights) for epoch in range(12)])
    order = RowOrder(5, 7, weights)
    for step in (0, 1, 3, 2, 0, 3):  # forth, back and again, over up to four epochs at a time
        assert torch.equal(order.rows(step, 20), epochs[20 * step : 20 * (step + 1)])


@pytest.mark.parametrize("cuts", [(8,), (5, 11), (1, 2, 3)])
def test_parts_of_a_batch_together_are_the_batch(make_data, cuts):
    data = replace(make_data(20, std=True, flipped=True), weights=torch.arange(20, dtype=torch.float64) + 1)
    whole = drawn(data, step=3)
    edges = (0, *cuts, 16)
    parts = [drawn(data, step=3, positions=slice(*edge)) for edge in pairwise(edges)]
    assert_equal(Batch(*map(torch.cat, zip(*parts, strict=True))), whole)


def test_the_batches_of_any_steps_are_those_drawn_for_each_alone(make_data):
    data = make_data(20, std=True, flipped=True)
    parts = [slice(4, 8), slice(8, 16)]
    for step, together in zip(range(5, 9), batches(data, steps=range(5, 9), parts=parts, **SETTINGS), strict=True):
        for part, batch in zip(parts, together, strict=True):
            assert_equal(batch, drawn(data, step=step, positions=part))
