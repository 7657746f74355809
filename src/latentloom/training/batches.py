"""The batch of each training step: captions, noise and noise levels of its rows, and where they are read ahead.

Every random number of a step is a function of (seed, step, position in the global batch) alone. Nothing is carried from
one step to the next, so a resumed run sees the batches that it would have seen. The small numbers, some of each row,
are drawn for the whole batch on the CPU. Noise, a whole latent of each row, is drawn for `NOISE_ROWS` positions at a
time, each such group from a generator of its own: a process draws what its positions need. So processes that share a
batch, or compute it part by part, see the very batch that one process would.

A batch is of latents of one shape, so it comes from one bucket of the data. Each bucket has its own epochs, and gets as
many of the steps as it has of the images: see `latentloom.training.epochs`.

Streamed data are read in *windows* of steps, one ahead, each about as long as a block of the shuffled order: its rows
lie together on the disk. A second thread makes batches of them.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import torch

from latentloom.diffusion.noise import noise_levels_from_uniform
from latentloom.diffusion.text import Labels, drop
from latentloom.encoding.dataset import LatentDataset, Split
from latentloom.randomness import generator
from latentloom.training.epochs import Blocks, bucket_schedule, epoch_rows, step_rows

NOISE_ROWS = 32  # fewer are more generators a step; more, and small parts of a batch draw what others need
WINDOW_BYTES = 2**30  # of a window at most; two are in memory, and a third for a moment
PREFETCHED_STEPS = 2
PREFETCH_THREAD, WINDOW_THREAD = "batch-prefetch", "window-read"

Item = TypeVar("Item")
Made = TypeVar("Made")
Parts = TypeVar("Parts", bound=Sequence[Iterable[Labels]])
Place = tuple[int, tuple[int, int]]  # a step, its bucket, and how many batches of that came before


class Batch(NamedTuple):
    """What a step computes on, or a part of it.

    Clean latents and noise (B, C, h, w), noise levels (B,), text embeddings (B, dim), with token states where the data
    set has them, and the rows (B,) of the split that they come from, on the CPU.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    noise_levels: torch.Tensor
    labels: Labels
    rows: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a step but its noise, one number a row (B,), on the CPU."""

    step: int
    bucket: int
    rows: torch.Tensor  # of the bucket
    latent_rows: torch.Tensor  # the same, or those of their mirrored images
    captions: torch.Tensor
    has_label: torch.Tensor
    noise_levels: torch.Tensor


def draw(
    data: LatentDataset, rows: torch.Tensor, place: Place, seed: int, *, distribution: str, label_dropout: float
) -> Drawn:
    """Draw what a step's ``rows`` (B,) of ``data`` need.

    Noise levels are stratified over the batch: one from each of B equal slices of the distribution (in the spirit of
    Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. A dropped label is "no text" (Ho &
    Salimans 2022): the zero embedding, and no token to be seen.
    """
    step, (bucket, _) = place
    draws = generator("cpu", seed, "step", step)

    def uniform() -> torch.Tensor:
        return torch.rand(len(rows), generator=draws)

    captions, has_label = data.captions[rows].pick(uniform()), uniform() >= label_dropout
    latent_rows = rows
    if data.first_mirrored is not None:
        latent_rows = torch.where(uniform() < 0.5, rows + data.first_mirrored, rows)
    strata = torch.randperm(len(rows), generator=draws)
    levels = noise_levels_from_uniform((strata + uniform()) / len(rows), distribution)
    return Drawn(step, bucket, rows, latent_rows, captions, has_label, levels)


def draw_noise(
    shape: tuple[int, ...], part: slice, make: Callable[[int], torch.Generator], device: torch.device
) -> torch.Tensor:
    """Standard normal numbers (B, *shape) of the positions ``part`` of a batch; ``make`` gives each group's generator.

    Always those of whole groups are drawn: on CUDA, a shorter tensor would get others from the same seed.
    """
    groups = range(part.start // NOISE_ROWS, -(-part.stop // NOISE_ROWS))
    numbers = torch.empty(len(groups) * NOISE_ROWS, *shape, device=device)
    for group, own in zip(groups, numbers.split(NOISE_ROWS), strict=True):
        own.normal_(generator=make(group))
    first = groups.start * NOISE_ROWS
    return numbers[part.start - first : part.stop - first]


def batches(
    data: LatentDataset | Split,
    *,
    seed: int,
    steps: Sequence[int],
    batch_size: int,
    block_rows: int | None,
    distribution: str,
    label_dropout: float,
    parts: Sequence[slice],
) -> Iterator[list[Batch]]:
    """The batches of ``steps``, each as those ``parts`` of it that this process computes.

    Streamed data are read ahead by threads, which end with this iterator. Data on the device are gathered when asked
    for.

    Args:
        steps: from 0 on, one after the other.
        batch_size: images per step, over all processes together.
        block_rows: how far the shuffle of an epoch reaches, in images; None: through all.
        distribution: of noise levels, as `noise_levels_from_uniform` knows it.
        label_dropout: the share of labels that are dropped.
        parts: positions in the global batch.

    Raises:
        Whatever reading a batch raises, when that batch is due.
    """

    if not steps:
        return
    buckets, device = data.buckets, data.device
    firsts = [0, *itertools.accumulate(map(len, buckets))]
    parts = [slice(*part.indices(batch_size)) for part in parts]
    reach = [Blocks.of(len(own), len(data), batch_size, block_rows) for own in buckets]

    @lru_cache(maxsize=len(buckets))  # so an epoch is shuffled once
    def epoch(bucket: int, number: int) -> torch.Tensor:
        own = buckets[bucket]
        key = own.latent_shape[1:] if len(buckets) > 1 else ()
        return epoch_rows(seed, number, len(own), own.weights, key, blocks=reach[bucket], stored=own.stored)

    def draw_step(place: Place) -> Drawn:
        bucket, number = place[1]
        own = buckets[bucket]
        rows = step_rows(number, batch_size, len(own), partial(epoch, bucket))
        return draw(own, rows, place, seed, distribution=distribution, label_dropout=label_dropout)

    def gather(item: tuple[Drawn, LatentDataset]) -> list[Batch]:
        return [gather_part(*item, part) for part in parts]

    def gather_part(drawn: Drawn, source: LatentDataset, part: slice) -> Batch:
        def group(number: int) -> torch.Generator:
            return generator(device, seed, "noise", drawn.step, number)

        latents, std = source.latents_at(drawn.latent_rows[part])
        noise = draw_noise((1 + (std is not None), *source.latent_shape), part, group, device)
        if std is not None:
            latents = latents + std * noise[:, 1]
        has_label, levels = (own[part].to(device, non_blocking=True) for own in (drawn.has_label, drawn.noise_levels))
        labels = drop(source.embeddings_at(drawn.captions[part]), has_label)
        return Batch(latents, noise[:, 0], levels, labels, drawn.rows[part] + firsts[drawn.bucket])

    def read(window: Sequence[Place]) -> list[tuple[Drawn, LatentDataset]]:
        """What is drawn for a window, with its rows in memory: those of this process's parts."""
        drawn = [draw_step(place) for place in window]
        own = [(each, part) for each in drawn for part in parts]
        text = data.text.read(torch.cat([each.captions[part] for each, part in own]))
        sources = {}
        for bucket in {each.bucket for each in drawn}:
            rows = torch.cat([each.latent_rows[part] for each, part in own if each.bucket == bucket])
            sources[bucket] = replace(buckets[bucket], latents=buckets[bucket].latents.read(rows), text=text)
        return [(each, sources[each.bucket]) for each in drawn]

    shares = [len(own) if own.weights is None else math.fsum(own.weights.tolist()) for own in buckets]
    places = zip(steps, bucket_schedule(shares, steps[0]), strict=False)
    if not data.streamed:
        yield from (gather((drawn, buckets[drawn.bucket])) for drawn in map(draw_step, places))
        return
    largest = max(range(len(buckets)), key=lambda bucket: len(buckets[bucket]))
    row_bytes = sum(own.latents.nbytes for own in buckets) / sum(len(own.latents) for own in buckets)
    row_bytes += data.text.nbytes / len(data.text)
    at_most = int(WINDOW_BYTES / (row_bytes * sum(part.stop - part.start for part in parts))) or 1

    def window_of(place: Place) -> tuple[int, ...] | None:
        """Which block a step of the largest bucket is of; the others' are as long, in steps."""
        bucket, number = place[1]
        if bucket != largest:
            return None
        whole = number * batch_size // (block_rows or len(data)), 0
        return reach[largest].number(number, len(buckets[largest])) if reach[largest] else whole

    with closing(in_advance(read, windows(places, window_of, at_most), 1, WINDOW_THREAD)) as ahead:
        yield from prefetch(gather, itertools.chain.from_iterable(ahead), device)


def windows(items: Iterable[Item], key: Callable[[Item], tuple[int, ...] | None], at_most: int) -> Iterator[list[Item]]:
    """``items`` in lists that end where ``key`` gives another value, None apart, or where they have ``at_most``."""
    window: list[Item] = []
    current = None
    for item in items:
        own = key(item)
        if window and (len(window) == at_most or (own is not None and own != current and current is not None)):
            yield window
            window = []
        current = current if own is None else own
        window.append(item)
    if window:
        yield window


def in_advance(make: Callable[[Item], Made], items: Iterable[Item], count: int, name: str) -> Iterator[Made]:
    """Yield ``make(item)`` for each of ``items``, in order; a thread makes up to ``count`` in advance.

    What ``make`` raises is raised here, where its item is due. The thread ends with the iterator.
    """
    waiting: deque[Future[Made]] = deque()
    # An executor's idle thread waits for work only, so it cannot keep the process from exiting.
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)
    threads = torch.get_num_threads()
    thread.submit(_use_one_thread).result()
    torch.set_num_threads(threads)  # the setting above reached the whole process; this restores all other threads
    try:
        for item in items:
            waiting.append(thread.submit(make, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        thread.shutdown()


def prefetch(make: Callable[[Item], Parts], items: Iterable[Item], device: torch.device) -> Iterator[Parts]:
    """Yield ``make(item)`` for each of ``items``, made by a thread up to ``PREFETCHED_STEPS`` in advance.

    So gathering and copying a batch hides behind the steps before it. On CUDA the thread works on a stream of its own.
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

    with closing(in_advance(complete, items, PREFETCHED_STEPS, PREFETCH_THREAD)) as made:
        for parts in made:
            if stream:  # their memory belongs to that stream, which must not reuse it before the consumer is done
                consumer = torch.cuda.current_stream(device)
                for tensors in parts:
                    for tensor in tensors:
                        if tensor.device.type == "cuda":
                            tensor.record_stream(consumer)
            yield parts


def _use_one_thread() -> None:
    """Compute in this thread alone: a second pool of idle OpenMP threads would spin and slow the training's own."""
    torch.get_num_threads()  # torch initialises a thread's setting at its first look, which must not come later
    torch.set_num_threads(1)
