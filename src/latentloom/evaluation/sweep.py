"""Guidance and steps compared: the same captions from the same noise, with every combination of both.

What it leaves is one chart, `sweep.png`, and its figures, `sweep.csv`; without a sweep, neither.
"""

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from PIL import Image

from latentloom.encoding.dataset import Caches, all_latents
from latentloom.evaluation.held_out import combinations
from latentloom.evaluation.recall import nearest, recalled
from latentloom.evaluation.sheet import render_chart, save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.files import write_text
from latentloom.layout import EVALUATE_PLOTS
from latentloom.params import EvaluateParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHART, TABLE = EVALUATE_PLOTS / "sweep.png", EVALUATE_PLOTS / "sweep.csv"
RECALLS = {
    "held_out_recall_at_1": "Held-out recall: the nearest of all images is one of the caption's own",
    "memorisation_recall": "No held-out combination. Training captions: the nearest image is right",
}
LATENT_MAE = "Mean absolute difference to the caption's own latent, in std"


def sweep(model: TextToImage, caches: Caches, settings: EvaluateParams, seed: int) -> pd.DataFrame | None:
    """Sample the held-out combinations with each combination of ``settings.sweep``, if there is one.

    All else is as in ``settings.sampling``. Where no combination is held out, ``training_captions`` training captions
    take their place.

    Returns:
        By rising ``diffusion_steps``, then by rising ``class_guidance``, a row per combination:
        ``held_out_recall_at_1`` or ``memorisation_recall``, as `evaluate` measures them, and ``latent_mae``, the mean
        absolute difference to the latent of the caption's own image, in standard deviations.
    """
    if settings.sweep is None:
        return None
    name, data, among = (
        "held_out_recall_at_1",
        caches.validation.take(settings.held_out_captions),
        [caches.train, caches.validation],
    )
    rows = np.flatnonzero(combinations(data.primary_texts(), caches.train))
    if not len(rows):
        name, data, among = "memorisation_recall", caches.train.take(settings.training_captions), [caches.train]
        rows = np.arange(len(data))
    chosen, latents = torch.from_numpy(rows), all_latents(data)
    captions, embeddings = data.captions[chosen].primary, data.primary_embeddings(chosen)
    ids, own = data.names(chosen), [latents[row] for row in rows]
    shapes = [tuple(latent.shape) for latent in own]
    swept, points = settings.sweep, []
    for steps, guidance in product(sorted(set(swept.diffusion_steps)), sorted(set(swept.class_guidance))):
        sampling = settings.sampling.changed(class_guidance=guidance, diffusion_steps=steps)
        latents = model.latents(embeddings, ids, sampling, seed=seed, shapes=shapes)
        recall = float(recalled(nearest(latents, among)[0], among, captions).mean())
        points.append({"class_guidance": guidance, "diffusion_steps": steps, name: recall})
        differences = [(latent - real).flatten() for latent, real in zip(latents, own, strict=True)]
        points[-1]["latent_mae"] = float(torch.cat(differences).abs().mean())
    return pd.DataFrame(points)


def save_sweep(points: pd.DataFrame | None) -> np.ndarray | None:
    """Write the chart and the table of what `sweep` gave; without it, remove those of an earlier run.

    Returns:
        The chart, uint8 (H, W, 3), if there are points. The same points give the same bytes.
    """
    if points is None:
        for path in (CHART, TABLE):
            path.unlink(missing_ok=True)
        return None
    write_text(TABLE, points.to_csv(index=False))
    chart = sweep_chart(points)
    save_sheet(chart, CHART)
    return np.asarray(chart)


def sweep_chart(points: pd.DataFrame) -> Image.Image:
    """Recall and latent distance over guidance, one line per step count."""
    (recall,) = RECALLS.keys() & points.columns
    panels = {recall: RECALLS[recall], "latent_mae": LATENT_MAE}

    def plot(figure: "Figure") -> None:
        for ax, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for steps, line in points.groupby("diffusion_steps"):
                ax.plot(line["class_guidance"], line[name], marker="o", label=f"{steps} steps")
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="class_guidance", xticks=sorted(points["class_guidance"].unique()))
            ax.grid(alpha=0.3)
            ax.set_ylim(bottom=0, top=1.05 if name == recall else None)
        ax.legend()

    return render_chart(plot, figsize=(10, 4), dpi=120, layout="constrained")
