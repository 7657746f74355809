"""What samples of held-out captions show: whether the model draws what it never saw, and whether it copies.

Held-out captions are of two kinds. A *combination* has only words that training captions have: a model can know each
part, and has to put them together. One with *new words* asks for what no training caption names.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentloom.encoding.dataset import Caches, LatentDataset, Split, all_latents
from latentloom.evaluation.recall import nearest, recalled, with_interval

COPY_QUANTILE = 0.05
WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")  # "medium-dark" and "o'clock" are one word each


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, with their samples."""

    data: LatentDataset | Split  # the images (B)
    samples: Sequence[torch.Tensor]  # a latent (C, h, w) for each caption (B), of the shape of its image's
    combination: np.ndarray  # which captions are combinations (B), bool
    nearest_ids: list[str]  # of the training image nearest to each sample (B)
    error: np.ndarray  # the distance of each sample to its own real image (B), as in `recall`
    figures: dict[str, float]  # by name, see `measure`


def measure(samples: Sequence[torch.Tensor], held_out: LatentDataset | Split, caches: Caches) -> HeldOut:
    """Measure samples of the primary captions of ``held_out`` (B), a part of the validation split.

    Each sample is a latent (C, h, w) of the shape of its real image's.

    Figures, each share with its interval as `with_interval` gives it: ``held_out_recall_at_1`` and ``_at_5`` of
    combinations, ``new_words_recall_at_1`` and ``_at_5`` of the other captions: the share whose sample has an image of
    the caption among the nearest, or the nearest five, of all images of the data set. ``copied_share``: the share of
    all that are nearer to a training image than all but `COPY_QUANTILE` of the real images are; after Somepalli et al.
    2023 and Carlini et al. 2023. ``copied_limit`` is that distance, as the root of the mean square difference.
    ``held_out_combinations`` and ``new_words_captions`` count.
    """
    combination = combinations(held_out.primary_texts(), caches.train)
    everything = [caches.train, caches.validation]
    (rows, _), figures = nearest(samples, everything, 5), {}
    for name, chosen in (("held_out", combination), ("new_words", ~combination)):
        for among in (1, 5):
            right = recalled(rows[:, :among], everything, held_out.captions.primary)
            figures |= with_interval(f"{name}_recall_at_{among}", right[chosen])
    counts = {"held_out_combinations": int(combination.sum()), "new_words_captions": int((~combination).sum())}
    real = all_latents(held_out)
    (nearest_rows, distances), (_, of_real) = nearest(samples, [caches.train]), nearest(real, [caches.train])
    if len(held_out):
        limit = of_real.quantile(COPY_QUANTILE)
        figures |= with_interval("copied_share", (distances[:, 0] < limit).numpy())
        counts["copied_limit"] = round(float(limit), 4)
    pairs = zip(samples, real, strict=True)
    error = np.array([float((sample - own).square().mean().sqrt()) for sample, own in pairs])
    nearest_ids = caches.train.names(nearest_rows[:, 0])
    return HeldOut(held_out, samples, combination, nearest_ids, error, figures | counts)


def combinations(captions: Iterable[str], train: LatentDataset | Split) -> np.ndarray:
    """Which captions (B), bool, have no word but those of training captions, whatever their case."""
    of_captions = [words(caption) for caption in captions]
    unseen = set().union(*of_captions)
    for caption in train.all_texts():
        if not unseen:
            break
        unseen -= words(caption)
    return np.array([not (own & unseen) for own in of_captions], dtype=bool)


def words(caption: str) -> set[str]:
    """The words of a caption, in lower case; a hyphenated word is one."""
    return set(WORD.findall(caption.casefold()))
