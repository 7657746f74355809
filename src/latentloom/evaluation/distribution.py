"""Whether samples are as good and as varied as real pictures, and show what their captions say.

    captions of real images --model--> samples --vision encoder--> features (M, dim) -> fid, kid, cmmd
              the images themselves    --vision encoder, cached--> features (N, dim)     against the real ones
                                       --CLIP--> cosine of each sample with its caption -> clip_score

The encoders are `evaluate.features` and `evaluate.clip`; a figure whose encoder is null is left out.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latentloom.encoding.dataset import Caches, LatentDataset, Split, row_shapes
from latentloom.encoding.features import features_of
from latentloom.encoding.named_encoders import pinned_reference
from latentloom.encoding.vision_encoder import Clip, VisionEncoder, load_clip
from latentloom.evaluation.distances import FEWEST, cmmd, cosines, frechet_distance, kernel_distance
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.params import EvaluateParams

PART = 1024  # samples made before they are encoded, so that their pixels fit into memory
BESIDE_REAL = ("fid", "kid", "cmmd", "clip_score")
ERROR = "_standard_error"


@dataclass(frozen=True)
class Encoders:
    """What measures pictures; None where the params name none."""

    features: VisionEncoder | None
    clip: Clip | None

    @property
    def vision(self) -> dict[str, VisionEncoder]:
        """All that read pictures, by what decides their features: two that are alike count once."""
        named = [self.features, self.clip.vision if self.clip else None]
        return {encoder.name: encoder for encoder in named if encoder}

    @property
    def described(self) -> dict[str, dict[str, str]]:
        """By key of the params, what measures: ``reference``, and the hashes ``fingerprint`` and ``preprocessing``."""
        named = {"features": self.features, "clip": self.clip.vision if self.clip else None}
        names = ("reference", "fingerprint", "preprocessing")
        return {key: {name: getattr(own, name) for name in names} for key, own in named.items() if own}


@dataclass(frozen=True)
class Distribution:
    """What was measured of samples beside real images."""

    figures: dict[str, float] = field(default_factory=dict)  # by name, see `measure_distribution`
    seconds: dict[str, float] = field(default_factory=dict)  # what each part of the work took, by name
    left_out: str = ""  # why figures are missing; empty where none are


def load_encoders(settings: EvaluateParams, device: torch.device) -> Encoders:
    """The encoders that the params name, with their weights, so that what is wrong with them is said before any work.

    Raises:
        UserError: when one cannot be loaded, naming its key.
    """
    features = clip = None
    if settings.features:
        key = "evaluate.features"
        features = VisionEncoder(pinned_reference(key, settings.features), key, device)
    if settings.clip:
        key = "evaluate.clip"
        clip = load_clip(pinned_reference(key, settings.clip), key, device)
    encoders = Encoders(features, clip)
    for encoder in encoders.vision.values():
        _ = encoder.model, encoder.processor
    if clip:
        _ = clip.text.model, clip.text.tokenizer
    return encoders


def measure_distribution(
    encoders: Encoders, settings: EvaluateParams, model: TextToImage, caches: Caches, images: Path, *, seed: int
) -> Distribution:
    """Sample the primary captions of real images ``evaluate.samples`` times, and measure samples beside the images.

    A sample has the shape of its image; the encoders crop or resize it as they do the image.

    The images are the first by id of ``evaluate.real_images``, as many as samples; where there are fewer, all, and
    their captions come again with other noise.

    Figures: ``fid``, ``kid`` with its standard error, and ``cmmd`` between images and samples, see `distances`;
    ``clip_score``: 100 times the cosine between a sample and its caption, or 0 where that is negative (Hessel et al.
    2021), on average, with its standard error. Each ``…_real`` is the same figure with real pictures in the place of
    samples, which no model needs to surpass: for the distances, as many images of the other split as samples; for
    ``clip_score``, the images themselves. ``clip_score_chance`` is that of images with the caption of another.
    ``distribution_samples`` and ``distribution_images`` count.
    """
    splits = [caches.validation, caches.train]
    real, other = splits if settings.real_images == "held_out" else reversed(splits)
    real, other = real.take(settings.samples), other.take(settings.samples)
    left_out = _left_out(encoders, settings, len(real))
    if not encoders.vision or not len(real):
        return Distribution(left_out=left_out)

    seconds: dict[str, float] = {}
    rows = torch.arange(settings.samples) % len(real)
    of_samples = _features_of_samples(encoders, settings, model, real, rows, seed, seconds)
    with _timed(seconds, "image_features"):
        of_real = {name: features_of(encoder, images, real.names()) for name, encoder in encoders.vision.items()}
    figures = {"distribution_samples": settings.samples, "distribution_images": len(real)}
    if encoders.features and len(real) >= FEWEST:  # and as many samples, or more
        name = encoders.features.name
        figures |= _distances(of_real[name], of_samples[name], seconds)
        if len(other) >= FEWEST:
            with _timed(seconds, "image_features"):
                of_other = features_of(encoders.features, images, other.names())
            figures |= {f"{key}_real": value for key, value in _distances(of_real[name], of_other, seconds).items()}
            figures.pop(f"kid{ERROR}_real")
    if encoders.clip:
        with _timed(seconds, "clip_score"):
            captions = encoders.clip.text.encode(real.primary_texts())
            name = encoders.clip.vision.name
            scores = _clip_scores(of_samples[name], captions[rows])
            figures["clip_score"] = float(scores.mean())
            figures[f"clip_score{ERROR}"] = float(scores.std() / np.sqrt(len(scores)))
            figures["clip_score_real"] = float(_clip_scores(of_real[name], captions).mean())
            figures["clip_score_chance"] = float(_clip_scores(of_real[name], np.roll(captions, 1, axis=0)).mean())
    return Distribution({key: _rounded(value) for key, value in figures.items()}, seconds, left_out)


def _left_out(encoders: Encoders, settings: EvaluateParams, images: int) -> str:
    """Which figures cannot be measured with so many real images, and why."""
    reasons = []
    for names, encoder, key in (
        ("fid, kid, cmmd", encoders.features, "evaluate.features"),
        ("clip_score", encoders.clip, "evaluate.clip"),
    ):
        if encoder is None:
            reasons.append(f"{names} ({key} is null)")
        elif not images:
            reasons.append(f"{names} (there are no {settings.real_images.replace('_', '-')} images)")
        elif encoder is encoders.features and images < FEWEST:
            reasons.append(f"{names} (of {images} images and samples, at the fewest {FEWEST} are needed)")
    return ", ".join(reasons)


def _features_of_samples(
    encoders: Encoders,
    settings: EvaluateParams,
    model: TextToImage,
    real: LatentDataset | Split,
    rows: torch.Tensor,
    seed: int,
    seconds: dict[str, float],
) -> dict[str, np.ndarray]:
    """By name of the encoder, the features (M, dim) of a sample for the primary caption of each of ``rows``."""
    names = _noise_names(real.names(), len(rows))
    shapes = list(islice(cycle(row_shapes(real)), len(rows)))
    found: dict[str, list[np.ndarray]] = {name: [] for name in encoders.vision}
    for start in range(0, len(rows), PART):
        part = slice(start, start + PART)
        with _timed(seconds, "sampling"):
            embeddings = real.primary_embeddings(rows[part])
            latents = model.latents(embeddings, names[part], settings.sampling, seed=seed, shapes=shapes[part])
            pixels = model.codec.decode_each(latents)
        with _timed(seconds, "sample_features"):
            for name, encoder in encoders.vision.items():
                found[name] += _in_batches(encoder, pixels)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _in_batches(encoder: VisionEncoder, pixels: Sequence[np.ndarray], size: int = 64) -> Iterator[np.ndarray]:
    for start in tqdm(range(0, len(pixels), size), desc="features of samples", unit="batch"):
        yield encoder.encode(pixels[start : start + size])


def _noise_names(ids: Sequence[str], count: int) -> list[str]:
    """What decides the noise of each sample: its image, and which of the image's samples it is.

    The first is named as the image, so it is the sample that the held-out figures are of.
    """
    turns = (divmod(number, len(ids)) for number in range(count))
    return [f"{ids[row]} {turn}" if turn else ids[row] for turn, row in turns]


def _distances(real: np.ndarray, samples: np.ndarray, seconds: dict[str, float]) -> dict[str, float]:
    with _timed(seconds, "fid"):
        fid = frechet_distance(real, samples)
    with _timed(seconds, "kid"):
        kid, error = kernel_distance(real, samples)
    with _timed(seconds, "cmmd"):
        return {"fid": fid, "kid": kid, f"kid{ERROR}": error, "cmmd": cmmd(real, samples)}


def _clip_scores(features: np.ndarray, captions: np.ndarray) -> np.ndarray:
    return 100.0 * cosines(features, captions).clip(min=0.0)


def _rounded(value: float) -> float:
    """To four digits that count: a distance may be 0.0012 or 1200."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what the block takes to ``seconds``."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
