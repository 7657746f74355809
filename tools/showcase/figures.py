"""How good the showcase model is, measured on the weights that ship, and how near they are to those that were trained.

The figures on held-out captions are those of docs/evaluation.md, with the same noise, so they compare with the
project's own. Two are added for OpenMoji, whose held-out combinations are of two kinds: a person or a hand in a skin
tone, which is mostly a matter of putting parts together, and all others, whose words alone do not say what they look
like.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from latentloom.encoding.dataset import Caches
from latentloom.errors import UserError
from latentloom.evaluation.held_out import HeldOut, measure
from latentloom.evaluation.recall import nearest, recalled, with_interval
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.params import Params

COMPARED = 48  # held-out captions that are sampled with the trained weights, too
TONE = "skin tone"


@dataclass(frozen=True)
class Comparison:
    """What rounding the weights changes in samples of the same captions from the same noise.

    Attributes:
        captions: how many were compared.
        pixel_difference: the mean absolute difference of their pictures, in [0, 1].
        same_nearest: the share whose nearest image of the whole data set is the same.
    """

    captions: int
    pixel_difference: float
    same_nearest: float


def measure_held_out(model: TextToImage, caches: Caches, params: Params) -> HeldOut:
    """Sample the held-out captions that `evaluate` samples, and measure them."""
    held_out = caches.validation.take(params.evaluate.held_out_captions)
    samples = model.latents(
        held_out.primary_embeddings().to("cpu"), held_out.names(), params.evaluate.sampling, seed=params.seed
    )
    measured = measure(samples, held_out, caches)
    return HeldOut(**{**vars(measured), "figures": measured.figures | _by_kind(measured, caches)})


def compare(measured: HeldOut, model: TextToImage, trained: TextToImage, caches: Caches, params: Params) -> Comparison:
    """Sample the first `COMPARED` captions with the weights before rounding, and compare."""
    first = measured.data.take(COMPARED)
    rounded = measured.samples[: len(first)]
    exact = trained.latents(
        first.primary_embeddings().to("cpu"), first.names(), params.evaluate.sampling, seed=params.seed
    )
    pictures = [np.stack(model.codec.decode_each(samples)) / 255 for samples in (exact, rounded)]
    everything = [caches.train, caches.validation]
    rows = [nearest(samples, everything)[0] for samples in (exact, rounded)]
    return Comparison(
        captions=len(first),
        pixel_difference=round(float(np.abs(pictures[0] - pictures[1]).mean()), 5),
        same_nearest=round(float((rows[0] == rows[1]).float().mean()), 4),
    )


def check_recall(shipped: dict[str, float], trained: dict[str, float], name: str = "held_out_recall_at_1") -> None:
    """Compare a share with the one that the project measured with its own weights.

    Raises:
        UserError: when that lies outside of the shipped share's interval.
    """
    if name not in shipped:
        return
    low, high = shipped[f"{name}_low"], shipped[f"{name}_high"]
    if not low <= trained[name] <= high:
        raise UserError(
            f"{name} is {shipped[name]} ({low} to {high}) with rounded weights, and {trained[name]} with those before: "
            "the model does not bear rounding"
        )


def table(measured: HeldOut, keys: pd.Series) -> pd.DataFrame:
    """One row per measured caption: the image's id, its key in the source, the caption, and whether it combines.

    Args:
        measured: of the held-out images.
        keys: of all images, by id.
    """
    ids = measured.data.names()
    captions = measured.data.primary_texts()
    columns = {"id": ids, "key": keys[ids].tolist(), "caption": captions, "combination": measured.combination}
    return pd.DataFrame(columns)


def _by_kind(measured: HeldOut, caches: Caches) -> dict[str, float]:
    """Of combinations in a skin tone, and of others: counts, and the share that is nearest to the right image.

    ``skin_tones_figure_at_1`` is the share whose nearest image is at least the right emoji, in whatever tone.
    """
    everything = [caches.train, caches.validation]
    captions = np.array(measured.data.primary_texts(), dtype=object)
    rows, _ = nearest(measured.samples, everything)
    right = recalled(rows, everything, measured.data.captions.primary)
    found = np.concatenate([np.array(data.primary_texts(), dtype=object) for data in everything])[rows[:, 0].numpy()]
    right_figure = np.array([_figure(own) == _figure(other) for own, other in zip(captions, found, strict=True)])
    toned = np.array([TONE in caption for caption in captions], dtype=bool) & measured.combination
    others = measured.combination & ~toned
    return {
        "images": sum(map(len, everything)),
        "held_out_images": len(caches.validation),
        "skin_tones_captions": int(toned.sum()),
        **with_interval("skin_tones_recall_at_1", right[toned]),
        **with_interval("skin_tones_figure_at_1", (right | right_figure)[toned]),
        "other_captions": int(others.sum()),
        **with_interval("other_recall_at_1", right[others]),
    }


def _figure(caption: str) -> str:
    """A caption without its skin tones."""
    return caption.partition(", ")[0]
