"""The order in which a training goes through its images: which bucket a step is of, and which images of it.

A set of at most ``train.block_rows`` images is shuffled as a whole. A larger one is shuffled so that disks can read it
in long pieces (as mosaicml/streaming does): first its shards, then the images within blocks of some shards. An epoch is
dealt to *lanes*, each a part of the shuffled shards; a batch takes the same number of images from each lane. So a batch
is of images from all over the set, and a process, which computes some positions of each batch, reads some lanes alone.

The order is a function of the seed, the epoch, ``train.batch_size``, ``train.block_rows`` and the caches: of neither
the number of processes nor where the rows are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from latentloom.randomness import generator

LANES = 256  # at most; so many pieces of a block are read, each of some hundred images


class Blocks(NamedTuple):
    """How far the shuffle of a set reaches: ``rows`` images, of which each of ``lanes`` has as many."""

    rows: int
    lanes: int
    batch_size: int

    @classmethod
    def of(cls, size: int, among: int, batch_size: int, block_rows: int | None) -> "Blocks | None":
        """Those of a bucket of ``size`` images in a split of ``among``; None where it is shuffled as a whole."""
        if block_rows is None or among <= block_rows:
            return None
        lanes = math.gcd(batch_size, LANES)
        return cls(max(block_rows * size // among // lanes, 1) * lanes, lanes, batch_size)

    def number(self, batch: int, size: int) -> tuple[int, int]:
        """The epoch and the block in it that a batch is from, the first of them, in a set of ``size`` images."""
        epoch, place = divmod(batch * self.batch_size, size)
        return epoch, place // self.rows


def bucket_schedule(shares: Sequence[float], first: int = 0) -> Iterator[tuple[int, int]]:
    """For each step from ``first`` on, which bucket its batch is from, and how many batches of that bucket came before.

    After n steps from 0 on, bucket b has had n s_b batches, less than one more or less, where s_b is its part of the
    sum of ``shares``: of the buckets that do not run ahead of theirs, the one that is due first is next (Tijdeman 1980,
    the chairman assignment problem). Nothing is random, and all is exact.
    """
    exact = [Fraction(share) for share in shares]
    unit = math.gcd(*(share.numerator for share in exact)), math.lcm(*(share.denominator for share in exact))
    whole = [int(share * unit[1] / unit[0]) for share in exact]
    period, states = sum(whole), max(2 * len(whole) - 2, 1)  # after a period all have had their share exactly
    periods, left = divmod(first, period)
    counts = [0] * len(whole)
    for step in itertools.count(1):
        behind = [step * share - count * period for share, count in zip(whole, counts, strict=True)]
        allowed = [bucket for bucket, own in enumerate(behind) if own * states >= period]
        bucket = min(allowed, key=lambda own: (period * (states - 1) - behind[own] * states) / whole[own])
        if step > left:
            yield bucket, periods * whole[bucket] + counts[bucket]
        counts[bucket] += 1


def epoch_rows(
    seed: int,
    epoch: int,
    size: int,
    weights: torch.Tensor | None = None,
    key: tuple[int, ...] = (),
    *,
    blocks: Blocks | None = None,
    stored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The rows (N,) of an epoch in random order: each once, or as often as its weight asks.

    With weights (N,), row i comes N w_i / sum(w) times on average, and never more than one time more or less
    (systematic resampling, Kitagawa 1996, appendix).

    Args:
        key: tells buckets apart.
        blocks: None shuffles as a whole.
        stored: the rows as they are stored, as `LatentDataset.stored`; only blocks depend on it.
    """
    draws = generator("cpu", seed, "epoch", epoch, *key)
    order = torch.randperm(size, generator=draws) if blocks is None else _shuffled_shards(size, stored, draws)
    if weights is not None:
        ends = weights[order].double().cumsum(0)
        ends = ends * (size / ends[-1])
        ends[-1] = size  # whatever rounding made of it
        offset = torch.rand((), generator=draws, dtype=torch.float64)
        counts = torch.floor(ends + offset).diff(prepend=torch.zeros(1, dtype=torch.float64)).long()
        order = order.repeat_interleave(counts)
        if blocks is None:
            return order[torch.randperm(size, generator=draws)]
    return order if blocks is None else _dealt(order, epoch * size, blocks, draws)


def _shuffled_shards(
    size: int, stored: tuple[torch.Tensor, torch.Tensor] | None, draws: torch.Generator
) -> torch.Tensor:
    """All rows, shard by shard, the shards in random order."""
    rows, ends = stored or (torch.arange(size), torch.tensor([size]))
    edges = [0, *ends.tolist()]
    chosen = torch.randperm(len(ends), generator=draws).tolist()
    return torch.cat([rows[edges[shard] : edges[shard + 1]] for shard in chosen]).long()


def _dealt(order: torch.Tensor, first: int, blocks: Blocks, draws: torch.Generator) -> torch.Tensor:
    """An epoch that begins at position ``first`` of all epochs: ``order`` cut into lanes, shuffled block by block.

    Lane l has the positions l B / L to (l + 1) B / L of each batch, of which the epoch's first and last are not whole.
    """
    positions = (torch.arange(len(order)) + first % blocks.batch_size) % blocks.batch_size
    lane = (positions // (blocks.batch_size // blocks.lanes)).to(torch.int16)
    shuffled = [
        block[torch.randperm(len(block), generator=draws)]
        for own in order.split(lane.bincount(minlength=blocks.lanes).tolist())
        for block in own.split(blocks.rows // blocks.lanes)
    ]
    dealt = torch.empty_like(order)
    dealt[lane.argsort(stable=True)] = torch.cat(shuffled)
    return dealt


def step_rows(step: int, batch_size: int, size: int, epoch: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The rows (B,), int64, of batch number ``step`` of ``size`` rows; ``epoch`` gives those of each epoch."""
    first = step * batch_size
    epochs = [epoch(number) for number in range(first // size, (first + batch_size - 1) // size + 1)]
    rows = torch.cat(epochs) if len(epochs) > 1 else epochs[0]
    return rows[first % size :][:batch_size]
