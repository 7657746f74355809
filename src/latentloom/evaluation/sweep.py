"""Guidance and steps compared: the same captions from the same noise, with every combination of both.

What it leaves is one chart, `sweep.png`, and its figures, `sweep.csv`; without a sweep, neither.
"""

import io
from itertools import product

import numpy as np
import pandas as pd
from PIL import Image

from latentloom.encoding.dataset import LatentDataset
from latentloom.evaluation.recall import recall_at_1
from latentloom.evaluation.sheet import save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.files import write_text
from latentloom.layout import EVALUATE_PLOTS
from latentloom.params import EvaluateParams

CHART, TABLE = EVALUATE_PLOTS / "sweep.png", EVALUATE_PLOTS / "sweep.csv"
PANELS = {
    "caption_recall_at_1": "Recall: the nearest training image is the caption's own",
    "latent_mae": "Mean absolute difference to its latent, in std",
}


def sweep(model: TextToImage, train: LatentDataset, settings: EvaluateParams, seed: int) -> pd.DataFrame | None:
    """Sample ``recall_captions`` captions of ``train`` with each combination of ``settings.sweep``, if there is one.

    All else is as in ``settings.sampling``.

    Returns:
        By rising ``diffusion_steps``, then by rising ``class_guidance``, a row per combination: ``caption_recall_at_1``
        as `evaluate` measures it, and ``latent_mae``, the mean absolute difference to the caption's own training
        latent, in standard deviations.
    """
    if settings.sweep is None:
        return None
    known = train.take(settings.recall_captions)
    embeddings, (own, _) = known.primary_embeddings(), known.latents_at(slice(0, len(known)))
    swept, points = settings.sweep, []
    for steps, guidance in product(sorted(set(swept.diffusion_steps)), sorted(set(swept.class_guidance))):
        sampling = settings.sampling.changed(class_guidance=guidance, diffusion_steps=steps)
        latents = model.latents(embeddings, known.ids, sampling, seed=seed)
        point = {"class_guidance": guidance, "diffusion_steps": steps}
        point |= {"caption_recall_at_1": recall_at_1(latents, train), "latent_mae": float((latents - own).abs().mean())}
        points.append(point)
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
    chart = render_chart(points)
    save_sheet(chart, CHART)
    return np.asarray(chart)


def render_chart(points: pd.DataFrame) -> Image.Image:
    """Recall and latent distance over guidance, one line per step count."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):  # whatever the user's own settings are
        figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
        for ax, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            for steps, line in points.groupby("diffusion_steps"):
                ax.plot(line["class_guidance"], line[name], marker="o", label=f"{steps} steps")
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="class_guidance", xticks=sorted(points["class_guidance"].unique()))
            ax.grid(alpha=0.3)
            ax.set_ylim(bottom=0, top=1.05 if name == "caption_recall_at_1" else None)
        ax.legend()
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")
