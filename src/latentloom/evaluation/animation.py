"""Pictures one after the other, there and back, as a GIF (256 colours each) or as a WebP, which keeps every pixel."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latentloom.files import write_bytes

FORMATS = {".gif": {}, ".webp": {"lossless": True}}  # suffix -> options of Pillow's
MILLISECONDS, AT_THE_ENDS = 120, 600  # that a picture is shown


def encode_animation(pictures: Sequence[np.ndarray], suffix: str) -> bytes:
    """The bytes of an endless animation of pictures, uint8 (H, W, 3) each; ``suffix`` is one of `FORMATS`."""
    frames = [Image.fromarray(picture) for picture in [*pictures, *pictures[-2:0:-1]]]
    durations = [MILLISECONDS] * len(frames)
    durations[0] = durations[len(pictures) - 1] = AT_THE_ENDS
    written = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, **FORMATS[suffix]}
    frames[0].save(written, suffix[1:].upper(), **options)
    return written.getvalue()


def save_animation(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Write an animation of pictures, in the format that the suffix names, atomically.

    Raises:
        WriteError: when it cannot be written, naming it.
    """
    write_bytes(path, encode_animation(pictures, path.suffix.lower()))
