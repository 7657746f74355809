"""The batch of each training step: which rows, captions, noise and noise levels, and where they are read ahead.

Every random number of a step is a function of (seed, step, position in the global batch) alone. Nothing is carried from
one step to the next, so a resumed run sees the batches that it would have seen. Numbers are drawn for the whole batch
wherever a part of it is needed, so processes that share a batch, or compute it part by part, see the very batch that
one process would.

A batch is of latents of one shape, so it comes from one bucket of the data. Each bucket has its own epochs, and gets as
many of the steps as it has of the images: see `bucket_schedule`.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import torch

from latentloom.diffusion.noise import noise_levels_from_uniform
from latentloom.diffusion.text import Labels, drop
from latentloom.encoding.dataset import LatentDataset, Split
from latentloom.randomness import generator

PREFETCHED_STEPS = 2
PREFETCH_THREAD = "batch-prefetch"

Item = TypeVar("Item")
Parts = TypeVar("Parts", bound=Sequence[Iterable[Labels]])


class Batch(NamedTuple):
    """What a step computes on, or a part of it.

    Clean latents and noise (B, C, h, w), noise levels (B,), text embeddings (B, dim), with token states where the data
    set has them, and the rows (B,) of the split that they come from.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    noise_levels: torch.Tensor
    labels: Labels
    rows: torch.Tensor


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
    seed: int, epoch: int, size: int, weights: torch.Tensor | None = None, key: tuple[int, ...] = ()
) -> torch.Tensor:
    """The rows (N,) of an epoch in random order: each once, or as often as its weight asks.

    With weights (N,), row i comes N w_i / sum(w) times on average, and never more than one time more or less
    (systematic resampling, Kitagawa 1996, appendix). ``key`` tells buckets apart.
    """
    draws = generator("cpu", seed, "epoch", epoch, *key)
    order = torch.randperm(size, generator=draws)
    if weights is None:
        return order
    ends = weights[order].double().cumsum(0)
    ends = ends * (size / ends[-1])
    ends[-1] = size  # whatever rounding made of it
    offset = torch.rand((), generator=draws, dtype=torch.float64)
    counts = torch.floor(ends + offset).diff(prepend=torch.zeros(1, dtype=torch.float64)).long()
    return order.repeat_interleave(counts)[torch.randperm(size, generator=draws)]


def step_rows(step: int, batch_size: int, size: int, epoch: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The rows (B,), int64, of batch number ``step`` of ``size`` rows; ``epoch`` gives those of each epoch."""
    first = step * batch_size
    epochs = [epoch(number) for number in range(first // size, (first + batch_size - 1) // size + 1)]
    rows = torch.cat(epochs) if len(epochs) > 1 else epochs[0]
    return rows[first % size :][:batch_size]


def draw_batch(
    data: LatentDataset,
    rows: torch.Tensor,
    draws: torch.Generator,
    *,
    distribution: str,
    label_dropout: float,
    parts: Sequence[slice],
) -> list[Batch]:
    """Draw what a step's ``rows`` (B,) need: captions, dropped labels, mirroring, samples of latents, noise, levels.

    Noise levels are stratified over the batch: one from each of B equal slices of the distribution (in the spirit of
    Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. A dropped label is "no text" (Ho &
    Salimans 2022): the zero embedding, and no token to be seen.
    """
    device, size = data.device, len(rows)

    def uniform() -> torch.Tensor:
        return torch.rand(size, generator=draws, device=device)

    def normal() -> torch.Tensor:
        return torch.randn(size, *data.latent_shape, generator=draws, device=device)

    captions = data.captions[rows, (uniform() * data.caption_counts[rows]).long()]
    has_label = uniform() >= label_dropout
    latent_rows = rows
    if data.first_mirrored is not None:
        latent_rows = torch.where(uniform() < 0.5, rows + data.first_mirrored, rows)
    deviation = normal() if data.has_std else None
    strata = torch.randperm(size, generator=draws, device=device)
    noise_levels = noise_levels_from_uniform((strata + uniform()) / size, distribution)
    noise = normal()

    def gather(part: slice) -> Batch:
        latents, std = data.latents_at(latent_rows[part])
        if std is not None:
            latents = latents + std * deviation[part]
        labels = drop(data.embeddings_at(captions[part]), has_label[part])
        return Batch(latents, noise[part], noise_levels[part], labels, rows[part])

    return [gather(part) for part in parts]


def batches(
    data: LatentDataset | Split,
    *,
    seed: int,
    steps: Sequence[int],
    batch_size: int,
    distribution: str,
    label_dropout: float,
    parts: Sequence[slice],
) -> Iterator[list[Batch]]:
    """The batches of ``steps``, each as those ``parts`` of it that this process computes.

    Streamed data are read ahead by a thread, which ends with this iterator. Data on the device are gathered when asked
    for.

    Args:
        steps: from 0 on, one after the other.
        batch_size: images per step, over all processes together.
        distribution: of noise levels, as `noise_levels_from_uniform` knows it.
        label_dropout: the share of labels that are dropped.
        parts: positions in the global batch.

    Raises:
        Whatever reading a batch raises, when that batch is due.
    """

    if not steps:
        return
    buckets = data.buckets
    firsts = [0, *itertools.accumulate(map(len, buckets))]

    @lru_cache(maxsize=len(buckets))  # so an epoch is shuffled, and copied to the device, once
    def epoch(bucket: int, number: int) -> torch.Tensor:
        own = buckets[bucket]
        key = own.latent_shape[1:] if len(buckets) > 1 else ()
        return epoch_rows(seed, number, len(own), own.weights, key).to(data.device)

    def make(at: tuple[int, tuple[int, int]]) -> list[Batch]:
        step, (bucket, number) = at
        own = buckets[bucket]
        rows = step_rows(number, batch_size, len(own), partial(epoch, bucket))
        draws = generator(data.device, seed, "step", step)
        drawn = draw_batch(own, rows, draws, distribution=distribution, label_dropout=label_dropout, parts=parts)
        return [part._replace(rows=part.rows + firsts[bucket]) for part in drawn]

    shares = [len(own) if own.weights is None else math.fsum(own.weights.tolist()) for own in buckets]
    places = zip(steps, bucket_schedule(shares, steps[0]), strict=False)
    yield from prefetch(make, places, data.device) if data.streamed else map(make, places)


def prefetch(make: Callable[[Item], Parts], items: Iterable[Item], device: torch.device) -> Iterator[Parts]:
    """Yield ``make(item)`` for each of ``items``, in order; a thread makes up to ``PREFETCHED_STEPS`` in advance.

    So reading and copying a batch hides behind the steps before it. On CUDA the thread works on a stream of its own.
    What ``make`` raises is raised here, where its item is due. The thread ends with the iterator.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # where what `make` reads may still be written

    def complete(item: Item) -> Parts:
        with torch.cuda.stream(stream) if stream else nullcontext():
            parts = make(item)
        if stream:
            stream.synchronize()
        return parts

    waiting: deque[Future[Parts]] = deque()

    def next_parts() -> Parts:
        parts = waiting.popleft().result()
        if stream:  # their memory belongs to that stream, which must not reuse it before the consumer is done
            consumer = torch.cuda.current_stream(device)
            for tensors in parts:
                for tensor in tensors:
                    tensor.record_stream(consumer)
        return parts

    # An executor's idle thread waits for work only, so it cannot keep the process from exiting.
    thread = ThreadPoolExecutor(1, thread_name_prefix=PREFETCH_THREAD)
    threads = torch.get_num_threads()
    thread.submit(_use_one_thread).result()
    torch.set_num_threads(threads)  # the setting above reached the whole process; this restores all other threads
    try:
        for item in items:
            waiting.append(thread.submit(complete, item))
            if len(waiting) > PREFETCHED_STEPS:
                yield next_parts()
        while waiting:
            yield next_parts()
    finally:
        for future in waiting:
            future.cancel()
        thread.shutdown()


def _use_one_thread() -> None:
    """Compute in this thread alone: a second pool of idle OpenMP threads would spin and slow the training's own."""
    torch.get_num_threads()  # torch initialises a thread's setting at its first look, which must not come later
    torch.set_num_threads(1)
