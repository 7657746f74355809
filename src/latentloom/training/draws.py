"""Every random draw of a training step, as a function of (seed, step, position in the global batch) alone.

Nothing is carried from one step to the next, so a run that starts again at a step draws what it would have drawn. The
draws are made for the whole batch wherever a part of it is needed, so processes that share a batch, or compute it part
by part, see the very batch that one process would.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from latentloom.diffusion.noise import noise_levels_from_uniform
from latentloom.encoding.dataset import LatentDataset
from latentloom.randomness import generator
from latentloom.training.prefetch import made_ahead

WHOLE = slice(None)


class Batch(NamedTuple):
    """What a step needs, or a part of it.

    Clean latents and noise (B, C, h, w), noise levels (B,), text embeddings (B, dim), and the rows of the data set (B,)
    that they come from.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    noise_levels: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor


def epoch_rows(seed: int, epoch: int, size: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The rows (N,) of an epoch in random order: each once, or as often as its weight asks.

    With weights (N,), row i comes N w_i / sum(w) times on average, and never more than one time more or less
    (systematic resampling, Kitagawa 1996, appendix).
    """
    draws = generator("cpu", seed, "epoch", epoch)
    order = torch.randperm(size, generator=draws)
    if weights is None:
        return order
    ends = weights[order].double().cumsum(0)
    ends = ends * (size / ends[-1])
    ends[-1] = size  # whatever rounding made of it
    offset = torch.rand((), generator=draws, dtype=torch.float64)
    counts = torch.floor(ends + offset).diff(prepend=torch.zeros(1, dtype=torch.float64)).long()
    return order.repeat_interleave(counts)[torch.randperm(size, generator=draws)]


class RowOrder:
    """Which rows each step takes, out of epochs of ``size`` draws each; see `epoch_rows`.

    The order of the last epoch asked for stays on ``device``, so an epoch is shuffled and copied there once. Any step
    may be asked for at any time.

    Args:
        seed: of the training.
        size: rows in the data set.
        weights: how often each row is drawn, relative to the others (N); None: all alike.
        device: where the rows of a step are needed.
    """

    def __init__(
        self, seed: int, size: int, weights: torch.Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.size, self.weights, self.device = seed, size, weights, device
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.long)

    @classmethod
    def of(cls, data: LatentDataset, seed: int) -> "RowOrder":
        """The order in which a training with this seed takes the rows of ``data``."""
        return cls(seed, len(data), data.weights, data.device)

    def rows(self, step: int, batch_size: int) -> torch.Tensor:
        """The rows (B,), int64, of the whole batch of ``step``, on the device."""
        position, end = step * batch_size, (step + 1) * batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self.size)
            piece = self._epoch_order(epoch)[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            self._order = epoch_rows(self.seed, epoch, self.size, self.weights).to(self.device)
            self._epoch = epoch
        return self._order


class Draws(NamedTuple):
    """What was drawn for the whole batch of a step: a number, or a row to read, for each position (B,).

    ``deviation`` is what a latent's standard deviation is multiplied by (B, C, h, w), or None where latents have none.
    """

    rows: torch.Tensor
    latent_rows: torch.Tensor
    caption_rows: torch.Tensor
    has_label: torch.Tensor
    deviation: torch.Tensor | None
    noise_levels: torch.Tensor
    noise: torch.Tensor


def draw_step(
    data: LatentDataset,
    order: RowOrder,
    *,
    seed: int,
    step: int,
    batch_size: int,
    distribution: str,
    label_dropout: float,
) -> Draws:
    """Draw for a step: rows, captions, mirrored or not, samples of latents, noise, its levels, dropped labels.

    Noise levels are stratified over the batch: one from each of B equal slices of the distribution (in the spirit of
    Kingma et al. 2021, appendix I.1), which lowers the variance of the loss.
    """
    device, shape = data.device, (batch_size, *data.latent_shape)
    rows = order.rows(step, batch_size)
    draws = generator(device, seed, "step", step)

    def uniform() -> torch.Tensor:
        return torch.rand(batch_size, generator=draws, device=device)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=draws, device=device)

    columns = (uniform() * data.caption_counts[rows]).long()
    has_label = uniform() >= label_dropout
    latent_rows = rows
    if data.first_mirrored is not None:
        latent_rows = torch.where(uniform() < 0.5, rows + data.first_mirrored, rows)
    deviation = normal() if data.has_std else None
    strata = torch.randperm(batch_size, generator=draws, device=device)
    noise_levels = noise_levels_from_uniform((strata + uniform()) / batch_size, distribution)
    return Draws(rows, latent_rows, data.captions[rows, columns], has_label, deviation, noise_levels, normal())


def gather(data: LatentDataset, draws: Draws, positions: slice = WHOLE) -> Batch:
    """Read the rows that were drawn for ``positions`` of a batch. A dropped label is the zero embedding (Ho & Salimans
    2022)."""
    latents, std = data.latents_at(draws.latent_rows[positions])
    if std is not None:
        latents = latents + std * draws.deviation[positions]
    labels = data.embeddings_at(draws.caption_rows[positions]) * draws.has_label[positions].unsqueeze(1)
    return Batch(latents, draws.noise[positions], draws.noise_levels[positions], labels, draws.rows[positions])


def draw_batch(
    data: LatentDataset,
    order: RowOrder,
    *,
    seed: int,
    step: int,
    batch_size: int,
    distribution: str,
    label_dropout: float,
    positions: slice | None = None,
) -> Batch:
    """The batch of a step, or those ``positions`` of it; parts of a batch together are the batch, bit for bit.

    Args:
        data: the training split.
        order: of its rows, made with the same seed.
        seed: of the training.
        step: from 0 on.
        batch_size: images a step, over all processes together.
        distribution: of noise levels, as `noise_levels_from_uniform` knows it.
        label_dropout: the share of labels that are dropped.
        positions: None takes the whole batch.
    """
    draws = draw_step(
        data,
        order,
        seed=seed,
        step=step,
        batch_size=batch_size,
        distribution=distribution,
        label_dropout=label_dropout,
    )
    return gather(data, draws, WHOLE if positions is None else positions)


def batches(
    data: LatentDataset,
    *,
    seed: int,
    steps: Iterable[int],
    batch_size: int,
    distribution: str,
    label_dropout: float,
    parts: Sequence[slice],
) -> Iterator[list[Batch]]:
    """The batches of ``steps``, each as the ``parts`` of it that this process computes; see `draw_batch`.

    Where the data are streamed, a thread makes the next steps' batches ahead; it ends with this iterator. On the device
    nothing is made before it is asked for.

    Raises:
        Whatever reading a batch raises, when that batch is due.
    """
    order = RowOrder.of(data, seed)

    def make(step: int) -> list[Batch]:
        draws = draw_step(
            data,
            order,
            seed=seed,
            step=step,
            batch_size=batch_size,
            distribution=distribution,
            label_dropout=label_dropout,
        )
        return [gather(data, draws, part) for part in parts]

    if data.streamed:
        yield from made_ahead(make, steps, data.device)
    else:
        yield from map(make, steps)
