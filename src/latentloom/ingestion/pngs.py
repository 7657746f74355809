"""Prepared images as PNG, which keeps every pixel."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from latentloom.sizes import Size

HEADER_BYTES = 24
SIZE = (16, HEADER_BYTES)  # where a PNG has its width and height, four bytes each
THUMBNAIL = 160  # pixels

# Against level 6 without run lengths, Pillow's default, of 256x256 photographs: 4.3 ms instead of 16.7, 2 % larger;
# of 128x128 emoji: 0.27 ms instead of 0.51, 3.7 KB instead of 3.2. PNG's row filters do what is worth doing.
OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}


def encode(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **OPTIONS)
    return buffer.getvalue()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 ``(H, W, 3)``, as PNG for a page: at most `THUMBNAIL` per side."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(png: bytes) -> np.ndarray:
    """The pixels of a PNG: uint8 ``(H, W, 3)``, writable.

    Raises:
        ValueError: when the bytes are no whole PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a whole PNG ({len(png)} bytes): {type(error).__name__}") from error


def size_of(header: bytes) -> Size:
    """The size that a PNG's first `HEADER_BYTES` name."""
    return Size(*struct.unpack_from(">II", header, SIZE[0]))
