"""The bytes of any image file -> prepared pixels: uint8 RGB ``(S, S, 3)``, upright, on white, its centred square.

File -> first frame -> upright (EXIF) -> centred square -> 8 bits, RGB, over white -> Lanczos to ``S``. Cropping comes
before converting, so that a wide picture is never converted whole. Colour profiles are not applied: values are taken
as sRGB.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from latentloom.ingestion.rejects import Reason, RejectedSample

# Pillow's formats without those that start programs (EPS) or that any bytes may pass for (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
EXTENSIONS = {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg"}
EXTENSIONS |= {".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
MAX_BYTES = 2**30
LARGEST_ENLARGEMENT = 4
PREVIEW_SIZE = 64
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class PreparedImage:
    """Prepared ``pixels``, uint8 ``(S, S, 3)``, and the ``width`` and ``height`` of the upright original."""

    pixels: np.ndarray
    width: int
    height: int


def prepare_image(data: bytes, size: int, *, max_pixels: int, max_aspect_ratio: float) -> PreparedImage:
    """Decode an image file and prepare its pixels at ``size`` by ``size``.

    Args:
        max_pixels: the most that the image may have.
        max_aspect_ratio: the most that its longer side may be of its shorter one.

    Raises:
        RejectedSample: with the reason, where the bytes are no image that can be used.
    """
    image = _decode(data, size, max_pixels, max_aspect_ratio)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = _on_white(image.crop((left, top, left + side, top + side)))
    return PreparedImage(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)), width, height)


def image_id(pixels: np.ndarray) -> str:
    """The id of prepared pixels: the SHA-256 of their shape, as ``HxWx3:``, and their bytes."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(pixels, np.uint8).tobytes()).hexdigest()


def preview(data: bytes, max_pixels: float = math.inf) -> bytes | None:
    """A PNG, at most 64 pixels per side, of an image file's first frame; None where it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            return None
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
        buffer = io.BytesIO()
        _on_white(_upright(image)).save(buffer, "PNG")
        return buffer.getvalue()
    except Exception:  # damaged bytes raise nearly anything, and the file is rejected already
        return None


@contextmanager
def pillow_settings(max_pixels: int) -> Iterator[None]:
    """Pillow as an ingestion needs it: images of ``max_pixels`` allowed, no warnings of odd but readable files.

    Both are settings of the process, so they are made around all workers, and restored at the end.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels  # beyond twice as many, Pillow stops
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(data: bytes, size: int, max_pixels: int, max_aspect_ratio: float) -> Image.Image:
    """The first frame, upright, in whatever mode the file has."""
    if not data:
        raise RejectedSample(Reason.EMPTY_FILE, "the file holds no bytes")
    if len(data) > MAX_BYTES:
        raise RejectedSample(Reason.TOO_MANY_BYTES, f"{len(data):,} bytes; at most {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_bounds(*image.size, size, max_pixels, max_aspect_ratio)
        image.load()
    except (RejectedSample, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RejectedSample(Reason.TOO_MANY_PIXELS, f"more than {max_pixels:,} pixels (ingest.max_pixels)") from None
    except UnidentifiedImageError:
        if data.startswith(SIGNATURES):
            detail = "begins as an image, but its header is damaged or cut off"
            raise RejectedSample(Reason.UNREADABLE, detail) from None
        detail = f"begins with the bytes {data[:12]!r}, as none of these does: {', '.join(FORMATS)}"
        raise RejectedSample(Reason.NOT_AN_IMAGE, detail) from None
    except Exception as error:  # a decoder meets damaged bytes with nearly any exception: each rejects this file alone
        message = re.sub(r"0x[0-9a-f]+", "", str(error))
        reason = Reason.TRUNCATED if isinstance(error, EOFError) or "truncated" in message else Reason.UNREADABLE
        raise RejectedSample(reason, f"{type(error).__name__}: {message}") from error
    return _upright(image)


def _check_bounds(width: int, height: int, size: int, max_pixels: int, max_aspect_ratio: float) -> None:
    if width * height > max_pixels:
        detail = f"{width}x{height} pixels; at most {max_pixels:,} in all (ingest.max_pixels)"
        raise RejectedSample(Reason.TOO_MANY_PIXELS, detail)
    if max(width, height) > max_aspect_ratio * min(width, height):
        detail = f"{width}x{height} pixels; at most {max_aspect_ratio:g} to 1 (ingest.max_aspect_ratio)"
        raise RejectedSample(Reason.TOO_EXTREME_ASPECT, detail)
    smallest = -(-size // LARGEST_ENLARGEMENT)
    if min(width, height) < smallest:
        least = f"at least {smallest}, 1/{LARGEST_ENLARGEMENT} of ingest.image_size"
        raise RejectedSample(Reason.TOO_SMALL, f"{width}x{height} pixels; the shorter side must have {least}")


def _upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its EXIF says; with damaged EXIF as it is stored, as viewers show it."""
    with suppress(Exception):  # which reading damaged EXIF raises, nearly any
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode -> 8-bit RGB; what is transparent shows white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except ValueError as error:
        raise RejectedSample(Reason.UNSUPPORTED_PIXELS, f"{error}; save it as RGB") from error


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
