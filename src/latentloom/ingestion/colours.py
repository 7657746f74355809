"""Pixels of any kind -> 8 bits, over white, in sRGB.

An embedded colour profile (Display P3, Adobe RGB, a press's CMYK) says what the numbers stand for, and a `Conversion`
goes by it. It comes last, since it takes longer than decoding: of a photograph, only the pixels of the prepared image
are converted. A PNG without a profile may say by its gAMA chunk how its numbers follow light, and is converted by that,
as browsers do. Where there is neither, or the profile is damaged or of another kind than the pixels, the numbers are
taken as sRGB, as viewers do, and CMYK as the complement of RGB.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageCms

from latentloom.ingestion.rejects import Reason, RejectedSample

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of the pixels it is for
TAKES = {"L": ("L", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}  # pixels of colours -> modes that they can be given in
COLOURS = dict.fromkeys(("1", "L", "LA", "La", "I", "F"), "L") | {"CMYK": "CMYK"}  # mode -> colours
COLOURS |= dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"), "RGB")
PROFILES = 16  # kept ready: most images of a camera or a program have the same
SAME = 2  # of 255: what two ways of computing sRGB may differ by
GAMMAS = (0.2, 2.0)  # that a PNG may plausibly have; 1/2.2 of a screen's picture, 1 of light itself
SAME_GAMMA = 0.05  # the share that libpng, too, takes for no difference
ADAPTED = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # the latter: workers share a transform


class Profile(StrEnum):
    """What became of an image's colour profile."""

    NONE = "none"  # there was none, or it was sRGB's own
    CONVERTED = "converted"
    IGNORED = "ignored"  # damaged, too large, or of another kind than the pixels


@dataclass(frozen=True)
class Conversion:
    """The way from an image's numbers to sRGB: an image of ``mode`` -> ``RGB``."""

    profile: Profile
    mode: str = "RGB"
    transform: Callable[[Image.Image], Image.Image] | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image) if self.transform else image


def conversion_of(image: Image.Image) -> Conversion:
    """The conversion by an image's profile or gamma, or one that changes nothing."""
    if "icc_profile" not in image.info:
        return Conversion(Profile.NONE) if "srgb" in image.info else _of_gamma(image.info.get("gamma"))
    mode, transform = _transform(image.info["icc_profile"] or b"")
    if mode not in TAKES.get(COLOURS.get(image.mode.partition(";")[0], ""), ()):
        return Conversion(Profile.IGNORED)
    return Conversion(Profile.CONVERTED, mode, transform.apply) if transform else Conversion(Profile.NONE)


def _of_gamma(gamma: float | None) -> Conversion:
    """The conversion of numbers that are light to the power of ``gamma`` (PNG, third edition, section 11.3.2.2)."""
    if gamma is None or abs(2.2 * gamma - 1) <= SAME_GAMMA:
        return Conversion(Profile.NONE)
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        return Conversion(Profile.IGNORED)
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    table = np.rint(255 * srgb).astype(int).tolist() * 3
    return Conversion(Profile.CONVERTED, transform=partial(Image.Image.point, lut=table))


def on_white(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Any mode -> ``mode``, of 8 bits a channel; what is transparent shows white.

    Raises:
        RejectedSample: ``unsupported_pixels``, where nobody can know which numbers are black and white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert(mode)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image if image.mode == mode else image.convert(mode)  # which would copy it
    except ValueError as error:
        raise RejectedSample(Reason.UNSUPPORTED_PIXELS, f"{error}; save it as RGB") from error


@lru_cache(PROFILES)
def _transform(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """The mode of pixels that a profile is for, None where it is of no use; and its way to sRGB, unless it is that."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ADAPTED
        )
    except (ImageCms.PyCMSError, OSError, KeyError):
        return None, None
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
        moved = np.asarray(transform.apply(Image.fromarray(colours))).astype(int) - colours
        if np.abs(moved).max() <= SAME:
            return mode, None
    return mode, transform


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0 to 65535), or of floats from 0 to 1 -> ``L``, scaled rather than clipped."""
    values = np.asarray(image).astype(np.float64)
    highest = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= highest):
        raise RejectedSample(
            Reason.UNSUPPORTED_PIXELS,
            f"grey values from {values.min():g} to {values.max():g}; they must lie between 0 and {highest:g}. "
            "Save it with 8 or 16 bits a channel",
        )
    grey = np.rint(values * (255.0 / highest)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)
