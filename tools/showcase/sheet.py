"""Draw docs/showcase.png: held-out combinations, as they really look and as the showcase model draws them.

    PYTHONPATH=src:tools python -m showcase.sheet [MODEL [PNG]]

It takes the model that ships, with no other file than its own, and half a minute. The real pictures are rendered
anew and compared with the ids of those that were held out. Each sample is what `latentloom sample CAPTION --model
showcase` draws. The captions are the first by id, which is a hash: none is picked.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from latentloom.diffusion.sampling_settings import SampleRequest
from latentloom.errors import UserError
from latentloom.evaluation.sheet import COLUMNS, Section, render_sheet, save_sheet
from latentloom.evaluation.text_to_image import TextToImage, load_text_to_image, stored_settings
from latentloom.files import read_json
from latentloom.ingestion.images import image_id, prepare_image
from latentloom.ingestion.openmoji import render
from latentloom.registry.models import SHOWCASE_FOLDER
from latentloom.sizes import Size

ROOT = Path(__file__).resolve().parents[2]
SHEET = ROOT / "docs" / "showcase.png"
HELD_OUT, METRICS = "held_out.csv", "metrics.json"
IN_TONES, OTHERS = 2 * COLUMNS, COLUMNS


def draw_sheet(folder: Path) -> Image.Image:
    """The sheet of the model in ``folder``, which must hold the files that `showcase.pack` adds.

    Raises:
        UserError: when a real picture is not the one that was held out, as with other versions of OpenMoji.
    """
    model, figures = load_text_to_image(folder), read_json(folder / METRICS)["figures"]
    rows = pd.read_csv(folder / HELD_OUT, keep_default_na=False)
    combinations = rows[rows["combination"]]
    in_tone = combinations["caption"].str.contains("skin tone")
    chosen = {
        "Held-out combinations: a person or a hand in a skin tone in which it was never seen": combinations[in_tone],
        "Other held-out emoji, in words that other captions have": combinations[~in_tone],
    }
    sections = [
        _section(title, own.head(count), model, folder)
        for (title, own), count in zip(chosen.items(), (IN_TONES, OTHERS), strict=True)
        if len(own)
    ]
    settings = stored_settings(folder)
    footer = (
        f"The first by id, none picked. {settings.diffusion_steps} steps of {settings.sampler}, guidance "
        f"{settings.class_guidance:g}, seed 0. Of all {figures['images']:,} images, the right one is nearest to the "
        f"sample for {_percent(figures, 'skin_tones_recall_at_1')} of {figures['skin_tones_captions']} combinations "
        f"with a skin tone, and for {_percent(figures, 'other_recall_at_1')} of {figures['other_captions']} others. "
        f"{model.config.attribution}"
    )
    return render_sheet(sections, footer)


def _section(title: str, rows: pd.DataFrame, model: TextToImage, folder: Path) -> Section:
    captions = rows["caption"].tolist()
    size = 8 * model.config.latent_shape[1]  # pixels, for each of the bundled VAE's latents eight
    real = [_real_picture(row.key, row.id, size) for row in rows.itertuples()]
    samples = model.generate(captions, SampleRequest(stored_settings(folder)))[:, 0]
    return Section(title, captions, {"real": np.stack(real), "sample": samples})


def _real_picture(key: str, own_id: str, size: int) -> np.ndarray:
    pixels = prepare_image(render(key, size), [[Size(size, size)]], max_pixels=size**2, max_aspect_ratio=1.0).pixels
    if image_id(pixels) != own_id:
        raise UserError(
            f"the emoji {key} is drawn otherwise than when it was held out: install the packages of requirements.lock"
        )
    return pixels


def _percent(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.0%}" if name in figures else "none"


def main(folder: Path = SHOWCASE_FOLDER, path: Path = SHEET) -> None:
    save_sheet(draw_sheet(folder), path)
    print(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
