"""Guidance and steps compared: the same captions from the same noise, with every combination of both.

What it leaves is one chart, `sweep.png`, and its figures, `sweep.csv`; without a sweep, neither.
"""

import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from PIL import Image

from latentloom.encoding.dataset import LatentDataset
from latentloom.evaluation.recall import recall_at_1
from latentloom.evaluation.report import write_table
from latentloom.evaluation.sheet import save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.layout import EVALUATE_PLOTS
from latentloom.params import EvaluateParams

CHART, TABLE = EVALUATE_PLOTS / "sweep.png", EVALUATE_PLOTS / "sweep.csv"


@dataclass(frozen=True)
class SweepPoint:
    """One combination, and what its samples of training captions were like.

    Attributes:
        class_guidance: how strongly they followed the caption.
        diffusion_steps: steps per sample.
        caption_recall_at_1: as `evaluate` measures it.
        latent_mae: the mean absolute difference to the caption's own training latent, in standard deviations.
    """

    class_guidance: float
    diffusion_steps: int
    caption_recall_at_1: float
    latent_mae: float


def sweep(model: TextToImage, train: LatentDataset, settings: EvaluateParams, seed: int) -> list[SweepPoint]:
    """Sample ``recall_captions`` captions of ``train`` with each combination of ``settings.sweep``, if there is one.

    All else is as in ``settings.sampling``. The points come by rising steps, then by rising guidance, each combination
    once.
    """
    if settings.sweep is None:
        return []
    known = train.take(settings.recall_captions)
    embeddings, (own, _) = known.primary_embeddings(), known.latents_at(slice(0, len(known)))
    points = []
    for steps in sorted(set(settings.sweep.diffusion_steps)):
        for guidance in sorted(set(settings.sweep.class_guidance)):
            sampling = settings.sampling.changed(class_guidance=guidance, diffusion_steps=steps)
            latents = model.latents(embeddings, known.ids, sampling, seed=seed)
            error = (latents - own).abs().mean()
            points.append(SweepPoint(guidance, steps, recall_at_1(latents, train), float(error)))
    return points


def save_sweep(points: Sequence[SweepPoint]) -> np.ndarray | None:
    """Write the chart and the table; without points, remove those of an earlier run.

    Returns:
        The chart, uint8 (H, W, 3), if there are points. The same points give the same bytes.
    """
    for path in (CHART, TABLE):
        path.unlink(missing_ok=True)
    if not points:
        return None
    write_table(TABLE, [field.name for field in fields(SweepPoint)], [astuple(point) for point in points])
    chart = render_chart(points)
    save_sheet(chart, CHART)
    return np.asarray(chart)


def render_chart(points: Sequence[SweepPoint]) -> Image.Image:
    """Recall and latent distance over guidance, one line per step count."""
    import matplotlib.style
    from matplotlib.figure import Figure

    panels = {
        "caption_recall_at_1": "Recall: the nearest training image is the caption's own",
        "latent_mae": "Mean absolute difference to its latent, in std",
    }
    with matplotlib.style.context("default"):  # whatever the user's own settings are
        figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
        for ax, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for steps in sorted({point.diffusion_steps for point in points}):
                line = [point for point in points if point.diffusion_steps == steps]
                xs, ys = [point.class_guidance for point in line], [getattr(point, name) for point in line]
                ax.plot(xs, ys, marker="o", label=f"{steps} steps")
            ax.set_title(title, fontsize=10)
            ax.set(xlabel="class_guidance", xticks=sorted({point.class_guidance for point in points}))
            ax.grid(alpha=0.3)
            ax.set_ylim(bottom=0, top=1.05 if name == "caption_recall_at_1" else None)
        ax.legend()
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")
