"""One whole evaluation: error and recall on held-out images, what is known by heart, how samples compare with real
pictures, and sheets that show it.

`metrics.json`, `plots/mae_by_noise.csv`, the sheet `samples.png` and that of the worst and best, `extremes.png`, are
what it leaves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from latentloom.devices import autocast_dtype
from latentloom.diffusion.denoising_error import BINS, bin_name, denoising_error
from latentloom.diffusion.text import concatenate
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import Caches, LatentDataset, Split, row_shapes
from latentloom.evaluation.distribution import (
    BESIDE_REAL,
    ERROR,
    Distribution,
    Encoders,
    load_encoders,
    measure_distribution,
)
from latentloom.evaluation.held_out import HeldOut, measure
from latentloom.evaluation.recall import memorisation_recall, with_interval
from latentloom.evaluation.sheet import COLUMNS, Section, render_sheet, save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.files import write_json, write_text
from latentloom.ingestion.shards import iterate_images
from latentloom.layout import EVALUATE_METRICS, EVALUATE_PLOTS, EXTREMES_SHEET, SAMPLE_SHEET
from latentloom.params import Params

SHOWN = COLUMNS  # of each kind on a sheet; of held-out combinations, twice as many
BY_NOISE = {f"val_mae_{bin_name(low, high)}": (low + high) / 2 for low, high in BINS}
MAIN_FIGURES = (
    *("held_out_recall_at_1", "held_out_recall_at_5", "val_mae", "copied_share", "memorisation_recall"),
    *BESIDE_REAL,
)
NOTHING_HELD_OUT = "no held-out image: val_mae and held-out recall are not measured"


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, the sheet of samples, and that of the worst and the best held-out samples.

    Attributes:
        distribution: what was measured of samples beside real images, which the metrics hold, too; how long it took.
        encoders: what that was measured with, as `Encoders.described` has it.
    """

    metrics: dict[str, float]
    sheet: Image.Image
    extremes: Image.Image
    distribution: Distribution = field(default_factory=Distribution)
    encoders: dict[str, dict[str, str]] = field(default_factory=dict)

    def save(self) -> None:
        """Write the metrics, the sheets, and the errors by noise level: a table without rows where there are none."""
        scalars = {name: value for name, value in self.metrics.items() if name not in BY_NOISE}
        write_json(EVALUATE_METRICS, scalars)
        by_noise = [(level, self.metrics[name]) for name, level in BY_NOISE.items() if name in self.metrics]
        table = pd.DataFrame(by_noise, columns=["noise_level", "val_mae"])
        write_text(EVALUATE_PLOTS / "mae_by_noise.csv", table.to_csv(index=False))
        save_sheet(self.sheet, SAMPLE_SHEET)
        save_sheet(self.extremes, EXTREMES_SHEET)

    @property
    def summary(self) -> str:
        """One line for the end of the stage."""
        left_out = self.distribution.left_out and f"not measured: {self.distribution.left_out}"
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.distribution.seconds.items())
        return "; ".join(filter(None, [_figures(self.metrics), left_out, times, f"see {SAMPLE_SHEET}"]))


def evaluate(params: Params, model: TextToImage, caches: Caches, images: Path) -> Evaluation:
    """Measure the model, and show samples of it beside real images.

    Captions are sampled in the shape of their real image. The figures on held-out captions are those of `measure`.
    ``memorisation_recall``: of ``evaluate.training_captions`` training captions, the share whose sample's nearest
    training image, among all of them, is one that the caption belongs to. Without a validation split only that is
    measured. Those of samples beside real images are of `measure_distribution`.

    Args:
        params: the whole params.
        model: with its encoders.
        caches: both splits, on the model's device.
        images: the prepared images, for the real images beside samples.
    """
    settings = params.evaluate
    encoders = load_encoders(settings, model.device)
    error = denoising_error(
        model.network,
        caches.validation,
        schedule=params.diffusion.schedule,
        noise_levels=params.diffusion.noise_levels,
        dtype=autocast_dtype(settings.sampling.precision, model.device),
    )
    prompts, sizes = settings.prompts or [], settings.sizes or [None]
    prompted = [model.embed(prompts)] * len(sizes) if prompts else []
    # The first by id: as good as random, and the same in each run.
    held_out = caches.validation.take(settings.held_out_captions)
    known = caches.train.take(settings.training_captions)
    embeddings = concatenate([*prompted, *(data.primary_embeddings().to("cpu") for data in (known, held_out))])
    names = [*(f"prompt {prompt}" for _ in sizes for prompt in prompts), *known.names(), *held_out.names()]
    asked = [model.latent_shape(size) for size in sizes for _ in prompts]
    shapes = [*asked, *row_shapes(known), *row_shapes(held_out)]
    latents = iter(model.latents(embeddings, names, settings.sampling, seed=params.seed, shapes=shapes))
    of_prompts = {size: list(islice(latents, len(prompts))) for size in sizes}
    of_known, of_held_out = list(islice(latents, len(known))), list(latents)

    measured = measure(of_held_out, held_out, caches)
    metrics = {f"val_{name}": round(value, 4) for name, value in error.items()} | measured.figures
    metrics |= with_interval("memorisation_recall", memorisation_recall(of_known, known, caches.train))
    metrics |= {"training_captions": len(known)}
    distribution = measure_distribution(encoders, settings, model, caches, images, seed=params.seed)
    metrics |= distribution.figures

    sections, extremes = _sections(prompts, of_prompts, known, of_known, measured, model.codec, images)
    said = [_made(params, metrics), *_beside_real(params, encoders, distribution), model.config.attribution]
    footer = " ".join(filter(None, said))
    sheets = render_sheet(sections, footer), render_sheet(extremes, footer)
    return Evaluation(metrics, *sheets, distribution, encoders.described)


def _sections(
    prompts: Sequence[str],
    of_prompts: Mapping[str | None, Sequence[torch.Tensor]],
    known: LatentDataset | Split,
    of_known: Sequence[torch.Tensor],
    held_out: HeldOut,
    codec: LatentCodec,
    images: Path,
) -> tuple[list[Section], list[Section]]:
    """Those of the sheet of samples, and those of the sheet of extremes."""
    ids, captions = np.array(held_out.data.names(), dtype=str), held_out.data.primary_texts()
    by_id = np.argsort(ids)
    combinations = by_id[held_out.combination[by_id]][: 2 * SHOWN]
    new_words = by_id[~held_out.combination[by_id]][:SHOWN]
    by_error = np.argsort(held_out.error, kind="stable")
    best, worst = np.split(by_error, [(len(by_error) + 1) // 2])
    first = {
        "Held-out combinations: images never trained on, in words that training captions have": combinations,
        "Held-out captions with new words, which no training caption has": new_words,
    }
    extremes = {
        f"The farthest from their real images, of {len(by_error)} held-out samples": worst[::-1][:SHOWN],
        f"The nearest to their real images, of {len(by_error)} held-out samples": best[:SHOWN],
    }
    trained = known.take(SHOWN)
    trained_ids = trained.names()
    nearest_ids = np.array(held_out.nearest_ids)
    used = [row for rows in (first | extremes).values() for row in rows]
    real = dict(iterate_images(images, wanted={*trained_ids, *ids[used], *nearest_ids[used]}))

    def originals(names: Iterable[str]) -> list[np.ndarray]:
        return [real[name] for name in names]

    def beside_real(title: str, rows: np.ndarray) -> Section:
        shown = {
            "real": originals(ids[rows]),
            "sample": codec.decode_each([held_out.samples[row] for row in rows]),
            "nearest\ntraining\nimage": originals(nearest_ids[rows]),
        }
        return Section(title, [captions[row] for row in rows], shown)

    samples = dict(zip(known.names(), of_known, strict=True))
    of_trained = {
        "real": originals(trained_ids),
        "sample": codec.decode_each([samples[name] for name in trained_ids]),
    }
    sections = [
        *(beside_real(title, rows) for title, rows in first.items() if len(rows)),
        *(
            Section(f"Prompts at {size}" if size else "Prompts", prompts, {"sample": codec.decode_each(latents)})
            for size, latents in of_prompts.items()
            if prompts
        ),
        Section("Captions of training images", trained.primary_texts(), of_trained),
    ]
    return sections, [beside_real(title, rows) for title, rows in extremes.items() if len(rows)]


def _figures(metrics: Mapping[str, float]) -> str:
    """The main figures, with intervals where they have any, in one line."""
    shown = []
    for name in MAIN_FIGURES:
        if name in metrics:
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
            error = f" ± {metrics[name + ERROR]:.2g}" if name + ERROR in metrics else ""
            value = f"{metrics[name]:.3g}" if name in BESIDE_REAL else f"{metrics[name]:.3f}"
            shown.append(f"{name} {value}{interval}{error}")
    return ", ".join(shown if "val_mae" in metrics else [*shown, NOTHING_HELD_OUT])


def _beside_real(params: Params, encoders: Encoders, distribution: Distribution) -> Iterator[str]:
    """Sentences of the footer: how samples were measured beside real images, and which figures are left out."""
    if figures := distribution.figures:
        named = [f"{key} {own['reference']} ({own['fingerprint'][:12]}…)" for key, own in encoders.described.items()]
        real = f"{figures['distribution_images']} {params.evaluate.real_images.replace('_', '-')} images"
        yield f"{figures['distribution_samples']} samples beside {real}, by {', '.join(named)}."
    if distribution.left_out:
        yield f"Not measured: {distribution.left_out}."


def _made(params: Params, metrics: Mapping[str, float]) -> str:
    """The footer's first sentence: how the samples were made, and the main figures."""
    sampling = params.evaluate.sampling
    guidance, (low, high) = f"guidance {sampling.class_guidance:g}", sampling.guidance_interval
    if (low, high) != (0.0, 1.0):
        guidance += f" at noise levels {low:g} to {high:g}"
    if sampling.guidance_rescale:
        guidance += f", rescaled by {sampling.guidance_rescale:g}"
    counts = (
        f"{metrics['held_out_combinations']} held-out combinations, {metrics['training_captions']} training captions"
    )
    made = f"{sampling.diffusion_steps} steps of {sampling.sampler}, {guidance}, seed {params.seed}; {counts}: "
    return f"{made}{_figures(metrics)}."
