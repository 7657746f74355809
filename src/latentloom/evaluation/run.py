"""One whole evaluation: figures on the validation split, samples for captions, and whether they are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from latentloom.encoding.dataset import Caches, LatentDataset
from latentloom.evaluation.sampling import Sampler, recall_at_1
from latentloom.evaluation.sheet import Row, Section, draw_sheet
from latentloom.ingestion.shards import iterate_images
from latentloom.params import Params
from latentloom.training.denoising_error import denoising_error
from latentloom.training.preview import Decoder, to_raw

SHOWN_TRAINING_CAPTIONS = 16


class Embedder(Protocol):
    """Anything that turns captions into embeddings (N, dim)."""

    def encode(self, captions: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """Figures, and the sheet of samples."""

    metrics: dict[str, float]
    sheet: Image.Image


def evaluate(
    params: Params, sampler: Sampler, caches: Caches, images: Path, *, decoder: Decoder, embedder: Embedder
) -> Evaluation:
    """Measure and draw.

    ``caption_recall_at_1``: of ``evaluate.recall_captions`` training captions, the share whose sample's nearest
    training latent, among all of them, is the one that the caption belongs to.

    Args:
        params: the whole params.
        sampler: the model with its sampling settings.
        caches: both splits, on the model's device.
        images: the prepared images, for the real pictures beside samples.
        decoder: the VAE.
        embedder: the text encoder.
    """
    settings = params.evaluate
    error = denoising_error(
        sampler.network,
        caches.validation,
        schedule=params.diffusion.schedule,
        noise_levels=params.diffusion.noise_levels,
        dtype=sampler.dtype,
    )
    prompted = torch.from_numpy(embedder.encode(settings.prompts))
    known = _first(caches.train, settings.recall_captions)
    held_out = _first(caches.validation, settings.held_out_captions)
    embeddings = torch.cat([prompted, *(data.primary_embeddings().cpu() for data in (known, held_out))])
    names = [*(f"prompt {prompt}" for prompt in settings.prompts), *known.ids, *held_out.ids]
    latents = sampler.latents(embeddings, names, params.seed)
    drawn = decoder.decode(to_raw(latents, sampler.config))

    of_prompts, of_known, _ = latents.split([len(prompted), len(known), len(held_out)])
    metrics = {f"val_{name}": round(value, 4) for name, value in error.items()} | {
        "caption_recall_at_1": round(recall_at_1(of_known, caches.train), 4),
        "recall_captions": len(known),
    }
    prompt_images, known_images, held_out_images = np.split(drawn, np.cumsum([len(of_prompts), len(of_known)]))
    shown = min(SHOWN_TRAINING_CAPTIONS, len(known))
    real = dict(iterate_images(images, wanted={*known.ids[:shown], *held_out.ids}))
    sections = [
        Section("Prompts", settings.prompts, [Row("sample", prompt_images)]),
        Section(
            "Captions of training images",
            known.primary_texts()[:shown],
            [Row("real", _pictures(real, known.ids[:shown])), Row("sample", known_images[:shown])],
        ),
    ]
    if len(held_out):
        sections.append(
            Section(
                "Captions held out: the model never saw these images",
                held_out.primary_texts(),
                [Row("real", _pictures(real, held_out.ids)), Row("sample", held_out_images)],
            )
        )
    return Evaluation(metrics, draw_sheet(sections, _footer(params, sampler, metrics)))


def _first(data: LatentDataset, count: int) -> LatentDataset:
    """The first ``count`` rows by id: as good as random, and the same in each run."""
    return data.take(min(count, len(data)))


def _pictures(real: dict[str, np.ndarray], ids: Sequence[str]) -> np.ndarray:
    return np.stack([real[image_id] for image_id in ids])


def _footer(params: Params, sampler: Sampler, metrics: dict[str, float]) -> str:
    figures = f"caption_recall_at_1 {metrics['caption_recall_at_1']:.3f} of {metrics['recall_captions']}"
    if "val_mae" in metrics:
        figures += f", val_mae {metrics['val_mae']:.3f}"
    made = f"{sampler.steps} steps of {sampler.sampler}, {_guidance(sampler)}, seed {params.seed}; {figures}."
    return f"{made} {sampler.config.attribution}" if sampler.config.attribution else made


def _guidance(sampler: Sampler) -> str:
    told, (low, high) = f"guidance {sampler.guidance:g}", sampler.guidance_interval
    if (low, high) != (0.0, 1.0):
        told += f" at noise levels {low:g} to {high:g}"
    if sampler.guidance_rescale:
        told += f", rescaled by {sampler.guidance_rescale:g}"
    return told
