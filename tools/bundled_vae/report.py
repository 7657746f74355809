"""What a VAE training shows for itself: its figures as a line, its reconstructions as a picture."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from torch import Tensor

from bundled_vae.training import reconstruct


def figures_table(figures: dict[float, float]) -> str:
    """`{0.0: 25.51, 0.2: 24.6}` -> `clean 25.51 dB, noise 0.2: 24.60 dB`."""
    return ", ".join(f"{f'noise {noise}:' if noise else 'clean'} {figure:.2f} dB" for noise, figure in figures.items())


def save_reconstructions(
    vae: AutoencoderTiny, images: Tensor, path: Path, columns: int = 12, noise: float = 0.2
) -> None:
    """A picture of `columns` of the uint8 `images`, evenly chosen, above their clean and noisy reconstructions."""
    chosen = images[torch.linspace(0, len(images) - 1, columns).round().long()]
    rows = {
        "original": chosen.float() / 255,
        "reconstruction": reconstruct(vae, chosen, 0.0),
        f"reconstruction, noise of {noise} std on the latents": reconstruct(vae, chosen, noise),
    }
    size, label = images.shape[-1], 16
    sheet = Image.new("RGB", (columns * size, len(rows) * (size + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(rows.items()):
        top = number * (size + label)
        draw.text((4, top + 2), title, fill="black")
        for column, picture in enumerate(pictures):
            pixels = picture.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
            sheet.paste(Image.fromarray(pixels), (column * size, top + label))
    sheet.save(path, optimize=True)
