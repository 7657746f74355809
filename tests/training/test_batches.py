"""The batch of a step is a function of the seed, the step and its place in the global batch, also when prefetched."""

import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from latent_data import captions_of, split_of_shapes

from latentloom.encoding.dataset import Split
from latentloom.training.batches import (
    PREFETCH_THREAD,
    PREFETCHED_STEPS,
    Batch,
    batches,
    draw_noise,
    prefetch,
    windows,
)
from latentloom.training.epochs import Blocks, bucket_schedule, epoch_rows

SETTINGS = {"seed": 1, "batch_size": 16, "block_rows": None, "distribution": "cosine", "label_dropout": 0.25}


def drawn(data, *, step: int, positions: slice = slice(None), **changes) -> Batch:
    ((batch,),) = batches(data, steps=[step], parts=[positions], **SETTINGS | changes)
    return batch


def rows_of(data, steps, **changes) -> torch.Tensor:
    """The rows of all of ``steps``, one after the other."""
    return torch.cat([batch.rows for (batch,) in batches(data, steps=steps, parts=[slice(None)], **SETTINGS | changes)])


def means(data, first: int = 0) -> torch.Tensor:
    """The standardised latents from row ``first`` on, as many as there are images."""
    return data.latents_at(slice(first, first + len(data)))[0]


def assert_equal(one: Batch, other: Batch) -> None:
    for name, ours, theirs in zip(Batch._fields, one, other, strict=True):
        assert torch.equal(ours, theirs), name


def test_the_same_seed_and_step_give_the_same_batch(make_data):
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
def test_each_row_comes_once_an_epoch(make_data, batch_size, size):
    epochs = 10
    steps = range(-(-epochs * size // batch_size))
    rows = rows_of(make_data(size), steps, batch_size=batch_size)
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


def test_all_captions_of_an_image_are_drawn_alike(make_data):
    data = make_data(4)
    counts: Counter[bool] = Counter()
    for step in range(200):
        labels = drawn(data, step=step, label_dropout=0.0).labels
        counts.update((labels == data.embeddings_at(torch.tensor([4]))).all(1).tolist())
    assert 0.45 < counts[True] / counts.total() < 0.55


def test_a_label_belongs_to_its_latent(make_data):
    data = replace(make_data(20), captions=captions_of(torch.arange(20)[:, None]))
    batch = drawn(data, step=0, label_dropout=0.0)
    for latent, label in zip(batch.latents, batch.labels, strict=True):
        row = int((means(data) == latent).all(dim=(1, 2, 3)).nonzero())
        assert torch.equal(label, data.embeddings_at(torch.tensor([row]))[0])


def test_a_latent_with_a_distribution_is_sampled_anew_each_step(make_data):
    data = make_data(16, std=True)
    differences = []
    for step in range(100):
        batch = drawn(data, step=step)
        differences.append(batch.latents - means(data)[batch.rows])
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
                assert torch.equal(latent, means(data, data.first_mirrored)[row])
            else:
                assert float((latent - means(data)[row]).abs().max()) < 1
    assert 0.45 < flipped / 1600 < 0.55


def test_mirrored_latents_change_no_other_random_number(make_data):
    batch = drawn(make_data(20), step=3)
    assert torch.equal(batch.labels, drawn(make_data(20, flipped=True), step=3).labels)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rows_of_a_step_are_those_of_its_place_in_the_epochs(make_data, weighted):
    weights = torch.arange(1, 8, dtype=torch.float64) if weighted else None
    epochs = torch.cat([epoch_rows(1, epoch, 7, weights) for epoch in range(12)])
    data = replace(make_data(7), weights=weights)
    for step in (0, 1, 3, 2, 0, 3):  # forth, back and again, over up to four epochs at a time
        assert torch.equal(rows_of(data, [step], batch_size=20), epochs[20 * step : 20 * (step + 1)])


def test_batches_larger_than_the_data_hold_each_image_as_often_as_its_weight_asks(make_data):
    weights = torch.tensor([1.0] * 10 + [4.0] * 10, dtype=torch.float64)
    steps = [rows_of(replace(make_data(20), weights=weights), [step], batch_size=64) for step in range(50)]
    assert [len(rows) for rows in steps] == [64] * 50
    counts = torch.stack([rows.bincount(minlength=20) for rows in steps]).double()
    for share, own in ((1 / 50, counts[:, :10]), (4 / 50, counts[:, 10:])):
        torch.testing.assert_close(own.mean(0), torch.full((10,), 64 * share, dtype=torch.float64), atol=0.5, rtol=0)


@pytest.mark.parametrize("cuts", [(8,), (5, 11), (1, 2, 3)])
def test_parts_of_a_batch_together_are_the_batch(make_data, cuts):
    data = replace(make_data(20, std=True, flipped=True), weights=torch.arange(20, dtype=torch.float64) + 1)
    whole = drawn(data, step=3, block_rows=8)
    edges = (0, *cuts, 16)
    parts = [drawn(data, step=3, positions=slice(*edge), block_rows=8) for edge in pairwise(edges)]
    assert_equal(Batch(*map(torch.cat, zip(*parts, strict=True))), whole)


@pytest.mark.parametrize("block_rows", [None, 8])
def test_the_batches_of_any_steps_are_those_drawn_for_each_alone(make_data, block_rows):
    data = make_data(20, std=True, flipped=True)
    parts, settings = [slice(4, 8), slice(8, 16)], SETTINGS | {"block_rows": block_rows}
    for step, together in zip(range(5, 9), batches(data, steps=range(5, 9), parts=parts, **settings), strict=True):
        for part, batch in zip(parts, together, strict=True):
            assert_equal(batch, drawn(data, step=step, positions=part, block_rows=block_rows))


def several_shapes(make_data, *counts: int, weighted: bool = False) -> Split:
    """A split of so many images of each of several shapes."""
    rows = sum(counts)
    data = replace(make_data(rows, std=True), weights=torch.arange(rows).double() + 1 if weighted else None)
    return split_of_shapes(data, *((count, (8, 4 + 2 * number)) for number, count in enumerate(counts)))


@pytest.mark.parametrize("shares", [(7,), (5, 5), (1, 99), (50, 20, 15, 10, 5), (3, 0, 4), (0.1, 0.7, 2.5, 1e-3)])
def test_after_any_number_of_steps_each_bucket_has_had_its_share_to_less_than_one_batch(shares):
    steps, counts = list(islice(bucket_schedule(shares), 1000)), [0] * len(shares)
    for done, (bucket, before) in enumerate(steps, start=1):
        assert before == counts[bucket]
        counts[bucket] += 1
        assert all(abs(count - done * own / sum(shares)) < 1 for count, own in zip(counts, shares, strict=True))
    for first in (1, 99, 100, 777):
        assert list(islice(bucket_schedule(shares, first), 100)) == steps[first : first + 100]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_of_several_shapes_every_image_comes_once_a_pass_also_of_fewer_than_a_batch(make_data, batch_size):
    data, passes = several_shapes(make_data, 13, 3, 24), 4
    seen: dict[int, list[int]] = {}
    for step in range(-(-passes * len(data) // batch_size)):
        batch = drawn(data, step=step, batch_size=batch_size)
        assert len(batch.rows) == batch_size and batch.latents.shape == batch.noise.shape
        seen.setdefault(batch.latents.shape[3], []).extend(batch.rows.tolist())
    first = 0
    for bucket in data.buckets:
        own = seen[bucket.latent_shape[2]]
        assert abs(len(own) - passes * len(bucket)) <= 2 * batch_size  # the quota, and the last batch of all
        for start in range(0, len(own) // len(bucket) * len(bucket), len(bucket)):
            assert sorted(own[start : start + len(bucket)]) == list(range(first, first + len(bucket)))
        first += len(bucket)


def test_of_several_shapes_an_image_comes_as_often_as_its_weight_asks_of_all(make_data):
    data = several_shapes(make_data, 5, 2, 9, weighted=True)
    counts = rows_of(data, range(500), batch_size=4).bincount(minlength=16)
    weights = torch.cat([bucket.weights for bucket in data.buckets])
    expected = 2000 * weights / weights.sum()
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()
    for own, wanted in zip(counts.split([5, 2, 9]), expected.split([5, 2, 9]), strict=True):
        assert abs(own.sum() - wanted.sum()) <= 4  # to a batch


def test_processes_and_parts_share_a_batch_of_one_shape_and_any_step_can_be_drawn_alone(make_data):
    data, halves = several_shapes(make_data, 7, 2, 12), (slice(0, 8), slice(8, 16))
    steps = batches(data, steps=range(12), parts=[slice(None)], **SETTINGS)
    for step, (whole,) in enumerate(steps):
        assert_equal(drawn(data, step=step), whole)
        parts = [drawn(data, step=step, positions=half) for half in halves]
        assert_equal(Batch(*map(torch.cat, zip(*parts, strict=True))), whole)


def test_a_split_of_one_shape_is_drawn_as_its_data_set(make_data):
    data = make_data(20, std=True)
    assert_equal(drawn(Split((data,)), step=7), drawn(data, step=7))


STORED = torch.randperm(600, generator=torch.Generator().manual_seed(0)), torch.arange(1, 13) * 50  # in shards of 50
BLOCKS = Blocks.of(600, 600, 24, 96)  # 8 lanes, of which a block has 12 rows each


def blocked(epoch: int, blocks: Blocks = BLOCKS, weights: torch.Tensor | None = None) -> torch.Tensor:
    return epoch_rows(5, epoch, 600, weights, blocks=blocks, stored=STORED)


def runs(rows: torch.Tensor) -> int:
    """In how many pieces these rows are stored."""
    places = STORED[0].argsort()[rows].sort().values
    return 1 + int((places.diff() > 1).sum())


@pytest.mark.parametrize("batch_size", [24, 7, 256])
@pytest.mark.parametrize("block_rows", [1, 96, 599])
def test_shuffled_in_blocks_each_row_comes_once_an_epoch_and_another_way_each_time(batch_size, block_rows):
    blocks = Blocks.of(600, 600, batch_size, block_rows)
    epochs = [blocked(epoch, blocks) for epoch in range(3)]
    assert all(torch.equal(rows.sort().values, torch.arange(600)) for rows in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_block_is_of_some_pieces_of_the_disk_and_of_these_each_process_reads_its_own():
    for start in range(0, 600 - 96, 96):
        block = blocked(0)[start : start + 96].reshape(-1, 24)  # four batches
        assert runs(block.flatten()) <= 2 * 8  # a lane's part may end one shard and begin another
        for process in range(4):
            assert runs(block[:, 6 * process : 6 * process + 6].flatten()) <= 2 * 2
        assert len({int(place) // 50 for place in STORED[0].argsort()[block[0]]}) >= 6  # from all over the set


def test_weighted_rows_of_blocks_come_as_often_as_their_weights_ask():
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).repeat(200)
    share = weights * 600 / weights.sum()
    counts = torch.stack([blocked(epoch, weights=weights).bincount(minlength=600) for epoch in range(20)])
    assert (counts.sum(1) == 600).all()
    assert (counts >= share.floor()).all() and (counts <= share.ceil()).all()


def test_a_set_of_a_block_at_most_is_shuffled_as_a_whole(make_data):
    data = make_data(20)
    assert torch.equal(rows_of(data, range(5), block_rows=20), rows_of(data, range(5)))
    assert not torch.equal(rows_of(data, range(5), block_rows=19), rows_of(data, range(5)))


def test_a_window_ends_with_its_block_and_holds_no_more_than_it_may():
    keys = [0, 0, None, 1, None, 1, 2]
    assert list(windows(range(7), keys.__getitem__, 9)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(windows(range(7), keys.__getitem__, 2)) == [[0, 1], [2], [3, 4], [5], [6]]


def test_noise_of_some_positions_is_that_of_all_and_made_by_the_groups_that_they_need():
    made = []

    def make(group: int) -> torch.Generator:
        made.append(group)
        return torch.Generator().manual_seed(group)

    whole = draw_noise((1, 4, 8, 8), slice(0, 200), make, CPU)
    made.clear()
    assert torch.equal(draw_noise((1, 4, 8, 8), slice(70, 128), make, CPU), whole[70:128])
    assert made == [2, 3]
    assert abs(float(whole.mean())) < 0.02 and float(whole.std()) == pytest.approx(1, abs=0.02)
    assert len(whole.flatten(1).unique(dim=0)) == 200


CPU = torch.device("cpu")


def make(step: int) -> list[list[torch.Tensor]]:
    return [[torch.tensor(step)]]


def threads() -> int:
    return sum(thread.name.startswith(PREFETCH_THREAD) for thread in threading.enumerate())


def steps_of(items) -> list[int]:
    return [int(parts[0][0]) for parts in items]


@pytest.mark.parametrize("count", [0, 1, PREFETCHED_STEPS, 20])
def test_every_prefetched_step_comes_once_in_order_and_the_thread_ends(count):
    assert steps_of(prefetch(make, range(5, 5 + count), CPU)) == list(range(5, 5 + count))
    assert threads() == 0


def test_no_more_is_prefetched_than_agreed():
    made = []
    items = prefetch(lambda step: made.append(step) or make(step), range(100), CPU)
    for taken in range(1, 6):
        next(items)
        deadline = time.monotonic() + 10
        while len(made) < taken + PREFETCHED_STEPS and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # for what must not come
        assert made == list(range(taken + PREFETCHED_STEPS))
    items.close()


def test_an_error_reaches_the_consumer_where_it_is_due_and_ends_the_thread():
    def fails(step: int):
        if step == 4:
            raise OSError("the disk is gone")
        return make(step)

    items, seen = prefetch(fails, range(10), CPU), []
    with pytest.raises(OSError, match="the disk is gone"):
        for parts in items:
            seen += steps_of([parts])
    assert seen == [0, 1, 2, 3]
    assert threads() == 0


def test_a_consumer_that_stops_or_fails_ends_the_thread():
    items = prefetch(make, range(10**9), CPU)
    next(items)
    assert threads() == 1
    items.close()
    assert threads() == 0

    def consume(items):
        for _ in items:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume(prefetch(make, range(10**9), CPU))
    assert threads() == 0


@pytest.mark.slow
def test_a_process_ends_while_more_is_still_to_be_made():
    script = "import test_batches as t; items = t.prefetch(t.make, range(10**9), t.CPU); next(items); print('first')"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\n", "")
