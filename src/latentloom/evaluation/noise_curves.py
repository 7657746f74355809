"""The error of a training on its own and on held-out images, at low and at high noise, over its steps.

Both were measured alike, so where the two curves of a panel part, the training memorises: most at high noise, where
there is little of the picture left to go by. The chart is drawn from what `train` left in its plots.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from latentloom.diffusion.denoising_error import BINS, bin_name
from latentloom.evaluation.sheet import render_chart, save_sheet
from latentloom.layout import EVALUATE_PLOTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHART = EVALUATE_PLOTS / "noise_curves.png"
CURVES = {"train": ("train_by_noise.csv", "training images"), "val": ("validation.csv", "held-out images")}


def save_noise_curves(plots: Path) -> np.ndarray | None:
    """Draw the curves in the folder ``plots`` into `CHART`; without any, remove that of an earlier run.

    Returns:
        The chart, uint8 (H, W, 3), if there are curves. The same curves give the same bytes.
    """
    curves = {split: pd.read_csv(plots / file) for split, (file, _) in CURVES.items() if (plots / file).is_file()}
    if "val" not in curves:
        CHART.unlink(missing_ok=True)
        return None
    chart = render_noise_curves(curves)
    save_sheet(chart, CHART)
    return np.asarray(chart)


def render_noise_curves(curves: dict[str, pd.DataFrame]) -> Image.Image:
    """A panel per bin of noise levels with each split's curve: ``step`` and a ``SPLIT_mae_noise_LOW-HIGH`` per bin."""

    def plot(figure: "Figure") -> None:
        axes = figure.subplots(1, len(BINS))
        # In half the time that constrained layout takes: each evaluation draws the chart.
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.92, wspace=0.22)
        for ax, (low, high) in zip(axes, BINS, strict=True):
            for split, table in curves.items():
                column = f"{split}_mae_{bin_name(low, high)}"
                if column in table:  # none of the levels that are measured may fall into a bin
                    ax.plot(table["step"], table[column], marker=".", label=CURVES[split][1])
            ax.set_title(f"noise levels {low:g} to {high:g}", fontsize=10)
            ax.set(xlabel="step")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("mean absolute error, in std of a latent")
        axes[-1].legend(fontsize=8)

    return render_chart(plot, figsize=(12, 3.6), dpi=100)
