"""One whole evaluation: metrics on the validation split, samples for captions, and whether they are right.

`metrics.json`, `plots/mae_by_noise.csv` and the sheet `samples.png` are what it leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from latentloom.devices import autocast_dtype
from latentloom.diffusion.denoising_error import BINS, bin_name, denoising_error
from latentloom.encoding.dataset import Caches, LatentDataset
from latentloom.evaluation.recall import recall_at_1
from latentloom.evaluation.sheet import Section, render_sheet, save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.files import write_json, write_text
from latentloom.ingestion.shards import iterate_images
from latentloom.layout import EVALUATE_METRICS, EVALUATE_PLOTS, SAMPLE_SHEET
from latentloom.params import EvaluateParams, Params

SHOWN_TRAINING_CAPTIONS = 16
BY_NOISE = {f"val_mae_{bin_name(low, high)}": (low + high) / 2 for low, high in BINS}


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the sheet of samples."""

    metrics: dict[str, float]
    sheet: Image.Image

    def save(self) -> None:
        """Write the metrics, the sheet, and the errors by noise level: a table without rows where there are none."""
        scalars = {name: value for name, value in self.metrics.items() if name not in BY_NOISE}
        write_json(EVALUATE_METRICS, scalars)
        by_noise = [(level, self.metrics[name]) for name, level in BY_NOISE.items() if name in self.metrics]
        table = pd.DataFrame(by_noise, columns=["noise_level", "val_mae"])
        write_text(EVALUATE_PLOTS / "mae_by_noise.csv", table.to_csv(index=False))
        save_sheet(self.sheet, SAMPLE_SHEET)

    @property
    def summary(self) -> str:
        """One line for the end of the stage."""
        recall = f"caption_recall_at_1 {self.metrics['caption_recall_at_1']:.3f}"
        error = "no held-out image: val_mae is not measured"
        if "val_mae" in self.metrics:
            error = f"val_mae {self.metrics['val_mae']:.3f}"
        return f"{recall}, {error}, see {SAMPLE_SHEET}"


def evaluate(params: Params, model: TextToImage, caches: Caches, images: Path) -> Evaluation:
    """Measure the model, and show samples of it beside real images.

    ``caption_recall_at_1``: of ``evaluate.recall_captions`` training captions, the share whose sample's nearest
    training latent, among all of them, is the one that the caption belongs to. Without a validation split there is no
    ``val_mae``.

    Args:
        params: the whole params.
        model: with its encoders.
        caches: both splits, on the model's device.
        images: the prepared images, for the real images beside samples.
    """
    settings = params.evaluate
    error = denoising_error(
        model.network,
        caches.validation,
        schedule=params.diffusion.schedule,
        noise_levels=params.diffusion.noise_levels,
        dtype=autocast_dtype(settings.sampling.precision, model.device),
    )
    prompted = torch.from_numpy(model.text_encoder.encode(settings.prompts))
    # The first by id: as good as random, and the same in each run.
    known = caches.train.take(settings.recall_captions)
    held_out = caches.validation.take(settings.held_out_captions)
    embeddings = torch.cat([prompted, *(data.primary_embeddings().cpu() for data in (known, held_out))])
    names = [*(f"prompt {prompt}" for prompt in settings.prompts), *known.ids, *held_out.ids]
    latents = model.latents(embeddings, names, settings.sampling, seed=params.seed)

    sizes = [len(prompted), len(known), len(held_out)]
    of_known = latents.split(sizes)[1]
    metrics = {f"val_{name}": round(value, 4) for name, value in error.items()} | {
        "caption_recall_at_1": round(recall_at_1(of_known, caches.train), 4),
        "recall_captions": len(known),
    }
    samples = np.split(model.codec.decode(latents), np.cumsum(sizes)[:-1])
    sections = _sections(settings, known, held_out, samples, images)
    return Evaluation(metrics, render_sheet(sections, _footer(params, model, metrics)))


def _sections(
    settings: EvaluateParams,
    known: LatentDataset,
    held_out: LatentDataset,
    samples: Sequence[np.ndarray],
    images: Path,
) -> list[Section]:
    of_prompts, of_known, of_held_out = samples
    shown = known.take(SHOWN_TRAINING_CAPTIONS)
    real = dict(iterate_images(images, wanted={*shown.ids, *held_out.ids}))

    def beside_real(title: str, data: LatentDataset, generated: np.ndarray) -> Section:
        originals = np.stack([real[image_id] for image_id in data.ids])
        return Section(title, data.primary_texts(), {"real": originals, "sample": generated})

    sections = [
        Section("Prompts", settings.prompts, {"sample": of_prompts}),
        beside_real("Captions of training images", shown, of_known[: len(shown)]),
    ]
    if len(held_out):
        sections.append(beside_real("Captions held out: the model never saw these images", held_out, of_held_out))
    return sections


def _footer(params: Params, model: TextToImage, metrics: dict[str, float]) -> str:
    sampling = params.evaluate.sampling
    guidance, (low, high) = f"guidance {sampling.class_guidance:g}", sampling.guidance_interval
    if (low, high) != (0.0, 1.0):
        guidance += f" at noise levels {low:g} to {high:g}"
    if sampling.guidance_rescale:
        guidance += f", rescaled by {sampling.guidance_rescale:g}"
    figures = f"caption_recall_at_1 {metrics['caption_recall_at_1']:.3f} of {metrics['recall_captions']}"
    if "val_mae" in metrics:
        figures += f", val_mae {metrics['val_mae']:.3f}"
    made = f"{sampling.diffusion_steps} steps of {sampling.sampler}, {guidance}, seed {params.seed}; {figures}."
    return f"{made} {model.config.attribution}" if model.config.attribution else made
